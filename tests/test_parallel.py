"""Two processes that share the weights do what one does alone, and go on from each other's checkpoints."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from inlaid import config, parallel, runtime
from inlaid.train import train
from test_contract import FIRST, contract_recipe  # noqa: F401 - a fixture

EVERYTHING = {
    "train__validate_every": 3,
    "train__log_every": 1,
    "train__save_every": 3,
    "train__batch": 1,
    "data__held_out": 3,
    "data__caption_dropout": 0.3,
    "optim__lr": 1e-3,
    "optim__ema": 0.9,
    "optim__clip": 0.05,
    "optim__warmup": 2,
    "sample__every": 3,
}
"""Clipping that clips, an average, more held-out clips than processes, samples."""


def together(raw: dict, path: Path, mode: str, *overrides: str) -> Path:
    """Trains a recipe with two processes."""
    path.write_text(json.dumps(raw), "utf-8")  # JSON is YAML
    launch = ["--standalone", "--nproc-per-node", "2"]  # on a free port
    words = [str(path), f"runtime.parallel={mode}", *overrides]
    command = [sys.executable, "-m", "torch.distributed.run", *launch, "-m", "inlaid", "train", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    return Path(raw["run"])


def difference(a: Path, b: Path, step: int) -> float:
    """The largest relative difference of what two checkpoints hold: weights, average, each moment, adapter.

    Over all tensors of a kind together. A tensor alone may differ more where its gradient nearly cancels:
    Adam divides a difference of 1e-12 by as small a root.
    """
    gaps: dict[str, list[torch.Tensor]] = {}
    place = f"checkpoints/step-{step:06d}"
    files = [p.relative_to(a / place) for p in (a / place).rglob("*.safetensors")]
    assert len(files) == 2 + any(f.name == "domain_embedding.safetensors" for f in files)
    for file in files:
        x, y = (load_file(r / place / file) for r in (a, b))
        assert x.keys() == y.keys() and x
        for key in x:
            assert x[key].dtype == y[key].dtype and x[key].shape == y[key].shape, key
            kind = key.split(".")[-1 if key.startswith("optimizer") else 0]
            total = gaps.setdefault(f"{file.name} {kind}", [])
            total.append(torch.stack([(x[key].double() - y[key].double()).norm(), y[key].double().norm()]))
    sums = {kind: torch.stack(pairs).square().sum(0).sqrt() for kind, pairs in gaps.items()}
    return max(float(gap / size.clamp(min=1e-12)) for gap, size in sums.values())


def held_out(run: Path) -> dict[int, float]:
    lines = runtime.read_metrics(run / "metrics.jsonl")
    return {int(x["step"]): x["held_out_loss"] for x in lines if "held_out_loss" in x}


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["fsdp", "zero2", "zero3"])
@pytest.mark.parametrize(("kind", "recompute"), [("lora", True), ("dora", False), ("full", True)])
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
    assert held_out(shared) == pytest.approx(held_out(alone), rel=1e-5)

    raw = {**raw, "run": str(tmp_path / "begun")}
    shutil.copytree(alone, tmp_path / "begun", ignore=shutil.ignore_patterns("step-000006", "adapter"))
    place = "checkpoints/step-000003"
    shutil.copytree(alone / place, tmp_path / "begun" / place, dirs_exist_ok=True)
    begun = together(raw, tmp_path / "b.yaml", mode, "train.accumulate=2")
    figures["alone, then shared"] = difference(begun, alone, 6)
    print(mode, kind, {k: f"{v:.1e}" for k, v in figures.items()})
    assert max(figures.values()) < 1e-5
    assert held_out(begun) == pytest.approx(held_out(alone), rel=1e-5)
    assert {p.name for p in (begun / "adapter").iterdir()} == {p.name for p in (alone / "adapter").iterdir()}


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
@pytest.mark.parametrize("case", [c for c in FIRST if c[0] != "wan"], ids="-".join)
def test_every_family_shared_is_the_family_alone(
    case: tuple[str, str],
    mode: str,
    contract_recipe: Callable[..., dict],  # noqa: F811
    tmp_path: Path,
) -> None:
    raw = contract_recipe(case, run=str(tmp_path / "alone"), train__steps=2, optim__lr=1e-3)
    alone = train(config.build({**raw, "train": {**raw["train"], "accumulate": 2}}))
    shared = together({**raw, "run": str(tmp_path / "shared")}, tmp_path / "a.yaml", mode)
    assert difference(shared, alone, 2) < 1e-5
    assert held_out(shared) == pytest.approx(held_out(alone), rel=1e-5)


def test_reductions_are_cut_into_parts_that_cover_everything_once() -> None:
    parameters = [nn.Parameter(torch.zeros(n)) for n in (3, 5, 1, 20, 2, 2)]
    parts = [[p.numel() for p in part] for part in parallel.parts(parameters, most=8)]
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
