"""`inlaid import meshes`: training scenes of meshes, of broken ones too, on whose surfaces the points lie."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from support.commands import inlaid

trimesh = pytest.importorskip("trimesh")

from inlaid.data import scenes
from inlaid.data.scenes_from_meshes import MeshOptions, import_meshes
from inlaid.media.mesh_files import read_objects
from inlaid.media.meshes import normalizing, read_ids, write_scene
from inlaid.media.scene import read_names


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
    assert "import " in done.output and "8/8" in done.output, "a progress bar"
    assert "broken.glb: `broken` is not watertight" in done.output
    found = scenes.find_scenes(tmp_path / "out")
    assert len(found.scenes) == 8 and not found.findings
    for scene in found.scenes:
        source = next(n for n in made if scene.name.startswith(n.split(".")[0]))
        parts = {
            one.name: trimesh.Trimesh(
                one.triangles.reshape(-1, 3), np.arange(3 * len(one.triangles)).reshape(-1, 3)
            )
            for one in read_objects(tmp_path / "in" / source)[0]
        }
        bounds = np.stack([m.bounds for m in parts.values()])
        transform = normalizing(np.stack([bounds[:, 0].min(0), bounds[:, 1].max(0)]))
        sample = scene.read()
        for one in sample.objects:
            truth = list(parts.values())[one.number - 1].copy().apply_transform(transform)
            points, normals = one.surface[:200, :3].astype(np.float64), one.surface[:200, 3:]
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
    assert [f.code for f in import_meshes(tmp_path / "in", tmp_path / "out")] == ["up"]
    assert import_meshes(tmp_path / "in", tmp_path / "up", MeshOptions(up="y")) == []
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
        (("bad/x.txt", "out"), "no such folder"),
        (("bad", "out", "--group", "row"), "--group row: use parent, node or material"),
        (("bad", "out", "--up", "w"), "--up w: use x, y, z, -x, -y or -z"),
        (("bad", "out", "--bad-meshes", "hide"), "--bad-meshes hide: use skip or stop"),
    ):
        done = inlaid("import", "meshes", *(tmp_path / a for a in arguments[:2]), *arguments[2:])
        assert (done.code, "Traceback" in done.output) == (2, False) and says in done.output


# --- names, looks, sizes, directions ------------------------------------------------------------------------


def painted(size: tuple[float, float, float], at: tuple[float, float, float], color: tuple[int, ...]):
    mesh = trimesh.creation.box(size).apply_translation(at)
    mesh.visual.face_colors = [*color, 255]
    return mesh


def scene(path: Path, **parts: trimesh.Trimesh) -> Path:
    found = trimesh.Scene()
    for name, mesh in parts.items():
        found.add_geometry(mesh, node_name=name, geom_name=name)
    path.parent.mkdir(parents=True, exist_ok=True)
    found.export(path)
    return path


def test_pictures_show_the_colors_and_scenes_keep_the_names(tmp_path: Path) -> None:
    red, blue = (200, 60, 40), (40, 90, 200)
    scene(
        tmp_path / "in/room.glb",
        sofa=painted((1, 1, 1), (0, 0, 0), red),
        lamp=painted((1, 1, 1), (2, 0, 0), blue),
    )
    findings = import_meshes(tmp_path / "in", tmp_path / "out", MeshOptions(2, 96))
    assert findings == []
    for one in scenes.find_scenes(tmp_path / "out").scenes:
        sample = one.read()
        assert {o.number: o.name for o in sample.objects} == {1: "lamp", 2: "sofa"}
        for o, color in zip(sample.objects, (blue, red), strict=True):
            shown = sample.image[o.mask].astype(float)
            shade = shown / np.array(color)
            assert np.ptp(shade, axis=1).max() < 0.05 and shade.min() > 0.35 and shade.max() < 1.01
    described = json.loads((tmp_path / "out/room_00/scene.json").read_text("utf-8"))
    assert described["source"] == "room.glb"
    back = np.linalg.inv(np.array(described["transform"]))
    lamp = np.load(tmp_path / "out/room_00/surface_1.npy")[:, :3] @ back[:3, :3].T + back[:3, 3]
    assert np.allclose([lamp.min(0), lamp.max(0)], [[1.5, -0.5, -0.5], [2.5, 0.5, 0.5]], atol=0.01)


def test_meshes_without_colors_are_gray_not_the_colors_of_the_masks(tmp_path: Path) -> None:
    scene(
        tmp_path / "in/x.glb", a=trimesh.creation.box([1, 1, 1]), b=painted((1, 1, 1), (2, 0, 0), (250, 0, 0))
    )
    findings = import_meshes(tmp_path / "in", tmp_path / "out", MeshOptions(1, 64))
    assert [f.message for f in findings] == ["`a`: without colors, rendered in gray"]
    sample = scenes.find_scenes(tmp_path / "out").scenes[0].read()
    assert np.ptp(sample.image[sample.objects[0].mask].astype(int), axis=1).max() <= 1


def test_up(tmp_path: Path) -> None:
    """A tall box with a small one at +x and toward the viewer, stored with z up."""
    tall = trimesh.creation.box([1, 0.5, 2]).apply_translation((0, 0, 1))
    small = trimesh.creation.box([0.4, 0.4, 0.4]).apply_translation((2, -1, 0.2))
    scene(tmp_path / "in/x.obj", tall=tall, small=small)
    for up, axis in (("z", 1), (None, 2)):
        out = tmp_path / f"out{axis}"
        findings = import_meshes(tmp_path / "in", out, MeshOptions(1, 64, up=up))
        assert any(f.code == "up" for f in findings) == (up is None)
        low, high = (np.load(out / f"x_00/surface_{n}.npy")[:, :3] for n in (1, 2))
        assert np.ptp(high, axis=0).argmax() == axis
        if up:
            assert low[:, 0].mean() > high[:, 0].max() and low[:, 2].mean() > high[:, 2].max()
            assert np.ptp(high[:, 1]) == pytest.approx(2 * 1.9 / 2.7, abs=0.02)


def test_every_direction_is_a_rotation_that_turns_it_up() -> None:
    from inlaid.data.scenes_from_meshes import UPS, _upright

    for up in UPS:
        axis = np.zeros(3)
        axis["xyz".index(up[-1])] = -1 if up[0] == "-" else 1
        matrix = _upright(up)[:3, :3]
        assert np.allclose(matrix @ axis, [0, 1, 0]) and np.linalg.det(matrix) == pytest.approx(1)
        assert np.allclose(matrix @ matrix.T, np.eye(3))


def test_bad_meshes_are_named_and_left_out_or_stop_the_import(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    (folder / "sub").mkdir(parents=True)
    (folder / "nan.obj").write_text("v nan 0 0\nv 1 0 0\nv 0 1 0\nv 0 0 1\nf 1 2 3\nf 2 3 4\nf 1 3 4\n")
    (folder / "sub/flat.obj").write_text("v 0 0 0\nv 0 0 0\nv 0 0 0\nf 1 2 3\n")
    (folder / "line.ply").write_text(
        "ply\nformat ascii 1.0\nelement vertex 3\nproperty float x\nproperty float y\nproperty float z\n"
        "element face 1\nproperty list uchar int vertex_indices\nend_header\n0 0 0\n1 0 0\n2 0 0\n3 0 1 2\n"
    )
    (folder / "chair.fbx").write_bytes(b"Kaydara")
    trimesh.creation.cylinder(0.5, 2.0).export(folder / "ok.stl")
    good, bad = trimesh.creation.box([1, 1, 1]), trimesh.creation.box([1, 1, 1])
    bad.vertices[3] = np.inf
    scene(folder / "half.glb", good=good, bad=bad)
    done = inlaid("import", "meshes", folder, tmp_path / "out", "--views", 1, "--size", 48)
    assert done.code == 0, done.output
    for line in (
        "error: nan.obj: `nan`: 2 of its 3 triangles have coordinates that are not finite",
        "error: sub/flat.obj: `flat`: all of its triangles have no area",
        "error: line.ply: `line`: all of its triangles have no area",
        "error: chair.fbx: .fbx files are not supported: export it as .glb",
        "triangles have coordinates that are not finite; the object is left out",
    ):
        assert line in " ".join(done.output.split()), done.output
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["half_00", "ok_00"]
    assert read_names(tmp_path / "out/half_00") == {1: "good"}
    stopped = inlaid("import", "meshes", folder, tmp_path / "no", "--bad-meshes", "stop")
    assert (stopped.code, "Traceback" in stopped.output, (tmp_path / "no").exists()) == (2, False, False)
    assert all(n in stopped.output for n in ("nan.obj", "sub/flat.obj", "line.ply", "chair.fbx", "half.glb"))
    assert "pass --bad-meshes skip" in " ".join(stopped.output.split())
    once = import_meshes(tmp_path / "in/ok.stl", tmp_path / "ok", MeshOptions(1, 32, up="y"), bad="stop")
    assert [f.code for f in once] == ["gray"], "nothing is reported twice"


def test_subfolders_single_files_and_equal_names(tmp_path: Path) -> None:
    box = trimesh.creation.box([1, 1, 1])
    for name in ("a.glb", "sub/a.glb", "b.glb", "b.ply"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        box.export(tmp_path / "in" / name)
    (tmp_path / "in/out.glb").symlink_to(tmp_path / "elsewhere.glb")
    box.export(tmp_path / "elsewhere.glb")
    findings = import_meshes(tmp_path / "in", tmp_path / "out", MeshOptions(1, 32))
    found = [s.name for s in scenes.find_scenes(tmp_path / "out").scenes]
    assert found == ["a_00", "b_glb_00", "b_ply_00", "sub/a_00"]
    assert [(f.name, f.code) for f in findings if f.severity == "error"] == [("out.glb", "outside")]
    import_meshes(tmp_path / "in/b.ply", tmp_path / "one", MeshOptions(1, 32))
    assert [p.name for p in (tmp_path / "one").iterdir()] == ["b_00"]


def test_more_than_255_objects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grid = {
        f"o{k:03d}": trimesh.creation.box([0.08] * 3).apply_translation((k % 20 * 0.1, k // 20 * 0.1, 0))
        for k in range(280)
    }
    scene(tmp_path / "in/many.glb", **grid)
    with pytest.raises(
        ValueError, match=r"many\.glb: has 280 objects, above the limit of 255: set INLAID_MAX_OBJ"
    ):
        import_meshes(tmp_path / "in", tmp_path / "out")
    monkeypatch.setenv("INLAID_MAX_OBJECTS", "280")
    import_meshes(tmp_path / "in", tmp_path / "out", MeshOptions(1, 128, points=50))
    (one,) = scenes.find_scenes(tmp_path / "out").scenes
    ids = read_ids(one.segmentation)
    assert ids.max() > 255 and len(np.unique(ids)) > 200
    last = one.read().objects[-1]
    assert last.name == f"o{last.number - 1:03d}"


def test_pictures_belong_to_the_mesh_with_the_longest_name(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for name, value in (("room", 10), ("room_2", 20)):
        trimesh.creation.box((1, 1, 1)).export(folder / f"{name}.glb")
        Image.fromarray(np.full((20, 20, 3), value, np.uint8)).save(folder / f"{name}_rgb.png")
        Image.fromarray(np.ones((20, 20), np.uint8)).save(folder / f"{name}_seg.png")
    import_meshes(folder, tmp_path / "out")
    found = {s.name: int(s.read().image.mean()) for s in scenes.find_scenes(tmp_path / "out").scenes}
    assert found == {"room_00": 10, "room_2_00": 20}
    Image.fromarray(np.full((20, 20), 2, np.uint8)).save(folder / "room_seg.png")
    findings = import_meshes(folder, tmp_path / "again")
    assert any("contains ID 2, but the mesh has 1 objects" in f.message for f in findings)


def test_hidden_surfaces_are_left_out_and_stated(tmp_path: Path) -> None:
    shell = trimesh.util.concatenate([trimesh.creation.icosphere(3, 1.0), trimesh.creation.icosphere(3, 0.3)])
    scene(tmp_path / "in/x.glb", shell=shell)
    findings = import_meshes(tmp_path / "in", tmp_path / "out", MeshOptions(1, 64))
    assert any(f.message == "`shell`: 8% of its surface is hidden inside and is left out" for f in findings)
    points = np.load(tmp_path / "out/x_00/surface_1.npy")
    assert len(points) == 20480 and np.linalg.norm(points[:, :3], axis=-1).min() > 0.9
