"""Warnings about settings that are valid but unlikely to be meant, in `check` and `train`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import nn

from inlaid import config
from inlaid.training.cautions import cautions, length_cautions

RAW = {
    "run": "run",
    "model": {"family": "wan", "checkpoint": "tiny:wan"},
    "data": {"sources": "clips", "frames": [1]},
}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow, self.conv = nn.Linear(64, 64), nn.Linear(64, 8), nn.Conv3d(2, 16, 2)


CASES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "usual": ({"tuner": {"rank": 8}}, []),
    "prodigy at its default": ({"optim": {"name": "prodigy"}}, []),
    "prodigy at a usual rate": (
        {"optim": {"name": "prodigy", "lr": 1e-4}},
        ["optim.lr: 0.0001 scales the rate"],
    ),
    "warm-up over the run": (
        {"optim": {"warmup": 500}, "train": {"steps": 500}},
        ["optim.warmup: 500 of 500 steps"],
    ),
    "rank over a width": (
        {"tuner": {"rank": 32}},
        ["tuner.rank: 32 is over the width of 2 of 3 layers (least 8, narrow)"],
    ),
    "rank of DoRA": ({"tuner": {"kind": "dora", "rank": 100}}, ["over the width of 3 of 3 layers"]),
    "full has no rank": ({"tuner": {"kind": "full"}}, []),
    "fewer steps than done": (
        {"train": {"steps": 100}},
        ["train.steps: 100, but run is trained for 250 steps"],
    ),
    "fewer epochs than done": (
        {"train": {"epochs": 2}},
        ["train.epochs: 2, 5 steps, but run is trained for 250 steps"],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_cautions(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    changes, words = CASES[case]
    if "done" in case:
        Path("run/checkpoints/step-000250").mkdir(parents=True)
    made = config.build({**RAW, "tuner": {"rank": 8}, **changes})
    if "rank" in changes.get("tuner", {}) or made.tuner.kind == "lora":
        found = cautions(made, Net(), ["wide", "narrow", "conv"])
    else:
        found = cautions(made, Net(), ["wide.weight"])
    found = [*found, *length_cautions(made, made.train.steps or 5)]
    assert len(found) == len(words), found
    for line, word in zip(found, words, strict=True):
        assert word in line


def test_prodigy_has_a_rate_of_1_in_every_family_and_keeps_another() -> None:
    for family in ("wan", "midi"):
        raw = config.merge(RAW, {"model": {"family": family}})
        assert config.build(raw, ["optim.name=prodigy"]).optim.lr == 1
        assert config.build(raw, ["optim.name=prodigy", "optim.lr=0.5"]).optim.lr == 0.5
        assert config.build(raw).optim.lr < 1
