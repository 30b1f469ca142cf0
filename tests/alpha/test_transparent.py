"""Transparent runs from end to end, on a family that is transparent and learns nothing of it."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from inlaid import config
from inlaid.alpha import opening
from inlaid.check import check
from inlaid.data.modality import modality_of
from inlaid.evaluation.evaluate import Prompt, evaluate
from inlaid.evaluation.metrics import alpha as alpha_metrics
from inlaid.evaluation.metrics import video as video_metrics
from inlaid.evaluation.report import summary_table
from inlaid.generation.generate import outputs
from inlaid.media import compositing, rgba, video
from inlaid.media.rgba import CARRIERS
from inlaid.training.loop import train
from support import commands
from support import rgba_clips as make


@pytest.fixture
def raw(recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """A function that gives a small transparent recipe, with changes."""
    monkeypatch.setattr(opening, "COMPOSED", {config.Joint: make.Glass})
    return lambda **changes: make.transparent(recipe(**changes), tmp_path / "rgba_clips")


def test_check_shows_what_alpha_is_like(raw: Any, tmp_path: Path) -> None:
    report = check.check_recipe(config.build(raw()))
    assert (
        report.ok and report.problems == [] and list(report.alphas) == [f"{i:02d}_rgb.mkv" for i in range(4)]
    )
    saved = json.loads((tmp_path / "run/check/report.json").read_text("utf-8"))
    found = saved["alphas"]["00_rgb.mkv"]
    assert 0.1 < found["coverage"] < 0.6 and found["soft"] > 0.05 and found["residue"] == 0
    out = io.StringIO()
    check.print_report(report, Console(file=out, width=140, color_system=None))
    text = " ".join(out.getvalue().split())
    assert "coverage soft residue color where transparent range looks" in text
    assert f"00_rgb.mkv {found['coverage']:.1%}" in text and "0-255 straight" in text and "all 4" in text
    sheet = np.asarray(Image.open(report.contact_sheet or "").convert("RGB"))
    board = [int((sheet == level).all(-1).sum()) for level in (204, 255)]
    assert min(board) > 1000, "clear pixels show the checkerboard"


def test_check_names_what_is_wrong_with_alpha(raw: Any, tmp_path: Path) -> None:
    pixels = make.clip(size=(32, 32))
    section = raw()
    make.video(tmp_path / "rgba_clips/01_alpha.mkv", pixels[:-1, ..., 3:])
    (tmp_path / "rgba_clips/02_alpha.mkv").unlink()
    report = check.check_recipe(config.build(section))
    assert not report.ok
    out = io.StringIO()
    check.print_report(report, Console(file=out, width=140, color_system=None))
    text = " ".join(out.getvalue().split())
    assert "1 of 4 clips does not match its alpha matte (01_rgb.mkv: 9 frames and 8 in 01_alpha.mkv)" in text
    assert "1 of 4 clips has no alpha (02_rgb.mkv: no alpha channel (ffv1 bgr0)" in text


@pytest.fixture
def trained(raw: Any) -> Path:
    """A run that was trained for two steps and drew samples on the way."""
    changes = {"train__steps": 2, "train__save_every": 2, "sample__every": 2}
    section = raw(**changes)
    section["train"] |= {"validate_every": 2}
    return train(config.build(section))


def test_a_transparent_run_from_training_to_the_report(trained: Path) -> None:
    """One test, because training is what takes its time."""
    samples = sorted(p.name for p in (trained / "samples/step-000002").iterdir())
    ends = [".json", ".mov", ".mp4", ".webm", "_alpha.mp4", "_rgb.mp4"]
    assert samples == [f"00-clip-number-1-seed42{end}" for end in ends]
    about = json.loads((trained / "samples/step-000002" / samples[0]).read_text("utf-8"))
    assert about["files"] == [samples[i] for i in (1, 3, 5, 4)] and about["premultiplied"] == [samples[5]]
    straight, *pair = (trained / "samples/step-000002" / samples[i] for i in (1, 5, 4))
    white = np.uint8([255, 255, 255])
    over = compositing.composite(rgba.read_rgba(straight), white).astype(int)
    both = compositing.composite(rgba.read_pair(*pair), white, premultiplied=True)
    assert np.abs(both - over).mean() <= 1.5, "the pair is the straight video, multiplied"

    made = commands.inlaid("generate", trained, "a disc", "--transparent", "png,mov,webm,apng,mkv")
    assert made.code == 0, made.output
    files = [Path(line) for line in made.out.split()]
    assert [f.suffix for f in files] == [".zip", ".mov", ".webm", ".apng", ".mkv", ".mp4"]
    first = rgba.read_rgba(files[0])
    assert first.shape == (9, 32, 32, 4) and first[..., 3].min() < 20 and first[..., 3].max() > 235
    for file in files[1:-1]:
        there = rgba.read_rgba(file)
        limit = CARRIERS[file.suffix]
        assert np.abs(there[..., 3].astype(int) - first[..., 3]).mean() <= limit
    about = json.loads(files[-1].with_suffix(".json").read_text("utf-8"))
    assert about["alpha"] == "straight" and about["files"] == [f.name for f in files[:-1]]
    preview = video.read_frames(files[-1], 0, 9, about["fps"], (32, 32)).astype(int)
    over = compositing.composite(first, compositing.checkerboard(32, 32))
    assert np.abs(preview - over).mean() < 8, "the mp4 shows it over a checkerboard"

    shapes = []

    def yes(frames: np.ndarray) -> bool:
        shapes.append(frames.shape)
        return True

    def truth(frames: np.ndarray) -> np.ndarray:
        return frames[..., 3]

    prompts = [Prompt("a disc", "discs", judge=yes, truth=truth)]
    report = evaluate(trained, prompts=prompts)
    assert shapes == [(9, 32, 32, 4)] * 2, "judges see alpha"
    assert list(report.metrics) == [*video_metrics.METRICS, *alpha_metrics.METRICS, *alpha_metrics.TRUTH]
    assert report.pairs[0].tuned.metrics["alpha_error"] == 0
    assert report.training and 10 < report.training["coverage"] < 60
    page = report.path.read_text("utf-8")
    assert "Alpha flicker" in page and "checkerboard" in page and "Edge agreement" in page
    assert {p.suffix for p in (trained / "report/tuned").iterdir()} == {
        ".json",
        ".mov",
        ".mp4",
        ".png",
        ".webm",
    }
    out = io.StringIO()
    Console(file=out, width=80, color_system=None).print(summary_table(report))
    assert all(len(line) <= 80 for line in out.getvalue().splitlines())
    assert "a.flick" in out.getvalue() and "haze" in out.getvalue()


def test_what_has_no_matte_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    frames = make.clip(size=(32, 32))
    frames[..., 3] = 255
    path, facts = modality_of("video").write(tmp_path / "a", frames, config.Sample(transparent=["png"]), 16)
    path.with_suffix(".json").write_text(json.dumps(facts), "utf-8")
    assert "a.mp4: alpha is constant (opaque): the model generated no alpha" in capsys.readouterr().err
    assert outputs(tmp_path / "a.mp4") == [tmp_path / "a.zip", tmp_path / "a.mp4"]


def test_opaque_videos_are_written_as_before(tmp_path: Path) -> None:
    frames = make.clip(size=(32, 32))[..., :3]
    made = modality_of("video").write(tmp_path / "a", frames, config.Sample(transparent=["mov"]), 16)
    assert made == (tmp_path / "a.mp4", {})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.mp4"]


def test_matte_options_need_a_transparent_run(recipe: Any, raw: Any) -> None:
    options = {"data__matte": {"snap": 2}}
    report = check.check_recipe(config.build(recipe(**options)))
    assert [m for m in report.mistakes if "data.matte: an opaque run" in m] and not report.ok
    assert check.check_recipe(config.build(raw(**options))).ok
