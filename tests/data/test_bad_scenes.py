"""What people do wrong with scenes: every mistake ends in one clear message, exit code 2 and no traceback."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from support.commands import inlaid
from support.slow import mostly_slow

pytest.importorskip("trimesh")


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, three scenes and a recipe."""
    from inlaid.tiny import random

    root = tmp_path_factory.mktemp("good")
    random.build("midi", root / "checkpoint")
    for i in range(3):
        place = root / "scenes" / f"s{i}"
        place.mkdir(parents=True)
        ids = np.zeros((32, 32), np.uint8)
        ids[4:28, 2:14], ids[4:28, 18:30] = 1, 2
        Image.fromarray(np.full((32, 32, 3), 40 * i, np.uint8)).save(place / "scene_rgb.png")
        Image.fromarray(ids).save(place / "seg.png")
        for number in (1, 2):
            normal = np.random.default_rng(i).standard_normal((400, 3))
            normal /= np.linalg.norm(normal, axis=-1, keepdims=True)
            points = np.concatenate([0.3 * normal + [number - 1.5, 0, 0], normal], -1)
            np.save(place / f"surface_{number}.npy", points.astype(np.float32))
    recipe = {
        "run": "run",
        "model": {"family": "midi", "checkpoint": "checkpoint"},
        "data": {"sources": "scenes", "validation": 1},
        "tuner": {"kind": "lora", "rank": 2},
        "train": {"steps": 1, "trackers": []},
        "sample": {"steps": 1, "grid": 16},
    }
    (root / "recipe.yaml").write_text(yaml.safe_dump(recipe), "utf-8")
    return root


@pytest.fixture
def place(good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, in which a test makes its mistake."""
    shutil.copytree(good, tmp_path / "w")
    monkeypatch.chdir(tmp_path / "w")
    return tmp_path / "w"


def save(path: Path, change: Callable[[np.ndarray], np.ndarray]) -> None:
    np.save(path, change(np.load(path)))


class Harmful:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("opened"),)


def pickled(path: Path, value: Any) -> None:
    np.save(path, np.array(value, dtype=object), allow_pickle=True)


def with_nan(points: np.ndarray) -> np.ndarray:
    points[3, 1] = np.nan
    return points


def spread(points: np.ndarray) -> np.ndarray:
    """As if each object had been normalised for itself."""
    return np.concatenate([3 * (points[:, :3] - points[:, :3].mean(0)), points[:, 3:]], 1)


def seg(ids: np.ndarray) -> Callable[[Path], Any]:
    return lambda s: Image.fromarray(ids.astype(np.uint8)).save(s / "seg.png")


DOT = np.zeros((32, 32))
DOT[3, 3] = 1
HALVES = np.zeros((32, 32))
HALVES[:, :10], HALVES[:, 12:20], HALVES[:, 22:] = 1, 2, 3

BAD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no segmentation": (lambda s: (s / "seg.png").unlink(), "has no seg.png"),
    "no picture": (lambda s: (s / "scene_rgb.png").unlink(), "has no scene_rgb.png"),
    "no surface": (lambda s: [p.unlink() for p in s.glob("*.npy")], "has no surface.npy"),
    "an id without surface": (lambda s: (s / "surface_2.npy").unlink(), "object 2 in the segmentation"),
    "three ids, two surfaces": (seg(HALVES), "add surface_3.npy, or set its pixels to background"),
    "a surface without id": (seg(HALVES * (HALVES < 2)), "does not contain object 2"),
    "an empty segmentation": (seg(np.zeros((32, 32))), "it contains none"),
    "another size": (seg(np.ones((16, 16))), "is 16x16, but scene_rgb.png is 32x32"),
    "one pixel": (
        lambda s: (seg(DOT)(s), (s / "surface_2.npy").unlink()), "every object of s1 covers too little of the"
    ),
    "not a number": (lambda s: save(s / "surface_1.npy", with_nan), "1 points are not finite"),
    "a pickle that calls": (
        lambda s: pickled(s / "surface_1.npy", {"surface_points": Harmful()}), "is a pickle that uses"
    ),
    "a pickled dict of one number": (
        lambda s: pickled(s / "surface_1.npy", {"surface_points": [0]}), "a surface must be (n, 6)"
    ),
    "a pickled dict without points": (
        lambda s: pickled(s / "surface_1.npy", {"xyz": 1}), "has no array surface_points; its arrays are: xyz"
    ),
    "no points": (lambda s: save(s / "surface_1.npy", lambda p: p[:0]), "has 0 points"),
    "few points": (lambda s: save(s / "surface_1.npy", lambda p: p[:5]), "has 5 points"),
    "one place": (lambda s: save(s / "surface_1.npy", lambda p: 0 * p + 0.1), "have the same position"),
    "five columns": (lambda s: save(s / "surface_1.npy", lambda p: p[:, :5]), "a surface must be (n, 6)"),
    "words": (lambda s: np.save(s / "surface_1.npy", np.array(["a", "b"])), "a surface must be (n, 6)"),
    "zero normals": (
        lambda s: save(s / "surface_1.npy", lambda p: p * (np.arange(6) < 3)), "400 normals are zero"
    ),
    "out of the box": (lambda s: save(s / "surface_1.npy", lambda p: 3 * p), "outside of the box"),
    "text as a surface": (lambda s: (s / "surface_1.npy").write_text("points"), "surface_1.npy"),
    "a cut surface": (
        lambda s: (s / "surface_1.npy").write_bytes((s / "surface_1.npy").read_bytes()[:200]), "surface_1.npy"
    ),
    "an npz without points": (
        lambda s: ((s / "surface_1.npy").unlink(), np.savez(s / "surface_1.npz", a=1)),
        "has no array surface_points",
    ),
    "text as a picture": (lambda s: (s / "scene_rgb.png").write_text("x"), "scene_rgb.png: is not an image"),
    "text as a segmentation": (lambda s: (s / "seg.png").write_text("x"), "seg.png: is not an image"),
    "odd names": (lambda s: (s / "surface_1.npy").rename(s / "surface_a.npy"), "is named neither"),
    "both kinds of names": (
        lambda s: shutil.copy(s / "surface_1.npy", s / "surface.npy"), "has both surface.npy and"
    ),
    "one surface for two": (
        lambda s: ((s / "surface_1.npy").rename(s / "surface.npy"), (s / "surface_2.npy").unlink()),
        "contains 2 objects for one surface.npy",
    ),
    "two surfaces in one": (
        lambda s: save(s / "surface_1.npy", lambda p: np.stack([p, p])), "contains 2 surfaces for one object"
    ),
}  # fmt: skip


OFTEN = (
    *("no picture", "three ids, two surfaces", "a pickle that calls", "no points", "two surfaces in one"),
)
"""What every run of the tests does; of the others, test_scenes.py and test_pickled.py read the most."""


@pytest.mark.parametrize("name", mostly_slow(BAD, OFTEN.__contains__))
def test_a_bad_scene_is_named_by_check(name: str, place: Path) -> None:
    spoil, says = BAD[name]
    spoil(place / "scenes/s1")
    done = inlaid("check", "recipe.yaml")
    assert (done.code, "Traceback" in done.output) == (2, False)
    assert says in done.output and "s1" in done.output and "not ready" in done.output
    assert not Path("opened").exists(), "nothing of a pickle is run"


WARNED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no normals": (lambda s: save(s / "surface_1.npy", lambda p: p[:, :3]), "normals were estimated"),
    "a fourth column": (lambda s: save(s / "surface_1.npy", lambda p: p[:, :4]), "the fourth column is"),
    "normals inside": (
        lambda s: save(s / "surface_1.npy", lambda p: p * np.array([1] * 3 + [-1] * 3)), "point inward"
    ),
    "each for itself": (
        lambda s: [
            save(s / f"surface_{n}.npy", spread)
            for n in (1, 2)
        ],
        "use one transform for the whole scene",
    ),
    "sparse": (lambda s: None, "fewer than 20480"),
}  # fmt: skip


@pytest.mark.parametrize("name", WARNED)
def test_what_is_odd_is_warned_of(name: str, place: Path) -> None:
    spoil, says = WARNED[name]
    for i in range(3):
        spoil(place / f"scenes/s{i}")
    done = inlaid("check", "recipe.yaml")
    assert done.code == 0 and says in done.output


def test_all_mistakes_are_reported_at_once_and_can_be_left_out(place: Path) -> None:
    (place / "scenes/s1/seg.png").unlink()
    save(place / "scenes/s2/surface_1.npy", with_nan)
    done = inlaid("train", "recipe.yaml")
    assert done.code == 2 and "s1: has no seg.png" in done.output and "s2" in done.output
    left = inlaid("train", "recipe.yaml", "data.bad_clips=quarantine", "data.validation=0")
    assert left.code == 0, left.output
    stated = json.loads((place / "run/quarantine.json").read_text("utf-8"))
    assert len(stated) == 2


GENERATE: dict[str, tuple[list[str], str]] = {
    "no segmentation": (["--image", "a.png"], "for scenes --image and --seg"),
    "words": (["a chair"], "scenes take no prompt (`a chair`)"),
    "one of two": (["--image", "a.png", "--image", "a.png", "--seg", "s.png"], "the same number of --seg"),
    "no such picture": (["--image", "gone.png", "--seg", "s.png"], "gone.png"),
    "another size": (["--image", "a.png", "--seg", "small.png"], "small.png is 8x8, but a.png is 32x32"),
    "nothing seen": (["--image", "a.png", "--seg", "black.png"], "contains no object"),
    "a photo": (["--image", "a.png", "--seg", "noise.png"], "objects, more than 64: use a segmentation"),
    "an odd grid": (["--image", "a.png", "--seg", "s.png", "--grid", "100"], "not a power of two"),
    "one file for two": (
        ["--image", "a.png", "--seg", "s.png", "--count", "2", "-o", "x.glb"], "is one file for 2 scenes"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", GENERATE)
def test_generate_says_what_is_missing(name: str, place: Path) -> None:
    shutil.copy("scenes/s0/scene_rgb.png", "a.png")
    shutil.copy("scenes/s0/seg.png", "s.png")
    Image.fromarray(np.ones((8, 8), np.uint8)).save("small.png")
    Image.fromarray(np.zeros((32, 32), np.uint8)).save("black.png")
    noise = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(noise).save("noise.png")
    from inlaid import config
    from inlaid.runs.folder import Run

    run = Path("run")
    run.mkdir()
    config.save(config.load("recipe.yaml"), run / "config.yaml")
    assert Run(run).config().model.family == "midi"
    arguments, says = GENERATE[name]
    done = inlaid("generate", "run", *arguments, "--checkpoint", "base")
    assert (done.code, "Traceback" in done.output) == (2, False)
    assert says in done.output, done.output


RECIPES = {
    "frames": ("data.frames=9", "data.frames: applies only to videos"),
    "a caption": ("data.trigger=zorble", "data.trigger: applies only to videos"),
    "prompts": ("sample.prompts=[a chair]", "sample.prompts: applies only to videos"),
    "a column": ("data.sources=[{path: scenes, caption_column: text}]", "a source of scenes is a folder"),
    "no folder": ("data.sources=nowhere", "no such folder"),
    "a block that is not there": ("model.options={multi_instance: '7'}", "choose from blocks 0 to 4"),
    "a wrong option": ("model.options={image_dropout: 2}", "image_dropout: `2` is not one of"),
    "a wrong target": ("tuner.targets=[to_q]", "matches no linear or convolution layer"),
    "another checkpoint": ("model.checkpoint=scenes", "is not a diffusers folder"),
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_bad_recipe_is_refused(name: str, place: Path) -> None:
    change, says = RECIPES[name]
    done = inlaid("train", "recipe.yaml", change)
    assert (done.code, "Traceback" in done.output) == (2, False)
    assert says in done.output, done.output


def test_new_shows_a_bar_and_names_the_import_of_meshes(place: Path) -> None:
    done = inlaid("new", "midi", "scenes", "--checkpoint", "checkpoint", "--out", "new.yaml")
    assert done.code == 0 and "probe " in done.output and "3/3" in done.output, done.output
    (place / "models").mkdir()
    (place / "models/x.glb").write_bytes(b"x")
    refused = inlaid("new", "midi", "models", "--checkpoint", "checkpoint")
    assert refused.code == 2
    assert "it contains meshes: run `inlaid import meshes models SCENES`" in " ".join(refused.output.split())
