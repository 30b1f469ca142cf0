"""Joint transparency through the whole job: what every family owes with transparent clips."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from inlaid import config
from inlaid.adapters import tuners
from inlaid.adapters.convert import export_run
from inlaid.adapters.efficient_layers import ADAPTER
from inlaid.adapters.of_run import trained_folder
from inlaid.alpha.joint import WEIGHTS
from inlaid.alpha.opening import build_family
from inlaid.generation.generate import load_pipeline
from inlaid.networks.domain_embedding import EMBEDDING, NAME, TOKENS
from inlaid.runs.folder import Run, read_header, read_metrics
from inlaid.runs.launch import start_processes
from inlaid.tiny import random
from inlaid.training.loop import train
from support import rgba_clips
from support.joint import CASES, FEW, Checkpoint, pipeline_inputs
from support.ranks import difference, together
from support.slow import mostly_slow, slow

CPU = torch.device("cpu")


@pytest.fixture
def joint_recipe(checkpoint: Checkpoint, encoded: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """A function that gives a small recipe with transparent clips; `section__key` changes a value."""

    def make(case: tuple[str, str], **changes: Any) -> dict[str, Any]:
        raw: dict[str, Any] = {
            "run": str(tmp_path / "run"),
            "seed": 3,
            "model": {**random.model(*case), "checkpoint": str(checkpoint(*case))},
            "data": {"sources": str(tmp_path / "clips"), "validation": 1, "cache": str(encoded)},
            "tuner": {"kind": "lora", "rank": 4},
            "alpha": {"kind": "joint"},
            "optim": {"lr": 2e-2},
            "train": {"steps": 4, "save_every": 2, "log_every": 1, "validate_every": 4, "trackers": []},
            "sample": {"steps": 2},
        }
        grid = build_family(config.build(raw)).grid
        frames, size = grid.offset + grid.temporal, (grid.spatial * 2, grid.spatial * 2)
        raw["data"] |= {"size": size, "frames": frames}
        if not (tmp_path / "clips").is_dir():
            for i in range(4):
                clip = rgba_clips.clip(i, frames, size)
                rgba_clips.pair(tmp_path / "clips", f"{i}", clip)
        raw["data"]["fps"] = 16
        for key, value in changes.items():
            section, _, name = key.partition("__")
            raw[section] = {**raw.get(section, {}), name: value} if name else value
        return raw

    return make


def adapter(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "adapter" / WEIGHTS) | load_file(run / "adapter" / EMBEDDING)


@pytest.mark.parametrize(
    ("case", "kind"),
    [(c, "lora") if c == ("wan", "t2v") else slow(c, "lora") for c in CASES]
    + [slow(c, "dora") for c in CASES],
    ids=lambda x: x if isinstance(x, str) else "-".join(x),
)
def test_an_adapter_does_in_the_pipeline_what_it_did_in_training(
    case: tuple[str, str], kind: str, joint_recipe: Callable[..., dict]
) -> None:
    cfg = config.build(joint_recipe(case, tuner__kind=kind, train__steps=2))
    run = train(cfg)
    family: Any = build_family(cfg)
    weights = adapter(run)
    assert weights[NAME].abs().max() > 0 and any(v.any() for k, v in weights.items() if "lora_B" in k)
    with start_processes(cfg) as ctx:
        folder = trained_folder(Run(run), None, family)
        pipes = [load_pipeline(cfg, family, f, s, ctx) for f, s in ((None, 1), (folder, 1), (folder, 0.5))]
    tuned = family.load_denoiser(torch.float32)
    tuners.attach(cfg.tuner, family.targets, tuned, seed=0)
    family.attached(tuned)
    for name, p in tuned.named_parameters():
        if p.requires_grad:
            plain = name.replace(f".{ADAPTER}", "").replace("_vector.weight", "_vector")
            p.data = weights[NAME if plain.startswith(NAME) else f"transformer.{plain}"].clone()
    with torch.no_grad():
        before, after, half, ours = (
            family.predict(d.eval(), *pipeline_inputs(family))
            for d in (*(p.transformer for p in pipes), tuned)
        )
    assert (after - ours).abs().max() <= (0 if kind == "lora" else 2e-6)
    assert (after - before).abs().max() > 1e-5 and not torch.equal(half, after)
    header = read_header(run / "adapter" / WEIGHTS)
    assert header["inlaid_alpha"] == "joint" and header["inlaid_alpha_tokens"] == TOKENS
    assert "**transparent videos**" in (run / "adapter/README.md").read_text("utf-8")
    lines = read_metrics(run / "metrics.jsonl")
    for line in (x for x in lines if "loss" in x):
        assert (line["loss_rgb"] + line["loss_alpha"]) / 2 == pytest.approx(line["loss"], rel=1e-5)


@pytest.mark.parametrize("case", mostly_slow(FEW, FEW[0].__eq__), ids="-".join)
def test_resume_is_bit_exact(
    case: tuple[str, str], joint_recipe: Callable[..., dict], tmp_path: Path
) -> None:
    whole = train(config.build(joint_recipe(case, run=str(tmp_path / "whole"), tuner__kind="dora")))
    part = joint_recipe(case, run=str(tmp_path / "part"), tuner__kind="dora")
    train(config.build(part, ["train.steps=2"]))
    resumed = train(config.build(part))
    a, b = adapter(whole), adapter(resumed)
    assert set(a) == set(b) and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.slow
@pytest.mark.parametrize("case", mostly_slow(FEW, FEW[0].__eq__), ids="-".join)
def test_loss_falls(case: tuple[str, str], joint_recipe: Callable[..., dict]) -> None:
    """That of alpha, which is all that can change of its own."""
    raw = joint_recipe(case, train__steps=40, train__batch=3, train__validate_every=40, tuner__rank=16)
    run = train(config.build(raw))
    lines = [x for x in read_metrics(run / "metrics.jsonl") if "loss" in x]
    first, last = (np.mean([x["loss_alpha"] for x in part]) for part in (lines[:5], lines[-10:]))
    assert last < 0.9 * first


@pytest.mark.parametrize("case", mostly_slow(FEW, FEW[2].__eq__), ids="-".join)
@pytest.mark.parametrize("mode", [slow("ddp"), "fsdp"])
def test_two_processes_are_one_that_accumulates(
    case: tuple[str, str], mode: str, joint_recipe: Callable[..., dict], tmp_path: Path
) -> None:
    settings = {"optim__lr": 1e-3, "train__steps": 2, "train__save_every": 2, "tuner__kind": "dora"}
    one = train(config.build(joint_recipe(case, run=str(tmp_path / "one"), train__accumulate=2, **settings)))
    two = together(joint_recipe(case, run=str(tmp_path / "two"), **settings), tmp_path / "r.yaml", mode)
    assert difference(one, two, 2) < 1e-5


def test_such_an_adapter_is_not_written_for_others(joint_recipe: Callable[..., dict], tmp_path: Path) -> None:
    run = train(config.build(joint_recipe(FEW[0], train__steps=1)))
    for to in ("merged", "comfyui", "kohya"):
        with pytest.raises(
            ValueError, match=f"--to: {to} applies an adapter to all tokens.*cannot be merged"
        ):
            export_run(run, to, tmp_path / to)
    export_run(run, "diffusers", tmp_path / "out")
    before, after = (
        load_file(f / WEIGHTS) | load_file(f / EMBEDDING) for f in (run / "adapter", tmp_path / "out")
    )
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
