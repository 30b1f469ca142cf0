"""Fixtures of several files."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from support import videos
from support.sources import SIZE


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    """A folder with three good clips, each with its caption, of different content."""
    folder = tmp_path / "clips"
    folder.mkdir()
    for i, name in enumerate(["a", "b.final", "c"]):
        videos.write(folder / f"{name}.mp4", 12 + i, 16, SIZE)
        (folder / f"{name}.txt").write_text(f"caption {name}\n", "utf-8")
    return folder


@pytest.fixture
def many(tmp_path: Path) -> Path:
    """Twelve clips, among them three copies of one."""
    folder = tmp_path / "many"
    folder.mkdir()
    for i in range(12):
        name = folder / f"{i:02d}.mp4"
        if i in (4, 9):
            shutil.copy(folder / "01.mp4", name)
        else:
            videos.write(name, 30 + i, 16, SIZE)
        name.with_suffix(".txt").write_text(f"clip {i}")
    return folder
