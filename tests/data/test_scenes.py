"""Scenes: every layout is read, what is wrong is named, and meshes become scenes that fit their pictures."""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

trimesh = pytest.importorskip("trimesh")

from inlaid.data import scenes
from inlaid.data.scenes_from_meshes import MeshOptions, prepare, views
from inlaid.media import meshes
from inlaid.media.meshes import LONGEST
from inlaid.media.scene import tiles, unique_names


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
    assert [f for f in prepare([room], out, MeshOptions(3, 96, points=500)) if f.severity == "error"] == []
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
    prepare([room], again, MeshOptions(3, 96, points=500))
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
    assert [o.name for o in sample.objects] == ["sofa", "lamp"] and sample.notes[0].code == "sparse"


def front(root: Path, save: Callable[[Path, np.ndarray], Any], ids: np.ndarray | None = None) -> scenes.Scene:
    """A room in the layout of MIDI's authors, whose surfaces `save` writes."""
    place, surface = root / "3D-FRONT-RENDER/house/room", root / "3D-FRONT-SURFACE/house/room"
    write(place, halves() if ids is None else ids, {}, "render_0000.webp")
    (place / "seg.png").rename(place / "semantic_0000.png")
    surface.mkdir(parents=True)
    for name, x in (("sofa", -0.5), ("lamp", 0.5)):
        save(surface / name, ball(x))
    (root / "midi_room_ids.json").write_text(json.dumps(["house/room"]), "utf-8")
    (root / "midi_furniture_ids.json").write_text(json.dumps([["sofa", "lamp"]]), "utf-8")
    found = scenes.find_scenes(root)
    assert found.findings == []
    return found.scenes[0]


PUBLISHED: dict[str, Callable[[Path, np.ndarray], Any]] = {
    "as published": lambda p, s: np.save(
        p.with_suffix(".npy"), {"surface_points": s[:, :3], "surface_normals": s[:, 3:]}, allow_pickle=True
    ),
    "npz": lambda p, s: np.savez(p.with_suffix(".npz"), surface_points=s[:, :3], surface_normals=s[:, 3:]),
    "plain pickle": lambda p, s: p.with_suffix(".npy").write_bytes(
        pickle.dumps({"surface_points": s[:, :3], "surface_normals": s[:, 3:]}, 2)
    ),
    "array": lambda p, s: np.save(p.with_suffix(".npy"), s),
}


@pytest.mark.parametrize("kind", PUBLISHED)
def test_published_surfaces_are_read(kind: str, tmp_path: Path) -> None:
    sample = front(tmp_path / "front", PUBLISHED[kind]).read()
    for one, x in zip(sample.objects, (-0.5, 0.5), strict=True):
        assert np.allclose(one.surface, ball(x), atol=1e-5)


def test_objects_that_a_view_does_not_show_are_left_out_of_it(tmp_path: Path) -> None:
    sample = front(tmp_path / "front", PUBLISHED["array"], halves(2, 2)).read()
    assert [o.name for o in sample.objects] == ["lamp"]
    assert any(n.code == "unseen" and "object 1" in n for n in sample.notes)


def named(folder: Path, content: Any) -> Path:
    write(folder, halves(), {"surface_1.npy": ball(-0.5), "surface_2.npy": ball(0.5)})
    (folder / "scene.json").write_text(content if isinstance(content, str) else json.dumps(content), "utf-8")
    return folder


def test_names_come_from_scene_json(tmp_path: Path) -> None:
    named(tmp_path / "data/a", {"names": {"2": "Lampe mit Fuß"}, "source": "x.glb"})
    named(tmp_path / "data/b", {})
    a, b = (s.read() for s in scenes.find_scenes(tmp_path / "data").scenes)
    assert [o.name for o in a.objects] == ["", "Lampe mit Fuß"] and [o.name for o in b.objects] == ["", ""]


def test_names_reach_generation(tmp_path: Path) -> None:
    """Both from a scene of the data and from a segmentation that is passed to `generate`."""
    from inlaid.config import Sample
    from inlaid.data.clips import Clip
    from inlaid.data.modality_scene import MODALITY, SceneClip, SceneWindow
    from inlaid.families.grid import SceneExtent

    place = named(tmp_path / "data/a", {"names": {"1": "sofa", "2": "lamp"}})
    scene = scenes.find_scenes(tmp_path / "data").scenes[0]
    clip: Clip = SceneClip(scene.image, scene.name, "", 0, None, "scene", scene=scene)
    family: Any = type("F", (), {"images": ("picture", "segmentation")})
    pair = [str(place / "scene_rgb.png"), str(place / "seg.png")]
    for source in (SceneWindow(clip, SceneExtent(2, 32, 32), "a"), pair):
        found = MODALITY.read(family, source, Sample())[1]
        assert found.objects == {1: "sofa", 2: "lamp"} and found.pixels.max() == 2
    (place / "seg.png").rename(place / "other.png")
    assert (
        "sofa" not in MODALITY.read(family, [pair[0], str(place / "other.png")], Sample())[1].objects.values()
    )


def test_a_changed_surface_is_read_again(tmp_path: Path) -> None:
    place = named(tmp_path / "data/a", {})
    scene = scenes.find_scenes(tmp_path / "data").scenes[0]
    first = scene.read().objects[0].surface
    assert scene.read().objects[0].surface is first, "views of a room share their surfaces"
    np.save(place / "surface_1.npy", ball(-0.25))
    assert scene.read().objects[0].surface[:, 0].mean() == pytest.approx(-0.25, abs=0.05)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("[1", "scene.json is not JSON"),
        ([], "must be"),
        ({"names": ["a"]}, "must be"),
        ({"names": {"x": "a"}}, "`x` is not an object ID"),
        ({"names": {"0": "a"}}, "`0` is not an object ID"),
        ({"names": {"1": 3}}, "the name of object 1 must be a text"),
        ({"names": {"1": " "}}, "the name of object 1 must be a text"),
        ({"names": {"1": "x" * 201}}, "of 1 to 200 characters"),
        ({"names": {"1": "a", "2": "a"}}, "two objects have the name `a`"),
        ({"names": {"1": "object_2"}}, "object 1 has the name `object_2`"),
    ],
)
def test_wrong_names_are_stated(content: Any, says: str, tmp_path: Path) -> None:
    named(tmp_path / "data/a", content)
    found = scenes.find_scenes(tmp_path / "data")
    assert found.scenes == [] and len(found.findings) == 1 and says in found.findings[0].message


def test_names_are_read_only_inside_the_data(tmp_path: Path) -> None:
    place = named(tmp_path / "data/a", {})
    (place / "scene.json").unlink()
    (tmp_path / "private.json").write_text('{"names": {"1": "secret"}}')
    (place / "scene.json").symlink_to(tmp_path / "private.json")
    found = scenes.find_scenes(tmp_path / "data")
    assert found.scenes == [] and [f.code for f in found.findings] == ["outside"]


@settings(max_examples=40)
@given(
    st.lists(
        st.text(max_size=12) | st.sampled_from(["a", "a_2", "object_1", "object_2", "object_10"]), max_size=9
    )
)
def test_names_are_made_valid_and_unique(given_names: list[str]) -> None:
    found = unique_names(given_names)
    assert len(set(found)) == len(given_names) and all(0 < len(n) <= 200 and n.strip() for n in found)
    assert all(not re.fullmatch(r"object_\d+", n) or n == f"object_{i}" for i, n in enumerate(found, 1))
    assert unique_names(found) == found


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
    with pytest.raises(ValueError, match="contains no scenes; a scene is a folder with"):
        scenes.find_scenes(tmp_path / "empty")
    trimesh.creation.box().export(tmp_path / "empty/x.stl")
    with pytest.raises(ValueError, match=r"it contains meshes: run `inlaid import meshes \S+ SCENES`"):
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
    findings = prepare([tmp_path / "bad.glb", tmp_path / "open.glb"], tmp_path / "out", MeshOptions(1, 48))
    assert [(f.severity, f.name) for f in findings] == [("error", "bad.glb"), *[("warning", "open.glb")] * 2]
    assert "without colors" in findings[1].message and "watertight" in findings[2].message
