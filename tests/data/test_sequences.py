"""Image sequences in one folder, grouped by name, and their frame rate."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from inlaid import config
from inlaid.alpha.opening import build_family
from inlaid.data.layouts import find_clips
from inlaid.data.plan import Plan, plan_dataset
from inlaid.families.base import PrecomputedLayout
from inlaid.families.grid import Grid
from support import rgba_clips as make
from support import videos

SIZE = (32, 64)
GRID = Grid(16, 4)


def frames(folder: Path, name: str, count: int = 12, first: int = 1001, offset: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for k in range(count):
        Image.fromarray(videos.numbered(k + offset, SIZE)).save(folder / name.format(first + k))


def plan(source: object, **data: object) -> Plan:
    raw = {"sources": source, "size": list(SIZE), "frames": [9], "validation": 0, **data}
    return plan_dataset(config.Data.model_validate(raw), GRID, 16, 0)


def names(made: Plan) -> list[tuple[str, str, str]]:
    return [(c.name, c.caption, c.kind) for c in made.clips]


@pytest.mark.parametrize(
    ("first", "second"),
    [("a.{}.png", "b.{}.png"), ("walk_{:06d}.jpg", "run_{:06d}.jpg"), ("x{}.tif", "y{}.PNG")],
)
@pytest.mark.parametrize("where", ["", "deep"])
def test_two_sequences_of_a_folder_are_two_clips(tmp_path: Path, first: str, second: str, where: str) -> None:
    root, folder = tmp_path / "d", tmp_path / "d" / where
    frames(folder, first)
    frames(folder, second, 10, 95, offset=100)
    for name in (first, second):
        stem = name.partition("{")[0].rstrip("._")
        (folder / f"{stem}.txt").write_text(f"about {stem}")
    made = plan(str(root))
    found = sorted(c.caption for c in made.clips)
    assert found == sorted(f"about {n.partition('{')[0].rstrip('._')}" for n in (first, second))
    assert not made.errors and all("#" in c.name and c.kind == "frames" for c in made.clips)
    by_name = {w.clip.caption: w for w in made.train}
    stem = first.partition("{")[0].rstrip("._")
    assert videos.numbers(by_name[f"about {stem}"].read()) == list(range(1, 10)), "the middle of 12"
    other = second.partition("{")[0].rstrip("._")
    assert videos.numbers(by_name[f"about {other}"].read()) == list(range(100, 109)), "natural order over 99"


def test_sequences_without_captions_are_named_once(tmp_path: Path) -> None:
    frames(tmp_path / "d", "a.{}.png")
    frames(tmp_path / "d", "b.{}.png")
    made = plan(str(tmp_path / "d"))
    assert [(p.code, p.name) for p in made.errors] == [
        ("no-caption", "a.####.png"),
        ("no-caption", "b.####.png"),
    ]


def test_images_with_captions_and_photos_stay_images(tmp_path: Path) -> None:
    frames(tmp_path / "d", "cat_{}.png", 3, 1)
    for file in list((tmp_path / "d").iterdir()):
        file.with_suffix(".txt").write_text("a cat")
    made = plan(str(tmp_path / "d"), frames=[1])
    assert [c.kind for c in made.clips] == ["image"] * 3 and not made.errors
    frames(tmp_path / "p", "IMG_{}.jpg", 3)
    assert len(plan(str(tmp_path / "p"), frames=[1]).errors) == 3
    frames(tmp_path / "n", "{:04d}.png", 3)
    assert len(plan(str(tmp_path / "n"), frames=[1]).errors) == 3, "no name to group by"


def test_gaps_and_a_manifest(tmp_path: Path) -> None:
    frames(tmp_path / "d", "a.{}.png")
    (tmp_path / "d/a.1005.png").unlink()
    (tmp_path / "d/m.jsonl").write_text(json.dumps({"video": "a.####.png", "caption": "a"}))
    made = plan(str(tmp_path / "d/m.jsonl"))
    assert names(made) == [("a.####.png", "a", "frames")]
    assert [p.code for p in made.problems] == ["gaps"] and len(made.clips[0].files) == 11


def test_a_file_whose_name_has_a_hash_is_a_file(tmp_path: Path) -> None:
    frames(tmp_path / "d", "a#{}.png", 1, 1)
    (tmp_path / "d/a#1.txt").write_text("one")
    assert names(plan(str(tmp_path / "d"), frames=[1])) == [("a#1.png", "one", "image")]


def test_frames_outside_of_the_root_are_refused(tmp_path: Path) -> None:
    frames(tmp_path / "d", "a.{}.png")
    frames(tmp_path / "elsewhere", "a.{}.png", 1, 1012)
    (tmp_path / "d/a.1013.png").symlink_to(tmp_path / "elsewhere/a.1012.png")
    (tmp_path / "d/a.txt").write_text("a")
    made = plan(str(tmp_path / "d"))
    assert [p.code for p in made.errors] == ["outside"] and not made.train


def test_color_and_alpha_side_by_side_are_a_pair(tmp_path: Path, tiny_wan: Path) -> None:
    (tmp_path / "d").mkdir()
    clip = make.clip(size=(32, 32))
    for k, pixels in enumerate(clip):
        Image.fromarray(pixels[..., :3]).save(tmp_path / f"d/shot_rgb.{1001 + k}.png")
        Image.fromarray(pixels[..., 3]).save(tmp_path / f"d/shot_alpha.{1001 + k}.png")
    (tmp_path / "d/shot.txt").write_text("a shot")
    model = {"family": "wan", "checkpoint": str(tiny_wan)}
    raw = {"run": "r", "model": model, "data": {"sources": str(tmp_path / "d")}, "alpha": {"kind": "joint"}}
    family = build_family(config.build(raw))
    data = config.Data.model_validate(
        {"sources": str(tmp_path / "d"), "size": [32, 32], "frames": [9], "validation": 0}
    )
    made = plan_dataset(data, family.grid, 16, 0, family=family)
    assert names(made) == [("shot_rgb.####.png", "a shot", "frames")] and not made.errors
    there = made.train[0].read()
    assert np.array_equal(there[..., 3], clip[..., 3])


@pytest.mark.parametrize("folder", [False, True])
def test_the_rate_of_a_sequence_can_be_set(tmp_path: Path, folder: bool) -> None:
    frames(tmp_path / "d" / ("a" if folder else ""), "a.{}.png", 36)
    (tmp_path / "d/a.txt").write_text("a")
    source = {"path": str(tmp_path / "d"), "fps": 24}
    made = plan(source, frames=[21])
    at = round(made.train[0].start * 24, 6)
    assert videos.numbers(made.train[0].read()) == [int(at + k * 1.5 + 0.499) for k in range(21)]
    assert made.sources[0].seconds == pytest.approx(1.5)
    assert plan(str(tmp_path / "d"), frames=[21]).train[0].key != made.train[0].key
    assert [p.code for p in plan(source, frames=[25]).errors] == ["too-short"], "1.5 s at 16 fps"


def test_a_manifest_beside_clips_is_not_ambiguous_where_latents_could_be(tmp_path: Path) -> None:
    """Families that read precomputed latents, such as Mochi, look for them in the same folder."""
    (tmp_path / "d").mkdir()
    np.savez(tmp_path / "d/a.npz", frames=np.zeros((9, *SIZE, 3), np.uint8), fps=np.float32(16))
    (tmp_path / "d/train.jsonl").write_text(json.dumps({"video": "a.npz", "prompt": "a"}))
    for patterns in (None, PrecomputedLayout(("*.latent.pt",), "*.embed.pt")):
        found = find_clips(config.Source(path=str(tmp_path / "d")), 0, patterns, 3)
        assert (found.layout, [c.name for c in found.clips], found.problems) == ("jsonl", ["a.npz"], [])
