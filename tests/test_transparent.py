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

import cutout_clips as make
from inlay import alpha, check, config


@pytest.fixture
def raw(recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """A function that gives a small transparent recipe, with changes."""
    monkeypatch.setattr(alpha, "MIXINS", {"joint": make.Glass})
    return lambda **changes: make.transparent(recipe(**changes), tmp_path / "cutouts")


def test_check_shows_what_alpha_is_like(raw: Any, tmp_path: Path) -> None:
    report = check.check(config.build(raw()))
    assert (
        report.ok and report.problems == [] and list(report.alphas) == [f"{i:02d}_rgb.mkv" for i in range(4)]
    )
    saved = json.loads((tmp_path / "run/check/report.json").read_text("utf-8"))
    found = saved["alphas"]["00_rgb.mkv"]
    assert 0.1 < found["coverage"] < 0.6 and found["soft"] > 0.05 and found["residue"] == 0
    out = io.StringIO()
    check.print_report(report, Console(file=out, width=140, color_system=None))
    text = " ".join(out.getvalue().split())
    assert "coverage soft residue colour under clear range looks" in text
    assert f"00_rgb.mkv {found['coverage']:.1%}" in text and "0-255 straight" in text and "all 4" in text
    sheet = np.asarray(Image.open(report.contact_sheet or "").convert("RGB"))
    board = [int((sheet == level).all(-1).sum()) for level in (204, 255)]
    assert min(board) > 1000, "clear pixels show the checkerboard"


def test_check_names_what_is_wrong_with_alpha(raw: Any, tmp_path: Path) -> None:
    pixels = make.clip(size=(32, 32))
    section = raw()
    make.video(tmp_path / "cutouts/01_alpha.mkv", pixels[:-1, ..., 3:])
    (tmp_path / "cutouts/02_alpha.mkv").unlink()
    report = check.check(config.build(section))
    assert not report.ok
    out = io.StringIO()
    check.print_report(report, Console(file=out, width=140, color_system=None))
    text = " ".join(out.getvalue().split())
    assert "1 of 4 clips does not match its matte (01_rgb.mkv: 9 frames and 8 in 01_alpha.mkv)" in text
    assert "1 of 4 clips has no alpha (02_rgb.mkv: no alpha channel in it (ffv1 bgr0)" in text
