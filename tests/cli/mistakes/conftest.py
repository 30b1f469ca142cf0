"""Fixtures of several files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from inlaid.media import video
from support.commands import files, inlaid
from support.ground import Ground


@pytest.fixture(scope="module")
def ground(tiny_wan: Path, tmp_path_factory: pytest.TempPathFactory) -> Ground:
    folder = tmp_path_factory.mktemp("ground")
    (folder / "clips").mkdir()
    for i in range(3):
        pixels = np.random.default_rng(i).integers(0, 255, (9, 32, 32, 3), dtype=np.uint8)
        video.write_video(folder / "clips" / f"{i}.mp4", pixels, 16)
        (folder / "clips" / f"{i}.txt").write_text(f"clip number {i}", "utf-8")
    made = Ground(folder / "clips", folder / "cache", tiny_wan, folder / "run")
    (folder / "r.yaml").write_text(json.dumps(made.recipe(run=str(made.run))), "utf-8")
    assert inlaid("train", folder / "r.yaml").code == 0
    return made


@pytest.fixture(autouse=True)
def here(ground: Ground, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Each test works in an empty folder, leaves no temporary file, and leaves the ground as it was."""
    monkeypatch.chdir(tmp_path)
    kept = (ground.clips, ground.cache / "media", ground.run)
    before = [files(folder) for folder in kept]
    yield tmp_path
    assert not list(tmp_path.rglob(".tmp-*"))
    assert [files(folder) for folder in kept] == before
