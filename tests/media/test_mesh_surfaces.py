"""Points on the outer surface of meshes, on shapes whose hidden parts are known."""

from __future__ import annotations

import numpy as np
import pytest

trimesh = pytest.importorskip("trimesh")

from inlaid.media.mesh_surfaces import outward, sample_outer


def ball(radius: float, center: tuple[float, float, float] = (0, 0, 0), inward: bool = False):
    found = trimesh.creation.icosphere(3, radius).apply_translation(center)
    if inward:
        found.invert()
    return found


def outer(*parts, count: int = 2000):
    return sample_outer(outward(np.concatenate([p.triangles for p in parts])).mesh, count)


@pytest.mark.parametrize("inward", [False, True])
def test_a_body_inside_another_is_left_out(inward: bool) -> None:
    found = outer(ball(1.0), ball(0.3, inward=inward))
    assert found.hidden == pytest.approx(0.09 / 1.09, abs=0.02)
    radius = np.linalg.norm(found.points[:, :3], axis=-1)
    assert len(found.points) == 2000 and radius.min() > 0.9
    assert ((found.points[:, :3] * found.points[:, 3:]).sum(-1) > 0.9).all(), "normals point outward"


def test_the_inside_of_an_open_box_is_kept() -> None:
    box = trimesh.creation.box([1, 1, 1])
    box.update_faces(~np.isclose(box.face_normals[:, 1], 1))
    found = outer(box)
    assert found.hidden < 0.01 and found.flipped < 0.01
    lid = trimesh.creation.box([1.2, 0.1, 1.2]).apply_translation((0, 0.55, 0))
    body = trimesh.creation.box([0.4, 0.4, 0.4])
    seen = outer(box, body)
    assert seen.hidden < 0.05 and np.isclose(seen.points[:, 1], 0.2).any(), "in an open box it can be seen"
    closed = outer(box, body, lid)
    points = closed.points[:, :3]
    assert closed.hidden > 0.1 and not (np.abs(points).max(-1) < 0.25).any(), "in a closed one it cannot"


def test_normals_that_point_into_a_solid_are_flipped_by_what_is_seen() -> None:
    """A horseshoe with an inverted ball between its arms: the ball lies inside its bounding box."""
    shoe = trimesh.creation.annulus(0.6, 1.0, 0.6, segments=32)
    found = outer(shoe, ball(0.2, inward=True))
    near = np.linalg.norm(found.points[:, :3], axis=-1) < 0.3
    assert near.any() and ((found.points[near, :3] * found.points[near, 3:]).sum(-1) > 0).all()
    assert found.flipped > 0.01


def test_points_are_uniform_by_area_and_reproducible() -> None:
    box = trimesh.creation.box([1, 1, 0.1])
    a, b = outer(box), outer(box)
    assert np.array_equal(a.points, b.points)
    assert (np.abs(a.points[:, 5]) > 0.5).mean() == pytest.approx(2 / 2.4, abs=0.04)


def test_turned_triangles_are_stated() -> None:
    box = trimesh.creation.box([1, 1, 1])
    triangles = box.triangles.copy()
    triangles[[2, 5]] = triangles[[2, 5]][:, ::-1]
    found = outward(triangles)
    assert found.mesh.is_watertight and found.mesh.volume == pytest.approx(1)
    assert sorted(np.flatnonzero(found.turned)) in ([2, 5], sorted({*range(12)} - {2, 5}))
    assert np.allclose(found.mesh.triangles[found.turned], triangles[found.turned][:, ::-1])
    assert np.allclose(found.mesh.triangles[~found.turned], triangles[~found.turned])
