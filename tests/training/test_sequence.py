"""Processes that share the tokens of each sample do what one process does."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from inlaid import config, families
from inlaid.alpha.opening import open_family
from inlaid.media.video import native_frames
from inlaid.runs.launch import Context
from inlaid.tiny import random
from inlaid.training import parallel
from inlaid.training.loop import train
from support import split_sequence
from support.contract import FIRST, metrics
from support.ranks import difference, launch, together, validation
from support.slow import slow

VIDEO = [case for case in random.cases() if families.get(case[0]).modality == "video"]
FAMILIES = [case for case in FIRST if case in VIDEO]


def differences(checkpoint: Any, cases: list[dict[str, Any]], processes: int = 2) -> list[dict[str, Any]]:
    """What `support/split_sequence.py` finds of the cases, all in one launch."""
    for case in cases:
        if "checkpoint" not in case:
            case["checkpoint"] = str(checkpoint(case["family"], case["variant"]))
    done = launch([json.dumps(cases)], processes, program=[split_sequence.__file__])
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    for case, values in zip(cases, found, strict=True):
        print({k: v for k, v in case.items() if k != "checkpoint"}, values)
    return found


def same(found: list[dict[str, Any]], limit: float = 1e-6) -> None:
    """The loss is that of one process in each process, and the mean of gradients is, but not before it."""
    for values in found:
        assert values["loss"] < 1e-6 and values["ranks"] == 0, values
        assert values["gradients"] < limit < 0.1 < values["without the mean"], values


@pytest.mark.slow
def test_loss_and_gradients_of_every_family(checkpoint: Any) -> None:
    cases = [{"family": f, "variant": v, "odd": True} for f, v in FAMILIES]
    found = differences(checkpoint, cases)
    same(found)
    assert all(values["tokens"] % 2 for values in found)


@pytest.mark.slow
@pytest.mark.parametrize("odd", [False, True])
def test_loss_and_gradients_of_every_checkpoint(checkpoint: Any, odd: bool) -> None:
    same(differences(checkpoint, [{"family": f, "variant": v, "odd": odd} for f, v in VIDEO]))


@pytest.mark.slow
def test_loss_and_gradients_of_color_and_alpha(checkpoint: Any) -> None:
    one = [("wan", "t2v", "block"), ("wan", "ti2v", "block"), ("cogvideox", "1.5", "block")]
    every = [(f, v, r) for f, v in (("mochi", "t2v"), ("cogvideox", "5b"), ("cogvideox", "2b"))
             for r in ("block", "bias", "open")]  # fmt: skip
    cases = [
        {"family": f, "variant": v, "rule": r, "alpha": "joint", "odd": True, "tuner": t}
        for (f, v, r), t in zip([*one, *every], ["lora", "dora"] * 6, strict=True)
    ]
    same(differences(checkpoint, cases), limit=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "how",
    [
        *({"tuner": kind} for kind in ("dora", "lokr", "loha", "full")),
        {"memory": {"gradient_checkpointing": False}},
        {"memory": {"gradient_checkpointing": 2}},
        {"prior": True},
        {"memory": {"quantize": "int8"}},
        {"memory": {"quantize": "int4"}},
    ],
    ids=str,
)
def test_loss_and_gradients_of_every_way_to_train(checkpoint: Any, how: dict[str, Any]) -> None:
    found = differences(checkpoint, [{"family": f, "variant": v, "odd": True, **how} for f, v in FAMILIES])
    same(found, limit=1e-5 if how.get("tuner") == "dora" or "quantize" in str(how) else 1e-6)


@pytest.mark.slow
def test_compiled_blocks_of_several_sizes(checkpoint: Any) -> None:
    cases = [{"family": f, "variant": v, "odd": True, "compile": "aot_eager"} for f, v in FAMILIES]
    same(differences(checkpoint, [{**c, "sizes": 3} if c["family"] == "wan" else c for c in cases]))


@pytest.mark.slow
@pytest.mark.parametrize("processes", [3, 4])
def test_more_processes_with_unequal_shares(tmp_path: Path, processes: int) -> None:
    cases: list[dict[str, Any]] = []
    for family, variant in FAMILIES:
        folder = random.build(family, tmp_path / family, variant, heads=12 if family == "wan" else processes)
        cases.append({"family": family, "variant": variant, "odd": True, "checkpoint": str(folder)})
    same(differences(None, cases, processes))


EVERYTHING = {
    "train__validate_every": 2,
    "train__log_every": 1,
    "train__save_every": 2,
    "train__batch": 1,
    "data__validation": 3,
    "data__caption_dropout": 0.3,
    "optim__lr": 1e-3,
    "optim__ema": 0.9,
    "optim__warmup": 2,
    "sample__every": 2,
}
SPLIT = ("runtime.sequence=2",)


def sampled(run: Path, step: int) -> np.ndarray:
    """The first frame of each sample."""
    files = sorted((run / "samples" / f"step-{step:06d}").glob("*.mp4"))
    return np.stack([next(native_frames(file, np.zeros(1)))[0] for file in files]).astype(int)


@pytest.mark.parametrize(
    ("case", "mode", "back"),
    [(FAMILIES[0], "ddp", False), *(slow(case, mode, True) for case in FAMILIES for mode in ("ddp", "fsdp"))],
    ids=str,
)
def test_a_run_equals_one_process_and_goes_on_in_the_other(
    case: tuple[str, str], mode: str, back: bool, contract_recipe: Callable[..., dict], tmp_path: Path
) -> None:
    raw = contract_recipe(case, run=str(tmp_path / "alone"), train__steps=4 if back else 2, **EVERYTHING)
    raw["train"]["accumulate"] = 2
    raw["sample"]["prompts"] = ["clip number 1"]
    alone = train(config.build(raw))

    raw = {**raw, "run": str(tmp_path / "split")}
    split = together(raw, tmp_path / "a.yaml", mode, "train.steps=2", *SPLIT)
    figures, runs = {"split from the start": difference(split, alone, 2)}, [split]
    assert abs(sampled(split, 2) - sampled(alone, 2)).max() <= 3
    if back:
        assert train(config.build(raw)) == split
        figures["then alone"] = difference(split, alone, 4)

        raw, place = {**raw, "run": str(tmp_path / "begun")}, "checkpoints/step-000002"
        shutil.copytree(alone, tmp_path / "begun", ignore=shutil.ignore_patterns("step-000004", "adapter"))
        shutil.copytree(alone / place, tmp_path / "begun" / place, dirs_exist_ok=True)
        runs.append(together(raw, tmp_path / "b.yaml", mode, *SPLIT))
        figures["alone, then split"] = difference(runs[1], alone, 4)
    print(case, mode, {k: f"{v:.1e}" for k, v in figures.items()})
    # Adam divides by the root of tiny gradients, whose rounding FSDP changes once more: 9.4e-6 for Wan.
    assert max(figures.values()) < (3e-5 if mode == "fsdp" else 1e-5)
    for run in runs:
        assert validation(run) == pytest.approx(validation(alone), rel=1e-5)
        for key in ("loss", "gradient_norm"):
            assert metrics(run, key) == pytest.approx(metrics(alone, key), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "more"),
    [
        ("ddp", ["runtime.sequence=2"]),
        ("fsdp", ["runtime.sequence=2"]),
        ("fsdp", ["runtime.sequence=2", "runtime.shard_size=2"]),
        ("fsdp", ["runtime.shard_size=2"]),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_groups_of_processes_are_micro_batches(
    recipe: Callable[..., dict], tmp_path: Path, make_clips: Callable[..., Path], mode: str, more: list[str],
    kind: str,
) -> None:  # fmt: skip
    make_clips(8)
    groups = 4 if "runtime.sequence=2" not in more else 2
    raw = recipe(run=str(tmp_path / "alone"), **{**EVERYTHING, "tuner": {"kind": kind}}, train__steps=2)
    raw["train"]["accumulate"] = 4
    alone = train(config.build(raw))
    raw = {**raw, "run": str(tmp_path / "groups")}
    four = functools.partial(launch, processes=4)
    split = together(raw, tmp_path / "a.yaml", mode, f"train.accumulate={4 // groups}", *more, start=four)
    gap = difference(split, alone, 2)
    print(mode, more, kind, f"{gap:.1e}")
    assert gap < 1e-5
    assert validation(split) == pytest.approx(validation(alone), rel=1e-5)
    assert metrics(split, "loss") == pytest.approx(metrics(alone, "loss"), rel=1e-5)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"runtime": {"parallel": "zero3", "sequence": 2}},
            r"runtime\.sequence: not supported with runtime\.parallel=zero3: use ddp, or fsdp",
        ),
        (
            {"runtime__sequence": 2, "tuner": {"kind": "lora", "dropout": 0.1}},
            r"tuner\.dropout: not supported with runtime\.sequence",
        ),
        (
            {"runtime": {"sequence": 2, "world_size": 3}},
            r"runtime\.sequence: 2 does not divide runtime\.world_size 3",
        ),
        (
            {"runtime": {"shard_size": 2, "parallel": "fsdp", "world_size": 3}},
            r"runtime\.shard_size: 2 does not divide runtime\.world_size 3",
        ),
        ({"runtime": {"shard_size": 2}}, r"runtime\.shard_size: applies to runtime\.parallel=fsdp only"),
        (
            {"runtime__sequence": 2, "rgba_vae": {}, "tuner": {"kind": "lora"}},
            r"runtime\.sequence: an RGBA VAE has no token sequence",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(recipe: Callable[..., dict], changes: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        config.build(recipe(**changes))


def test_heads_and_families_that_cannot_share_are_refused(
    recipe: Callable[..., dict], contract_recipe: Callable[..., dict], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"sequence: 3 processes cannot share the 2 .*use one of 1, 2"):
        open_family(config.build(recipe(runtime__sequence=3)))
    scene = next(case for case in FIRST if case not in VIDEO)
    with pytest.raises(ValueError, match=r"runtime\.sequence: midi does not support split sequences"):
        open_family(config.build(contract_recipe(scene, runtime__sequence=2, tuner={"kind": "lora"})))


def test_a_launch_that_does_not_fit_is_refused(recipe: Callable[..., dict], tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"2 processes share each sample, but .* 1 process.* --nproc-per-node 2"
    ):
        train(config.build(recipe(runtime__sequence=2)))
    made = config.build(recipe(runtime={"parallel": "fsdp", "shard_size": 2}))
    (said,) = parallel.problems(made, 3, None)  # type: ignore[arg-type]
    assert said.startswith("runtime.shard_size: 2 does not divide the 3 process")
    assert not (tmp_path / "run").exists()


def test_processes_of_a_group_read_the_same_micro_batches() -> None:
    shares = [Context(None, None, "adamw", rank, 6, sequence=2).share for rank in range(6)]  # type: ignore[arg-type]
    assert shares == [(0, 3), (0, 3), (1, 3), (1, 3), (2, 3), (2, 3)]
