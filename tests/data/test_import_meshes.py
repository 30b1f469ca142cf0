"""`inlaid import meshes`: training scenes of meshes, of broken ones too, on whose surfaces the points lie."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from support.commands import inlaid

trimesh = pytest.importorskip("trimesh")

from inlaid.data import scenes
from inlaid.data.scenes_from_meshes import import_meshes
from inlaid.media.meshes import normalizing, read_scene, write_scene


def broken() -> trimesh.Trimesh:
    """Open, inside out, of two components."""
    ball = trimesh.creation.icosphere(subdivisions=3, radius=0.6).apply_translation((2, 0, 0))
    opened = trimesh.Trimesh(ball.vertices, ball.faces[20:], process=False)
    box = trimesh.creation.box((1, 1, 1))
    both = trimesh.util.concatenate([opened, box])
    both.invert()
    return both


def meshes(folder: Path) -> dict[str, dict[str, trimesh.Trimesh]]:
    made = {
        "room.glb": {
            "ball": trimesh.creation.icosphere(radius=1.0).apply_translation((-2.0, 5.0, 0.5)),
            "box": trimesh.creation.box((1.0, 2.0, 1.0)).apply_translation((1.5, 5.0, 0.0)),
        },
        "ring.ply": {"ring": trimesh.creation.torus(1.0, 0.3)},
        "can.obj": {"can": trimesh.creation.cylinder(0.5, 1.5)},
        "broken.glb": {"broken": broken()},
    }
    folder.mkdir()
    for name, parts in made.items():
        if name.endswith(".glb"):
            write_scene(folder / name, parts)
        else:
            next(iter(parts.values())).export(folder / name)
    return made


def off(truth: trimesh.Trimesh, point: np.ndarray) -> float:
    """Distance from a point to the nearest triangle."""
    many = np.tile(point, (len(truth.faces), 1))
    near = trimesh.triangles.closest_point(truth.triangles, many)
    return float(np.linalg.norm(near - many, axis=-1).min())


def test_surfaces_lie_on_their_meshes_and_normals_point_out(tmp_path: Path) -> None:
    made = meshes(tmp_path / "in")
    done = inlaid("import", "meshes", tmp_path / "in", tmp_path / "out", "--views", 2, "--size", 64)
    assert done.code == 0, done.output
    assert "broken.glb: `broken`: 2 of its parts were inside out" in done.output
    assert "broken.glb: `broken` is not watertight" in done.output
    found = scenes.find_scenes(tmp_path / "out")
    assert len(found.scenes) == 8 and not found.findings
    for scene in found.scenes:
        source = next(n for n in made if scene.name.startswith(n.split(".")[0]))
        parts = read_scene(tmp_path / "in" / source)
        bounds = np.stack([m.bounds for m in parts.values()])
        transform = normalizing(np.stack([bounds[:, 0].min(0), bounds[:, 1].max(0)]))
        sample = scene.read()
        for one in sample.objects:
            truth = list(parts.values())[one.number - 1].copy().apply_transform(transform)
            points, normals = one.surface[:500, :3].astype(np.float64), one.surface[:500, 3:]
            assert max(off(truth, p) for p in points) < 1e-6
            steps = points + 1e-3 * normals
            middles = [part.centroid for part in truth.split(only_watertight=False)]
            closest = np.argmin([np.linalg.norm(steps - m, axis=-1) for m in middles], 0)
            if source != "ring.ply":  # of convex pieces, outward is away from the middle
                away = ((points - np.array(middles)[closest]) * normals).sum(-1) > 0
                assert away.mean() > 0.99
            else:
                assert (~truth.contains(steps)).mean() > 0.99


def test_pictures_beside_a_mesh_are_taken(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    trimesh.creation.box((1, 1, 1)).export(tmp_path / "in/crate.ply")
    picture, ids = np.full((20, 20, 3), 77, np.uint8), np.zeros((20, 20), np.uint8)
    ids[5:15, 5:15] = 1
    Image.fromarray(picture).save(tmp_path / "in/crate_rgb.png")
    Image.fromarray(ids).save(tmp_path / "in/crate_seg.png")
    assert import_meshes(tmp_path / "in", tmp_path / "out") == []
    (scene,) = scenes.find_scenes(tmp_path / "out").scenes
    assert (scene.read().image == 77).all() and scene.read().objects[0].mask.sum() == 100
    (tmp_path / "in/crate_seg.png").unlink()
    with pytest.raises(ValueError, match=r"crate_rgb\.png.* has no crate_seg\.png"):
        import_meshes(tmp_path / "in", tmp_path / "again")


def test_what_cannot_be_imported_is_reported_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/x.glb").write_bytes(b"no")
    for arguments, says in (
        (("nowhere", "out"), "no such folder"),
        (("empty", "out"), "contains no meshes (.glb"),
        (("bad", "out"), "is not a mesh"),
    ):
        done = inlaid("import", "meshes", *(tmp_path / a for a in arguments))
        assert (done.code, "Traceback" in done.output) == (2, False) and says in done.output
