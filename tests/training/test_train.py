"""The main job on a tiny random Wan: it learns, resumes bit for bit, and N processes equal accumulation N."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from inlaid import config
from inlaid.generation.generate import generate
from inlaid.runs.folder import Run, read_metrics
from inlaid.runs.launch import Context
from inlaid.training.job import prepare
from inlaid.training.loop import train
from support import forks, ranks
from support.checkpoints import load_state
from support.slow import slow

ADAPTER = "adapter/pytorch_lora_weights.safetensors"


def run(raw: dict) -> Path:
    return train(config.build(raw))


def command(recipe: Path, *extra: str) -> list[str]:
    return [str(forks.python()), "-m", "inlaid", "train", str(recipe), *extra]


def write(raw: dict, path: Path) -> Path:
    path.write_text(json.dumps(raw), "utf-8")  # JSON is YAML
    return path


def difference(a: Path, b: Path) -> float:
    x, y = load_file(a / ADAPTER), load_file(b / ADAPTER)
    assert x.keys() == y.keys() and x
    return max(float((x[k] - y[k]).norm() / y[k].norm().clamp(min=1e-12)) for k in x)


def test_loss_falls_and_everything_is_written(recipe: Callable[..., dict]) -> None:
    raw = recipe(
        train__steps=40,
        train__log_every=10,
        train__validate_every=20,
        train__trackers=["tensorboard"],
        sample__every=20,
    )
    folder = run(raw)
    lines = read_metrics(folder / "metrics.jsonl")
    losses = [x["loss"] for x in lines if "loss" in x]
    validation = [x["validation_loss"] for x in lines if "validation_loss" in x]
    assert losses[-1] < 0.8 * losses[0], losses
    assert len(validation) == 2
    assert (folder / ADAPTER).is_file() and (folder / "adapter/README.md").is_file()
    assert list((folder / "tensorboard").iterdir())
    assert len(list((folder / "samples/step-000020").glob("*.mp4"))) == 1
    assert len(list((folder / "samples/step-000020").glob("*.json"))) == 1
    assert [p.name for p in Run(folder).checkpoints()] == [
        "step-000036",
        "step-000038",
        "step-000040",
    ]


@pytest.mark.parametrize("kind", [slow("lora"), "dora", slow("full")])
def test_going_on_is_bit_exact(recipe: Callable[..., dict], tmp_path: Path, kind: str) -> None:
    options = {"tuner": {"kind": kind}, "optim__ema": 0.9, "optim__lr": 1e-3}
    whole = run(recipe(run=str(tmp_path / "whole"), **options))
    run(recipe(run=str(tmp_path / "parts"), train__steps=2, **options))
    parts = run(recipe(run=str(tmp_path / "parts"), **options))
    a, _ = load_state(whole / "checkpoints/step-000006")
    b, _ = load_state(parts / "checkpoints/step-000006")
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) for k in a)
    losses = [
        [(x["step"], x["loss"]) for x in read_metrics(r / "metrics.jsonl") if "loss" in x]
        for r in (whole, parts)
    ]
    assert losses[0] == losses[1]


# Their state is saved and loaded in `test_small_optimizers_resume_bit_exactly`.
@pytest.mark.parametrize("name", [slow("adamw8bit"), slow("prodigy")])
def test_other_optimizers_resume(recipe: Callable[..., dict], tmp_path: Path, name: str) -> None:
    pytest.importorskip({"adamw8bit": "bitsandbytes", "prodigy": "prodigyopt"}[name])
    options = {"optim__name": name, "optim__lr": 1.0 if name == "prodigy" else 1e-2, "tuner__rank": 64}
    whole = run(recipe(run=str(tmp_path / "whole"), **options))
    run(recipe(run=str(tmp_path / "parts"), train__steps=4, **options))
    parts = run(recipe(run=str(tmp_path / "parts"), **options))
    assert difference(whole, parts) == 0.0


def test_killed_run_goes_on_bit_exact(recipe: Callable[..., dict], tmp_path: Path) -> None:
    """`kill -9` at a random moment after the first checkpoint; `benchmarks/resume.py` does it ten times."""
    whole = run(recipe(run=str(tmp_path / "whole"), train__steps=40, train__save_every=5))
    file = write(
        recipe(run=str(tmp_path / "killed"), train__steps=40, train__save_every=5), tmp_path / "killed.yaml"
    )
    process = subprocess.Popen(command(file), stderr=subprocess.DEVNULL, start_new_session=True)
    place = Run(tmp_path / "killed")
    deadline = time.time() + 120
    while not place.checkpoints() and process.poll() is None and time.time() < deadline:
        time.sleep(0.01)
    time.sleep(random.random() * 0.5)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert place.checkpoints() and not place.adapter.exists(), "it was killed on the way"
    resumed = run(recipe(run=str(tmp_path / "killed"), train__steps=40, train__save_every=5))
    assert difference(whole, resumed) == 0.0


def test_ctrl_c_saves_and_says_how_to_go_on(recipe: Callable[..., dict], tmp_path: Path) -> None:
    file = write(
        recipe(train__steps=100000, train__save_every=100000, train__log_every=1), tmp_path / "r.yaml"
    )
    process = subprocess.Popen(command(file), stderr=subprocess.PIPE, text=True)
    metrics = tmp_path / "run/metrics.jsonl"
    while not metrics.is_file() and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, message = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "run the same command again" in message and "Traceback" not in message
    assert len(Run(tmp_path / "run").checkpoints()) == 1
    assert (tmp_path / "run" / ADAPTER).is_file()


@pytest.mark.parametrize("launch", [ranks.launch, slow(ranks.torchrun)], ids=lambda f: f.__name__)
def test_two_processes_equal_accumulation_two(
    recipe: Callable[..., dict], tmp_path: Path, launch: ranks.Launch
) -> None:
    one = run(recipe(run=str(tmp_path / "one"), train__accumulate=2, data__caption_dropout=0.3))
    file = write(recipe(run=str(tmp_path / "two"), data__caption_dropout=0.3), tmp_path / "two.yaml")
    done = launch(["train", file])
    assert done.returncode == 0, done.stderr
    assert difference(one, tmp_path / "two") < 1e-5
    # a checkpoint of two processes goes on in one
    resumed = run(
        recipe(run=str(tmp_path / "two"), train__accumulate=2, train__steps=8, data__caption_dropout=0.3)
    )
    assert Run(resumed).checkpoints()[-1].name == "step-000008"


@pytest.mark.slow  # see `test_a_refused_launch_writes_nothing`
def test_another_recipe_does_not_go_on(recipe: Callable[..., dict]) -> None:
    run(recipe())
    with pytest.raises(ValueError, match=r"optim\.lr was 0\.01, is 0\.02"):
        run(recipe(optim__lr=0.02))
    run(recipe(train__steps=8))


def test_number_of_processes_is_checked(recipe: Callable[..., dict]) -> None:
    with pytest.raises(ValueError, match=r"requires 2 process"):
        run(recipe(runtime__world_size=2))


@pytest.mark.slow  # see `test_damaged_checkpoint`
def test_damaged_checkpoint_is_refused(recipe: Callable[..., dict]) -> None:
    folder = run(recipe())
    file = folder / "checkpoints/step-000006/trainer.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"step-000006.*damaged.*trainer\.safetensors"):
        run(recipe(train__steps=8))


def test_losses_that_are_not_finite_name_the_clips(recipe: Callable[..., dict]) -> None:
    raw = recipe(optim__lr=1e30, optim__clip=None, train__steps=20, train__log_every=1)
    with pytest.raises(ValueError, match=r"stopped being finite at step \d+ \(clips: .*\.mp4"):
        run(raw)


def test_targets_that_match_nothing_stop(recipe: Callable[..., dict]) -> None:
    with pytest.raises(ValueError, match=r"`proj_in` matches no"):
        run(recipe(tuner__targets=["proj_in", r"blocks\.\d+\.attn1\.to_q"]))


@pytest.mark.parametrize("kind", [slow("dora"), slow("full"), "lora"])
def test_bfloat16_learns_and_keeps_trained_weights_in_float32(recipe: Callable[..., dict], kind: str) -> None:
    raw = recipe(tuner={"kind": kind}, runtime__precision="bfloat16", train__steps=30, optim__lr=3e-3)
    folder = run(raw)
    losses = [x["loss"] for x in read_metrics(folder / "metrics.jsonl") if "loss" in x]
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3]), losses
    tensors, _ = load_state(folder / "checkpoints/step-000030")
    weights = {v.dtype for k, v in tensors.items() if k.startswith("weights.")}
    assert weights == {torch.float32}


@pytest.mark.slow
def test_both_experts_of_a14b_train_on_their_own_side(
    recipe: Callable[..., dict], tiny_a14b: Path, tmp_path: Path
) -> None:
    for expert in ("high", "low"):
        model = {"family": "wan", "checkpoint": str(tiny_a14b), "expert": expert}
        folder = run(recipe(run=str(tmp_path / expert), model=model))
        made = generate(folder, ["clip number 1"], steps=4)
        base = generate(folder, ["clip number 1"], steps=4, checkpoint="base", out=tmp_path / "base")
        assert made[0].read_bytes() != base[0].read_bytes()


def test_ti2v_5b_trains_and_generates(recipe: Callable[..., dict], tiny_5b: Path) -> None:
    folder = run(recipe(model__checkpoint=str(tiny_5b), data__size=[32, 32], sample__every=3))
    assert list((folder / "samples/step-000003").glob("*.mp4"))


def test_micro_batches_are_functions_of_their_index(recipe: Callable[..., dict]) -> None:
    """What two processes see together is what one process sees alone, whatever was seen before."""
    settings = config.build(recipe(train__batch=2, data__caption_dropout=0.5))
    ctx = Context(torch.device("cpu"), torch.float32, "adamw")
    loader = prepare(settings, ctx, Run(Path(settings.run))).loader
    loader.per_step = 2
    alone = dict(loader.stream(0, 4, ctx))
    for rank in (0, 1):
        other = Context(torch.device("cpu"), torch.float32, "adamw", rank=rank, world=2)
        for index, batch in loader.stream(2, 4, other):
            assert index % 2 == rank
            assert torch.equal(batch.latents, alone[index].latents)
            assert torch.equal(batch.cond["text"], alone[index].cond["text"])
    assert sorted(alone) == list(range(8))
