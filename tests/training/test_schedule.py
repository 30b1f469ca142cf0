"""Length and intervals in epochs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from inlaid import config
from inlaid.check.check import check_recipe
from inlaid.runs.folder import Run, read_metrics
from inlaid.training.loop import train
from inlaid.training.schedule import make_schedule

ADAPTER = "adapter/pytorch_lora_weights.safetensors"


def schedule(batches: int, per_step: int, sample: object = None, **train: object):
    raw = {
        "run": "r",
        "model": {"family": "wan", "checkpoint": "c"},
        "data": {"sources": "d"},
        "train": train,
        "sample": {"every": sample},
    }
    return make_schedule(config.build(raw), batches, per_step)


def test_steps_of_epochs() -> None:
    made = schedule(10, 4, "2 epochs", epochs=3, save_every="1 epoch", validate_every=2)
    assert made.steps == 8, "7.5 steps"
    assert [s for s in range(1, 9) if made.saves(s)] == [3, 5, 8], "the step in which an epoch ends"
    assert [s for s in range(1, 9) if made.validates(s)] == [2, 4, 6, 8]
    assert [s for s in range(1, 9) if made.samples(s)] == [5]
    assert schedule(3, 1, epochs=0.5).steps == 2 and schedule(3, 1).steps == 1000
    assert schedule(3, 1, steps=7).steps == 7 and not any(map(schedule(3, 1).samples, range(1, 20)))


def test_an_interval_is_at_least_a_step() -> None:
    made = schedule(1, 8, epochs=2, save_every="1 epoch")
    assert made.steps == 1 and [made.saves(s) for s in (1, 2, 3)] == [True] * 3


@pytest.mark.parametrize(
    ("value", "read"),
    [
        (250, 250),
        ("250", 250),
        (250.0, 250),
        ("2 epochs", "2 epochs"),
        ("1epoch", "1 epoch"),
        ("0.5 epochs", "0.5 epochs"),
    ],
)
def test_intervals_that_are_read(value: object, read: object) -> None:
    assert config.Train.model_validate({"save_every": value}).save_every == read


@pytest.mark.parametrize(
    "value", [0, -1, 2.5, "0 epochs", "two epochs", "5 steps or so", "", True, None, [1]]
)
def test_intervals_that_are_refused(value: object) -> None:
    raw = {"run": "r", "model": {"family": "wan", "checkpoint": "c"}, "data": {"sources": "d"}}
    with pytest.raises(ValueError, match=r"train\.save_every") as error:
        config.build(raw | {"train": {"save_every": value}})
    assert str(error.value).count("\n") == 1, "one line"


def test_steps_and_epochs_exclude_each_other(tmp_path: Path) -> None:
    raw = {"run": "r", "model": {"family": "wan", "checkpoint": "c"}, "data": {"sources": "d"}}
    with pytest.raises(ValueError, match="steps and epochs are both set: remove one of them"):
        config.build(raw | {"train": {"steps": 3, "epochs": 2}})
    assert (
        config.build(raw | {"train": {"steps": 3}}, ["train.epochs=2", "train.steps=null"]).train.epochs == 2
    )
    made = config.build(raw | {"train": {"epochs": 2, "save_every": "1 epoch"}})
    config.save(made, tmp_path / "r.yaml")
    assert config.load(tmp_path / "r.yaml") == made and config.Train().steps == 1000


@pytest.mark.slow
def test_a_run_in_epochs_is_the_run_in_steps_and_resumes_exactly(
    recipe: Callable[..., dict], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Three training clips in batches of one, two per step: 1.5 steps per epoch."""
    how = {"accumulate": 2, "log_every": 1, "trackers": [], "keep": 9}
    epochs = recipe(train={**how, "epochs": 4, "save_every": "2 epochs", "validate_every": "1 epoch"})
    steps = recipe(
        train={**how, "steps": 6, "save_every": 3, "validate_every": 3}, run=str(tmp_path / "steps")
    )
    report = check_recipe(config.build(epochs))
    assert report.steps == 6 and any("6 steps are 4.0 epochs of 3 batches" in n for n in report.notes)
    first = train(config.build({**epochs, "train": {**epochs["train"], "epochs": 2}}))
    assert [c.name for c in Run(first).checkpoints()] == ["step-000003"]
    assert "training 2 epochs: 3 steps" in capsys.readouterr().err
    train(config.build(epochs))
    assert [c.name for c in Run(first).checkpoints()] == ["step-000003", "step-000006"]
    validated = [x["step"] for x in read_metrics(first / "metrics.jsonl") if "validation_loss" in x]
    assert validated == [2, 3, 5, 6]
    whole, resumed = (load_file(f / ADAPTER) for f in (train(config.build(steps)), first))
    assert all(resumed[k].equal(whole[k]) for k in whole) and whole
