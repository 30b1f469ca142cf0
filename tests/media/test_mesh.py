"""Surfaces, meshes and pictures of them, on shapes whose truth is known."""

from __future__ import annotations

import itertools
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

trimesh = pytest.importorskip("trimesh")

from inlaid.evaluation.metrics import mesh
from inlaid.media import mesh_render
from inlaid.media import meshes as meshes_module
from inlaid.media.isosurface import REACH
from inlaid.media.mesh_files import read_objects
from inlaid.media.mesh_render import View
from inlaid.media.mesh_viewer import viewer_page
from inlaid.media.meshes import (
    LONGEST,
    decimated,
    mesh_problems,
    normalizing,
    preview_meshes,
    read_ids,
    read_surface,
    require_mesh_packages,
    sample_surface,
    write_scene,
)


def test_problems_are_reported() -> None:
    good = trimesh.creation.icosphere(radius=0.5)
    assert mesh_problems(good) == []
    open_one = trimesh.Trimesh(good.vertices, good.faces[:-1], process=False)
    assert mesh_problems(open_one) == ["is not watertight"]
    assert mesh_problems(trimesh.creation.icosphere(radius=REACH - 1e-3)) == [], "at the side of the box"
    assert mesh_problems(trimesh.creation.icosphere(radius=REACH)) == ["is cut off at the box of 1.055"]
    assert "triangles" in mesh_problems(good, most=10)[0]
    broken = good.copy()
    broken.vertices[0] = np.nan
    assert mesh_problems(broken) == ["has vertices that are not finite"]


def test_surfaces_are_read_in_every_form(tmp_path: Path) -> None:
    torus = trimesh.creation.torus(0.6, 0.2)
    points = sample_surface(torus, 3000, seed=1)
    assert np.array_equal(points, sample_surface(torus, 3000, seed=1))
    np.save(tmp_path / "six.npy", points)
    np.save(tmp_path / "three.npy", points[:, :3])
    np.save(tmp_path / "four.npy", points[:, :4])
    np.save(tmp_path / "many.npy", np.stack([points, points]))
    np.savez(tmp_path / "z.npz", surface_points=points[:, :3], surface_normals=points[:, 3:] * 2)
    six, three, four = (read_surface(tmp_path / f"{n}.npy")[0] for n in ("six", "three", "four"))
    assert np.allclose(six.points, points, atol=1e-6) and len(six.notes) == 1
    assert len(read_surface(tmp_path / "many.npy")) == 2
    assert np.allclose(read_surface(tmp_path / "z.npz")[0].points, points, atol=1e-5)
    agree = (three.points[:, 3:] * points[:, 3:]).sum(-1)
    assert (agree > 0.8).mean() > 0.97, "estimated normals point outward all round a torus"
    assert any("estimated" in n for n in three.notes) and any("fourth" in n for n in four.notes)
    flipped = points.copy()
    flipped[:, 3:] *= -1
    np.save(tmp_path / "in.npy", flipped)
    assert any("inward" in n for n in read_surface(tmp_path / "in.npy")[0].notes)


def test_bad_surfaces_are_named(tmp_path: Path) -> None:
    points = sample_surface(trimesh.creation.icosphere(radius=0.5), 100)
    bad = points.copy()
    bad[3, 1] = np.nan
    zero = points.copy()
    zero[:, 3:] = 0
    cases = {
        "not finite": bad,
        "normals are zero": zero,
        "outside of the box": points * 3,
        "a surface must be": points[:, :5],
        "has 3 points": points[:3],
        "a surface needs": points[:15],
    }
    for says, array in cases.items():
        np.save(tmp_path / "bad.npy", array)
        with pytest.raises(ValueError, match=says) as error:
            read_surface(tmp_path / "bad.npy")
        assert "bad.npy" in str(error.value)
    np.savez(tmp_path / "n.npz", other=points)
    with pytest.raises(ValueError, match="no array surface_points"):
        read_surface(tmp_path / "n.npz")


def test_one_transform_for_the_whole_scene() -> None:
    bounds = np.array([[1.0, 2.0, 3.0], [3.0, 3.0, 7.0]])
    corners = np.array(list(itertools.product(*bounds.T)))
    moved = trimesh.transform_points(corners, normalizing(bounds))
    assert np.abs(moved).max() == pytest.approx(LONGEST / 2)
    assert np.allclose(moved.mean(0), 0, atol=1e-9)
    assert np.ptp(moved[:, 0]) / np.ptp(moved[:, 2]) == pytest.approx(0.5)


def test_scenes_keep_names_and_places(tmp_path: Path) -> None:
    meshes = {
        "chair": trimesh.creation.box((0.2, 0.4, 0.6)).apply_translation((0.5, 0, 0)),
        "7": trimesh.creation.icosphere(radius=0.2).apply_translation((-0.5, 0.1, 0)),
        "world": trimesh.creation.icosphere(radius=0.1).apply_translation((0, 0.7, 0)),
    }
    there = {one.name: one for one in read_objects(write_scene(tmp_path / "s.glb", meshes))[0]}
    assert set(there) == set(meshes)
    for name, one in meshes.items():
        corners = there[name].triangles.reshape(-1, 3)
        assert np.allclose([corners.min(0), corners.max(0)], one.bounds, atol=1e-6)
    raw = (tmp_path / "s.glb").read_bytes()
    header = json.loads(raw[20 : 20 + int.from_bytes(raw[12:16], "little")])
    parents = {n["name"] for n in header["nodes"] if "children" in n}
    assert parents <= {"world_"}, "an object with the name of trimesh's root holds no other object"
    (tmp_path / "bad.glb").write_bytes(b"no")
    with pytest.raises(ValueError, match="is not a mesh"):
        read_objects(tmp_path / "bad.glb")


def test_fewer_triangles(monkeypatch: pytest.MonkeyPatch) -> None:
    ball = trimesh.creation.icosphere(subdivisions=5, radius=0.6)
    few = decimated(ball, 1000)
    assert len(few.faces) <= 1000 < len(ball.faces) and not mesh_problems(few)
    assert abs(few.volume / ball.volume - 1) < 0.02
    monkeypatch.setitem(sys.modules, "fast_simplification", None)
    with pytest.raises(ValueError, match=r"fast-simplification: pip install 'inlaid\[mesh\]'"):
        decimated(ball, 1000)


def test_previews_have_few_triangles_in_total(monkeypatch: pytest.MonkeyPatch) -> None:
    meshes = {
        "a": trimesh.creation.icosphere(4),
        "b": trimesh.creation.icosphere(3),
        "c": trimesh.creation.box(),
    }
    assert preview_meshes(meshes) == meshes
    few = preview_meshes(meshes, 1000)
    assert sum(len(m.faces) for m in few.values()) <= 1012 and few["c"] is meshes["c"]
    assert len(few["a"].faces) > 2 * len(few["b"].faces)
    monkeypatch.setattr(meshes_module, "find_spec", lambda name: None)
    assert preview_meshes(meshes, 1000) == meshes, "without the package, all triangles"


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    require_mesh_packages()
    monkeypatch.setattr(meshes_module, "find_spec", lambda name: None if name == "fpsample" else object())
    with pytest.raises(ValueError, match=r"not installed \(fpsample\): pip install 'inlaid\[mesh\]'"):
        require_mesh_packages()


def test_measures_of_known_shapes() -> None:
    a = sample_surface(trimesh.creation.icosphere(radius=0.5), 4000, 0)[:, :3]
    b = sample_surface(trimesh.creation.icosphere(radius=0.5), 4000, 1)[:, :3]
    assert mesh.chamfer(a, b) < 0.04 and mesh.f_score(a, b, 0.05) > 0.99
    assert mesh.chamfer(a, a + np.array([0.5, 0, 0])) > 0.2 and mesh.f_score(a, a + 3.0, 0.1) == 0
    box = np.array([[0.0, 0, 0], [1, 1, 1]])
    assert mesh.box_iou(box, box) == 1 and mesh.box_iou(box, box + np.array([0.5, 0, 0])) == pytest.approx(
        1 / 3
    )
    assert mesh.box_iou(box, box + 2) == 0
    turn = trimesh.transformations.rotation_matrix(0.2, (0, 1, 0), (0.1, 0, 0))
    shape = sample_surface(trimesh.creation.box((0.3, 0.6, 1.0)), 2000, 0)[:, :3]
    moved = trimesh.transform_points(shape, turn)
    back = trimesh.transform_points(moved, mesh.align(moved, shape))
    assert mesh.chamfer(back, shape) < 0.2 * mesh.chamfer(moved, shape)


def test_pictures_show_what_is_there() -> None:
    left = trimesh.creation.icosphere(radius=0.3).apply_translation((-0.6, 0, 0))
    right = trimesh.creation.box((0.5, 0.5, 0.5)).apply_translation((0.6, 0, 0))
    image, ids = mesh_render.render([left, right], View(azimuth=0, elevation=0), 128)
    assert image.shape == (128, 128, 3) and set(np.unique(ids)) == {0, 1, 2}
    x = np.mgrid[:128, :128][1]
    assert x[ids == 1].mean() < 50 < 78 < x[ids == 2].mean(), "seen from the front, -x is at the left"
    assert (image[ids == 0] == 255).all() and (image[ids > 0] < 250).any(-1).all()
    behind = mesh_render.render([left, right], View(azimuth=180, elevation=0), 128)[1]
    assert x[behind == 1].mean() > 78
    above = trimesh.creation.icosphere(radius=0.2).apply_translation((0, 0.8, 0))
    y = np.mgrid[:128, :128][0]
    assert y[mesh_render.render([above], View(0, 0), 128)[1] == 1].mean() < 40
    assert mesh_render.turntable([left], 3, 32).shape == (3, 32, 32, 3)
    assert (mesh_render.render([], size=8)[0] == 255).all()


@pytest.mark.parametrize("azimuth", [0, 45, 77, 300])
def test_a_camera_moves_back_until_all_is_seen(azimuth: float) -> None:
    cube = trimesh.creation.box([1.9, 1.9, 1.9])
    view = View(azimuth, 25)
    cut, whole = (mesh_render.render([cube], v, 64)[1] for v in (view, view.fitting(cube.vertices)))
    edge = np.ones((64, 64), bool)
    edge[1:-1, 1:-1] = False
    assert (whole > 0)[2:-2, 2:-2].any() and not whole[edge].any() and whole.any(0).sum() > 40
    assert view.fitting(0.1 * cube.vertices) == view, "it does not move closer"
    assert cut.sum() >= whole.sum()


def test_segmentations_keep_their_numbers(tmp_path: Path) -> None:
    ids = np.zeros((8, 8), np.uint8)
    ids[:2], ids[2:4], ids[4:6] = 7, 14, 200
    palette = Image.fromarray(ids, "P")
    palette.putpalette([v for i in range(256) for v in (i % 24 * 9, 10, 10)])  # 7 and 31 look alike
    palette.save(tmp_path / "p.png")
    Image.fromarray(ids).save(tmp_path / "l.png")
    Image.fromarray(ids.astype(np.uint16) * 300).save(tmp_path / "i.png")
    color = np.zeros((8, 8, 3), np.uint8)
    color[:4], color[4:6] = (38, 0, 0), (0, 19, 10)
    Image.fromarray(color).save(tmp_path / "c.png")
    assert sorted(np.unique(read_ids(tmp_path / "p.png"))) == [0, 7, 14, 200]
    assert sorted(np.unique(read_ids(tmp_path / "l.png"))) == [0, 7, 14, 200]
    assert sorted(np.unique(read_ids(tmp_path / "i.png"))) == [0, 2100, 4200, 60000]
    found = read_ids(tmp_path / "c.png")
    assert sorted(np.unique(found)) == [0, 1, 2] and (found[6:] == 0).all()
    (tmp_path / "bad.png").write_bytes(b"no")
    with pytest.raises(ValueError, match="segmentation"):
        read_ids(tmp_path / "bad.png")


def test_real_segmentations(media_root: Path) -> None:
    for name in ("bedroom", "cartoon01"):
        ids = read_ids(media_root / "scenes" / f"{name}_seg.png")
        numbers = np.unique(ids)
        assert numbers[0] == 0 and 2 <= len(numbers) - 1 <= 8, numbers


def test_the_viewer_escapes_names() -> None:
    hostile = "</script><b onclick='x'>&"
    text = viewer_page({hostile: trimesh.creation.box((1, 1, 1))}, f"</title>{hostile}")
    assert text.count("</script>") == 1 and text.count("</title>") == 1 and "<b" not in text
    data = re.search(r"const parts = (.*);\n", text)
    assert data and json.loads(data[1])[0]["name"] == hostile
