"""`inlaid check`: what it reports, writes and prints, for good recipes and bad ones."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from inlaid import config, families
from inlaid.check import check, estimate
from inlaid.check.check import Report
from inlaid.data import modality_video
from inlaid.media import video
from support import videos
from support.slow import slow


def printed(report: Report) -> str:
    """What a person sees."""
    out = io.StringIO()
    check.print_report(report, Console(file=out, width=140, color_system=None))
    return out.getvalue()


@pytest.fixture
def run(recipe: Any) -> Any:
    """A function that checks the small recipe with changes."""

    def make(**changes: Any) -> Report:
        return check.check_recipe(config.build(recipe(**changes)))

    return make


def test_a_good_recipe(run, tmp_path):
    report = run(data__validation=1, data__frames=[5, 9])
    assert report.ok
    assert report.problems == report.mistakes == []
    assert report.clips == 4
    (bucket,) = report.buckets
    assert tuple(bucket.extent) == (9, 32, 32)
    assert (bucket.train, bucket.validation, bucket.batches) == (3, 1, 3)
    assert report.buckets[0].latent == (16, 3, 4, 4)
    assert report.buckets[0].tokens == 12
    saved = json.loads((tmp_path / "run" / "check" / "report.json").read_text("utf-8"))
    assert saved == json.loads(report.to_json())
    assert saved["ok"] is True
    assert saved["sources"][0]["layout"] == "folder"
    assert saved["estimate"]["peak"] == sum(saved["estimate"]["memory"].values()) == report.estimate.peak
    text = printed(report)
    assert "ready to train: 0 errors, 0 warnings" in text
    assert "is read as folder: 4 clips, 4 with a .txt beside" in text
    assert "16 x 3 x 4 x 4" in text
    assert "6 steps are 2.0 epochs of 3 batches" in text
    assert "memory while training" in text
    assert "no validation clips" not in text
    assert not list((tmp_path / "run").glob("**/.tmp*"))


def test_copies_of_one_clip_are_the_reason_for_no_validation(run, make_clips):
    folder = make_clips(4)
    content = (folder / "00.mp4").read_bytes() if (folder / "00.mp4").exists() else None
    paths = sorted(folder.glob("*.mp4"))
    for path in paths:
        path.write_bytes(content or paths[0].read_bytes())
    report = run(data__sources=str(folder), data__validation=1)
    assert any("all 4 clips are copies of one, and copies stay on the same side" in n for n in report.notes)


def test_conversions_are_listed(run, make_clips):
    folder = make_clips(4)
    path = sorted(folder.glob("*.mp4"))[0]
    videos.write(path, 24, 16, (32, 64), trc=18)
    report = run(data__sources=str(folder))
    assert report.conversions == {path.name: "HLG (HDR) converted to sRGB"}
    assert f"HLG (HDR) converted to sRGB: 1 of 4 clips ({path.name})" in " ".join(printed(report).split())


def test_the_sheet_shows_the_frames_of_the_model(run, tmp_path, tiny_wan):
    folder = tmp_path / "clips"
    folder.mkdir()
    videos.write(folder / "a.mp4", 24, 24, (64, 96), draw=lambda k, s: videos.still(s, (10 * k, 0, 255)))
    (folder / "a.txt").write_text("a caption")
    report = run(data__validation=0, data__size=[64, 64])
    assert report.contact_sheet == str(tmp_path / "run" / "check" / "contact_sheet.png")
    sheet = np.asarray(Image.open(report.contact_sheet)).astype(int)
    blues = sheet[(sheet[..., 2] > 240) & (sheet[..., 1] < 15)]
    shown = video.read_frames(folder / "a.mp4", 3 / 16, 9, 16, (64, 64))
    for k in (0, 8):
        assert np.abs(blues[:, 0] - int(shown[k].mean((0, 1))[0])).min() <= 3
    strip = np.abs(sheet - (0, 0, 255))[..., 1:].sum(-1) < 30
    rows, columns = np.nonzero(strip)
    height = rows.max() - rows.min() + 1
    assert height == pytest.approx(sum(strip[rows.min()]) / 6, abs=3), "square crops of a wide clip"
    assert columns.max() < 1440


def test_errors_make_it_not_ready(run, make_clips, tmp_path):
    folder = make_clips(4)
    (folder / "00.txt").unlink()
    shutil.copy(folder / "01.mp4", folder / "02.mp4")
    (folder / "03.mp4").write_bytes((folder / "03.mp4").read_bytes()[:300])
    report = run(data__validation=0)
    assert not report.ok
    assert {p.code for p in report.problems} == {"no-caption", "duplicate", "truncated"}
    text = printed(report)
    assert "error: 1 of 4 clips has no caption (00.mp4): add a .txt beside each" in text
    assert "error: 1 of 4 clips is truncated (03.mp4" in text
    assert "warning: 1 of 4 clips is a copy (02.mp4: same content as 01.mp4)" in text
    assert "not ready: 2 errors, 1 warning\n" in text
    assert json.loads((tmp_path / "run" / "check" / "report.json").read_text("utf-8"))["ok"] is False


def test_warnings_alone_are_fine(run, make_clips):
    folder = make_clips(3)
    shutil.copy(folder / "01.mp4", folder / "02.mp4")
    report = run(data__validation=0)
    assert [p.severity for p in report.problems] == ["warning"]
    assert report.ok
    assert "ready to train: 0 errors, 1 warning\n" in printed(report)


def test_nothing_to_show(run, tmp_path):
    (tmp_path / "clips").mkdir()
    report = run()
    assert not report.ok
    assert (report.contact_sheet, report.estimate, report.buckets) == (None, None, [])
    assert "contains no clips" in printed(report)


def test_sizes_that_the_family_cannot_make(run):
    report = run(data__size=[30, 32], data__frames=10)
    assert not report.ok
    assert report.estimate is None
    assert any("10 frames is not 4n+1: use 9 or 13" in m for m in report.mistakes)
    assert "30x32 is not a multiple of 16: use 32x32" in printed(report)


def test_targets_that_match_nothing(run):
    report = run(tuner={"kind": "lora", "targets": ["proj_in"]})
    assert not report.ok
    assert "tuner.targets: `proj_in` matches no linear" in report.mistakes[0]
    assert report.buckets, "the rest is still stated"


def test_damage_that_only_reading_shows(run, make_clips):
    folder = make_clips(2, size=(64, 64), frames=40)
    frames = np.random.default_rng(0).integers(0, 256, (40, 64, 64, 3), dtype=np.uint8)
    np.savez(folder / "00.npz", frames=frames)
    (folder / "00.mp4").unlink()
    raw = bytearray((folder / "00.npz").read_bytes())
    raw[len(raw) // 2] ^= 255
    (folder / "00.npz").write_bytes(raw)
    report = run(data__validation=0)
    assert [(p.code, p.name) for p in report.problems] == [("truncated", "00.npz")]
    assert not report.ok
    assert report.contact_sheet, "the others are drawn"


def test_only_some_windows_are_shown(run, make_clips, monkeypatch):
    make_clips(7)
    drawn: list[str] = []
    monkeypatch.setattr(check, "ROWS", 3)
    monkeypatch.setattr(
        modality_video, "contact_sheet", lambda rows, *a, **k: drawn.extend(r.label for r in rows)
    )
    run(data__validation=0)
    assert drawn == ["00.mp4", "02.mp4", "04.mp4"]


def test_notes_on_what_is_right_but_surprising(run, tmp_path):
    folder = tmp_path / "clips"
    folder.mkdir()
    for k in range(3):
        videos.write(folder / f"{k}.mp4", 12 + k, 16, (32, 32))
        (folder / f"{k}.txt").write_text("x")
    notes = run(data__validation=0.1).notes
    assert any("no validation clips (there are only 3 clips)" in n for n in notes)
    assert any("3 of 3 files do not specify a color matrix" in n for n in notes)
    assert any("data.validation is 0" in n for n in run(data__validation=0).notes)
    assert not any("no validation clips" in n for n in run(data__validation=1).notes)


def test_a_device_that_is_not_here(run):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    report = run(runtime={"device": "cuda"})
    assert report.ok, "the data is fine; training elsewhere is too"
    assert report.estimate.seconds is None
    assert report.estimate.precision == "bfloat16"
    assert any("no `cuda` on this machine" in n for n in report.notes)


def test_too_little_memory_says_what_helps(run, monkeypatch):
    monkeypatch.setattr(estimate, "describe_device", lambda device: ("a small GPU", 1_000_000))
    notes = run(memory={"gradient_checkpointing": False}, train__batch=2, tuner={"kind": "full"}).notes
    (note,) = [n for n in notes if "a small GPU" in n]
    for way in ("gradient_checkpointing=true", "lower train.batch", "tuner.kind=lora", "smaller data.size"):
        assert way in note
    monkeypatch.setattr(estimate, "describe_device", lambda device: ("a big GPU", 10**12))
    assert not [n for n in run().notes if "big GPU" in n]


def test_no_weights_are_read(run, tiny_wan, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(tiny_wan, bare, ignore=shutil.ignore_patterns("*.safetensors", "tokenizer*"))
    assert not list(bare.glob("**/*.safetensors"))
    assert run(model={"family": "wan", "checkpoint": str(bare)}).ok


@pytest.mark.parametrize("variant", ["tiny_a14b", slow("tiny_5b")])
def test_other_networks_of_the_family(run, request, variant):
    folder = request.getfixturevalue(variant)
    expert = {"expert": "high"} if variant == "tiny_a14b" else {}
    report = run(model={"family": "wan", "checkpoint": str(folder), **expert})
    assert report.ok
    assert report.estimate.peak > 0


@pytest.mark.parametrize(
    ("n", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1500, "1.5 KB"),
        (25_300_000, "25.3 MB"),
        (13.5e9, "13.5 GB"),
        (4.1e12, "4,100.0 GB"),
    ],
)
def test_bytes_for_people(n, text):
    assert check.size_text(n) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0421, "42 ms"), (3.21, "3.2 s"), (150, "2 min"), (7200, "2.0 h"), (1e7, "2,777.8 h")],
)
def test_times_for_people(seconds, text):
    assert check._time(seconds) == text


def test_time_is_printed_when_known(run):
    report = run(train__accumulate=3000)
    text = printed(report)
    assert "one step" in text
    assert "all 6 steps" in text


def test_real_folder(media_root: Path, tmp_path, tiny_wan):
    made = config.build(
        {
            "run": str(tmp_path / "run"),
            "model": {"family": "wan", "checkpoint": str(tiny_wan)},
            "data": {"sources": str(media_root / "press"), "size": [480, 832], "frames": 81},
            "memory": {"gradient_checkpointing": True},
        }
    )
    report = check.check_recipe(made)
    assert report.ok
    assert [b.tokens for b in report.buckets] == [21 * 30 * 52]
    assert report.estimate.cache["clips"] == 2 * 2 * 16 * 21 * 60 * 104
    assert Image.open(report.contact_sheet).size[0] == 1440


def test_families_are_asked_not_named(run, monkeypatch):
    class Refusing(families.get("wan")):
        def problems(self, config: Any) -> list[str]:
            return ["no"]

    monkeypatch.setattr(families, "get", lambda name: Refusing)
    assert run().mistakes == ["no"]
