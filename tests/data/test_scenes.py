"""Scenes: every layout is read, what is wrong is named, and meshes become scenes that fit their pictures."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

trimesh = pytest.importorskip("trimesh")

from inlaid.data import scenes
from inlaid.data.scenes_from_meshes import (
    prepare,
    views,
)
from inlaid.media import meshes
from inlaid.media.meshes import LONGEST
from inlaid.media.scene import tiles


@pytest.fixture
def room(tmp_path: Path) -> Path:
    """A scene of a ball and a box, as a file."""
    return meshes.write_scene(
        tmp_path / "room.glb",
        {
            "ball": trimesh.creation.icosphere(radius=1.0).apply_translation((-2.0, 5.0, 0.5)),
            "box": trimesh.creation.box((1.0, 2.0, 1.0)).apply_translation((1.5, 5.0, 0.0)),
        },
    )


def test_meshes_become_scenes_that_fit_their_pictures(room: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert [f for f in prepare([room], out, count=3, size=96, points=500) if f.severity == "error"] == []
    found = scenes.find_scenes(out)
    assert found.layout == "folders" and [s.name for s in found.scenes] == ["room_00", "room_01", "room_02"]
    for i, (scene, view) in enumerate(zip(found.scenes, views(3, 0), strict=True)):
        sample = scene.read()
        whole = np.concatenate([o.surface for o in sample.objects])[:, :3]
        if len(sample.objects) == 2:
            assert np.ptp(whole, axis=0).max() == pytest.approx(LONGEST, abs=0.05)
            left = min(sample.objects, key=lambda o: o.surface[:, 0].mean())
            assert left.number == 1, "the ball stands at -x of the box, in one frame"
        for one in sample.objects:  # the center of a surface projects into its own mask
            origin = view.rays(96)[0][0]
            to = one.surface[:, :3].mean(0) - origin
            along = view.rays(96)[1] @ (to / np.linalg.norm(to))
            y, x = divmod(int(along.argmax()), 96)
            assert one.mask[y, x] or i, "seen where it stands"
        alone = sample.alone(0)
        assert (alone[~sample.objects[0].mask] == 255).all()
        assert np.array_equal(alone[sample.objects[0].mask], sample.image[sample.objects[0].mask])
    again = tmp_path / "again"
    prepare([room], again, count=3, size=96, points=500)
    for name in ("scene_rgb.png", "seg.png", "surface_1.npy"):
        assert (again / "room_00" / name).read_bytes() == (out / "room_00" / name).read_bytes()
    assert tiles(found.scenes[0].read(), cell=64).shape == (4, 64, 64, 3)


def write(
    folder: Path, ids: np.ndarray, surfaces: dict[str, np.ndarray], image: str = "scene_rgb.png"
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((*ids.shape, 3), 90, np.uint8)).save(folder / image)
    Image.fromarray(ids.astype(np.uint8)).save(folder / "seg.png")
    for name, points in surfaces.items():
        np.save(folder / name, points)
    return folder


def ball(x: float = 0.0, radius: float = 0.3) -> np.ndarray:
    return meshes.sample_surface(trimesh.creation.icosphere(radius=radius).apply_translation((x, 0, 0)), 400)


def halves(left: int = 1, right: int = 2) -> np.ndarray:
    ids = np.zeros((32, 32), int)
    ids[8:24, 2:14], ids[8:24, 18:30] = left, right
    return ids


def test_one_object_with_one_surface(tmp_path: Path) -> None:
    write(tmp_path / "data/scene_0001", halves(255, 255), {"surface.npy": ball()}, "rgb.png")
    sample = scenes.find_scenes(tmp_path / "data").scenes[0].read()
    assert len(sample.objects) == 1 and sample.objects[0].mask.sum() == 2 * 16 * 12


def test_three_d_front(tmp_path: Path) -> None:
    root = tmp_path / "front"
    place = root / "3D-FRONT-RENDER/house/room"
    write(place, halves(), {}, "render_0000.webp")
    (place / "seg.png").rename(place / "semantic_0000.png")
    surface = root / "3D-FRONT-SURFACE/house/room"
    surface.mkdir(parents=True)
    for name, x in (("sofa", -0.5), ("lamp", 0.5)):
        np.save(surface / f"{name}.npy", ball(x))
    (root / "midi_room_ids.json").write_text(json.dumps(["house/room", "house/gone"]), "utf-8")
    (root / "midi_furniture_ids.json").write_text(json.dumps([["sofa", "lamp"], ["bed"]]), "utf-8")
    found = scenes.find_scenes(root)
    assert found.layout == "3d-front" and [f.name for f in found.findings] == ["house/gone"]
    sample = found.scenes[0].read()
    assert [o.number for o in sample.objects] == [1, 2]
    assert sample.objects[0].surface[:, 0].mean() < 0 < sample.objects[1].surface[:, 0].mean()


@pytest.mark.parametrize(
    ("ids", "surfaces", "says"),
    [
        (halves(), {"surface.npy": ball()}, "contains 2 objects for one surface"),
        (halves(), {"surface_3.npy": ball()}, "does not contain object 3"),
        (np.zeros((32, 32), int), {"surface_1.npy": ball()}, "it contains none"),
        (halves(), {"surface_1.npy": ball() * 4}, "outside of the box"),
        (halves(), {"surface_1.npy": ball()[:, :5]}, "a surface must be"),
        (np.eye(32, dtype=int) * (np.arange(32) < 1), {"surface_1.npy": ball()}, "covers too little"),
    ],
)
def test_wrong_scenes_say_what_is_wrong(
    ids: np.ndarray, surfaces: dict[str, np.ndarray], says: str, tmp_path: Path
) -> None:
    write(tmp_path / "data/s", ids, surfaces)
    with pytest.raises(ValueError, match=says):
        scenes.find_scenes(tmp_path / "data").scenes[0].read()


def test_incomplete_folders_are_named_all_at_once(tmp_path: Path) -> None:
    write(tmp_path / "data/a", halves(), {})
    write(tmp_path / "data/b", halves(), {"surface.npy": ball(), "surface_1.npy": ball()})
    write(tmp_path / "data/c", halves(), {"surface_x.npy": ball()})
    (write(tmp_path / "data/d", halves(), {"surface_1.npy": ball()}) / "seg.png").unlink()
    (write(tmp_path / "data/e", halves(), {"surface_1.npy": ball()}) / "scene_rgb.png").unlink()
    found = scenes.find_scenes(tmp_path / "data")
    assert found.scenes == []
    assert {f.name: f.message for f in found.findings} == {
        "a": "has no surface.npy",
        "b": "has both surface.npy and surface_ID.npy",
        "c": "surface_x.npy is named neither surface.npy nor surface_ID.npy",
        "d": "has no seg.png",
        "e": "has no scene_rgb.png",
    }
    with pytest.raises(ValueError, match="no such folder"):
        scenes.find_scenes(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="contains no scenes"):
        scenes.find_scenes(tmp_path / "empty")


def test_sizes_must_agree_and_objects_must_share_a_frame(tmp_path: Path) -> None:
    place = write(tmp_path / "data/s", halves(), {"surface_1.npy": ball(), "surface_2.npy": ball(radius=0.5)})
    scene = scenes.find_scenes(tmp_path / "data").scenes[0]
    assert not any("whole box" in n for n in scene.read().notes)
    for number in (1, 2):
        np.save(place / f"surface_{number}.npy", ball(radius=0.95))
    assert any("whole box" in n for n in scene.read().notes)
    Image.new("RGB", (40, 32)).save(place / "scene_rgb.png")
    with pytest.raises(ValueError, match=r"is 32x32, but scene_rgb\.png is 32x40"):
        scene.read()


def test_what_cannot_be_read_and_what_is_not_closed(room: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.glb").write_bytes(b"no")
    good = trimesh.creation.icosphere()
    meshes.write_scene(
        tmp_path / "open.glb", {"hull": trimesh.Trimesh(good.vertices, good.faces[:-5], process=False)}
    )
    findings = prepare([tmp_path / "bad.glb", tmp_path / "open.glb"], tmp_path / "out", count=1, size=48)
    assert [(f.severity, f.name) for f in findings] == [("error", "bad.glb"), ("warning", "open.glb")]
    assert "watertight" in findings[1].message
