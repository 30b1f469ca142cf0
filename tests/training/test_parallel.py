"""Two processes that share the weights do what one does alone, and go on from each other's checkpoints."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from inlaid import config
from inlaid.training import parallel
from inlaid.training.loop import train
from support.contract import FIRST
from support.ranks import difference, launch, together, torchrun, validation
from support.slow import slow

EVERYTHING = {
    "train__validate_every": 3,
    "train__log_every": 1,
    "train__save_every": 3,
    "train__batch": 1,
    "data__validation": 3,
    "data__caption_dropout": 0.3,
    "optim__lr": 1e-3,
    "optim__ema": 0.9,
    "optim__clip": 0.05,
    "optim__warmup": 2,
    "sample__every": 3,
}
"""Clipping that clips, an average, more validation clips than processes, samples."""


@pytest.mark.parametrize("mode", ["fsdp", slow("zero2"), slow("zero3")])
@pytest.mark.parametrize(("kind", "recompute"), [slow("lora", True), slow("dora", False), slow("full", True)])
def test_equals_one_process_and_goes_on_in_the_other(
    recipe: Callable[..., dict],
    make_clips: Callable[..., Path],
    tmp_path: Path,
    mode: str,
    kind: str,
    recompute: bool,
) -> None:
    if mode != "fsdp":
        pytest.importorskip("deepspeed")
    make_clips(8)
    same = {**EVERYTHING, "tuner": {"kind": kind}, "memory": {"gradient_checkpointing": recompute}}
    raw = recipe(run=str(tmp_path / "alone"), train__steps=6, **same)
    raw["train"]["accumulate"] = 4
    alone = train(config.build(raw))

    raw = {**raw, "run": str(tmp_path / "shared")}
    shared = together(raw, tmp_path / "a.yaml", mode, "train.steps=3", "train.accumulate=2")
    figures = {"shared from the start": difference(shared, alone, 3)}
    assert len(list((shared / "samples/step-000003").glob("*.mp4"))) == 1
    assert train(config.build(raw)) == shared
    figures["then alone"] = difference(shared, alone, 6)
    assert validation(shared) == pytest.approx(validation(alone), rel=1e-5)

    raw = {**raw, "run": str(tmp_path / "begun")}
    shutil.copytree(alone, tmp_path / "begun", ignore=shutil.ignore_patterns("step-000006", "adapter"))
    place = "checkpoints/step-000003"
    shutil.copytree(alone / place, tmp_path / "begun" / place, dirs_exist_ok=True)
    begun = together(
        raw, tmp_path / "b.yaml", mode, "train.accumulate=2", start=torchrun if kind == "lora" else launch
    )
    figures["alone, then shared"] = difference(begun, alone, 6)
    print(mode, kind, {k: f"{v:.1e}" for k, v in figures.items()})
    assert max(figures.values()) < 1e-5
    assert validation(begun) == pytest.approx(validation(alone), rel=1e-5)
    assert {p.name for p in (begun / "adapter").iterdir()} == {p.name for p in (alone / "adapter").iterdir()}


@pytest.mark.parametrize(
    ("case", "mode"),
    [
        *((c, "fsdp") if c[0] == "cogvideox" else slow(c, "fsdp") for c in FIRST if c[0] != "wan"),
        *(slow(c, "ddp") for c in FIRST if c[0] != "wan"),
    ],
    ids=lambda x: x if isinstance(x, str) else "-".join(x),
)
def test_every_family_shared_is_the_family_alone(
    case: tuple[str, str],
    mode: str,
    contract_recipe: Callable[..., dict],
    tmp_path: Path,
) -> None:
    raw = contract_recipe(case, run=str(tmp_path / "alone"), train__steps=2, optim__lr=1e-3)
    alone = train(config.build({**raw, "train": {**raw["train"], "accumulate": 2}}))
    shared = together({**raw, "run": str(tmp_path / "shared")}, tmp_path / "a.yaml", mode)
    assert difference(shared, alone, 2) < 1e-5
    assert validation(shared) == pytest.approx(validation(alone), rel=1e-5)


def test_reductions_are_cut_into_parts_that_cover_everything_once() -> None:
    parameters = [nn.Parameter(torch.zeros(n)) for n in (3, 5, 1, 20, 2, 2)]
    parts = [[p.numel() for p in part] for part in parallel.group_tensors(parameters, most=8)]
    assert parts == [[3, 5], [1], [20], [2, 2]]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"runtime__parallel": "fsdp"},
            r"fsdp needs several processes, this launch has one: .*torchrun",
        ),
        (
            {"runtime__parallel": "fsdp", "optim__name": "adamw8bit"},
            r"optim\.name: adamw8bit does not support sharded",
        ),
        ({"runtime": {"parallel": "fsdp", "compile": True}}, r"runtime\.compile: not supported with .*fsdp"),
        (
            {"runtime": {"parallel": "zero3", "precision": "bfloat16"}, "tuner": {"kind": "full"}},
            r"runtime\.precision: full fine-tuning with zero3 needs float32 .* use fsdp",
        ),
    ],
)
def test_what_sharding_does_not_do_is_refused_at_the_start(
    recipe: Callable[..., dict], tmp_path: Path, changes: dict, says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        train(config.build(recipe(**changes)))
    assert not (tmp_path / "run").exists()
