"""Devices, schedules, averages, checkpoints and meters."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from inlaid import config
from inlaid.runs.folder import Run, read_metrics, recipe_changes
from inlaid.runs.launch import Context, DevicePlan, Devices, resolve_devices
from inlaid.training.checkpoints import pack_state, save_state, unpack_state
from inlaid.training.meters import Meters
from inlaid.training.optim import EMA, learning_rate, make_optimizer, swapped
from support.checkpoints import load_state
from support.processes import ended_process


def resolve(devices: Devices, **runtime_section: object) -> DevicePlan:
    raw = {"run": "x", "model": {"family": "wan", "checkpoint": "a/b"}, "data": {"sources": "x"}}
    optim = {"name": runtime_section.pop("optimizer", "adamw")}
    return resolve_devices(config.build({**raw, "runtime": runtime_section, "optim": optim}), devices)


@pytest.mark.parametrize(
    ("devices", "section", "device", "precision", "optimizer", "note"),
    [
        (Devices(), {}, "cpu", torch.float32, "adamw", None),
        (Devices(), {"precision": "bfloat16"}, "cpu", torch.bfloat16, "adamw", None),
        (Devices(cuda=2, cuda_bfloat16=True), {}, "cuda", torch.bfloat16, "adamw", None),
        (Devices(cuda=1), {}, "cuda", torch.float32, "adamw", "this GPU has no bfloat16"),
        (Devices(cuda=1, cuda_bfloat16=True), {"device": "cpu"}, "cpu", torch.float32, "adamw", None),
        (Devices(mps=True), {}, "mps", torch.float32, "adamw", None),
        (
            Devices(mps=True),
            {"optimizer": "adamw8bit"},
            "mps",
            torch.float32,
            "adamw",
            "adamw8bit does not run on Apple MPS",
        ),
        (
            Devices(cuda=1, cuda_bfloat16=True),
            {"optimizer": "adamw8bit"},
            "cuda",
            torch.bfloat16,
            "adamw8bit",
            None,
        ),
    ],
)
def test_one_recipe_on_every_machine(
    devices: Devices, section: dict, device: str, precision: torch.dtype, optimizer: str, note: str | None
) -> None:
    plan = resolve(devices, **section)
    assert (plan.device, plan.precision, plan.optimizer) == (device, precision, optimizer)
    assert len(plan.notes) == (note is not None)
    assert note is None or note in plan.notes[0]


def test_a_device_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no `cuda` on this machine \(available: mps, cpu\)"):
        resolve(Devices(mps=True), device="cuda")


def test_schedules() -> None:
    def rates(**section: object) -> list[float]:
        return [learning_rate(config.Optim(lr=1.0, **section), s, 10) for s in range(10)]  # type: ignore[arg-type]

    assert rates() == [1.0] * 10
    assert rates(warmup=4)[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates(schedule="linear") == pytest.approx([1 - i / 10 for i in range(10)])
    cosine = rates(schedule="cosine", warmup=2)
    assert (
        cosine[2] == 1.0
        and cosine[6] == pytest.approx(0.5)
        and cosine[2:] == sorted(cosine[2:], reverse=True)
    )


def test_average_warms_up_and_follows() -> None:
    weights = {"w": torch.zeros(3)}
    average = EMA(0.9, weights)
    weights["w"] += 1
    average.update(weights, 0)
    assert average.weights["w"].tolist() == pytest.approx([0.9] * 3)  # decay (1 + 0) / (10 + 0)
    for step in range(1, 200):
        average.update(weights, step)
    assert average.weights["w"].tolist() == pytest.approx([1.0] * 3, abs=1e-4)


def test_swapped_weights_come_back_after_an_error() -> None:
    p = {"w": nn.Parameter(torch.zeros(2))}
    with pytest.raises(RuntimeError), swapped(p, {"w": torch.ones(2)}):
        assert p["w"].tolist() == [1, 1]
        raise RuntimeError
    assert p["w"].tolist() == [0, 0]


def test_small_weights_are_not_decayed() -> None:
    parameters = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2, 2))]
    made = make_optimizer("adamw", config.Optim(weight_decay=0.5), parameters)
    assert {len(g["params"][0].shape): g["weight_decay"] for g in made.param_groups} == {2: 0.5, 1: 0.0}


@pytest.mark.parametrize(("name", "package"), [("adamw8bit", "bitsandbytes"), ("prodigy", "prodigyopt")])
def test_a_missing_optimizer_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, name: str, package: str
) -> None:
    for module in [m for m in sys.modules if m.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=rf"optim\.name: `{name}` needs a package .* pip install 'inlaid\["):
        make_optimizer(name, config.Optim(), [nn.Parameter(torch.ones(2, 2))])


def test_optimizer_state_survives_the_round_trip(tmp_path: Path) -> None:
    p = nn.Parameter(torch.randn(4, 4))
    optimizer = torch.optim.AdamW([p], lr=1e-3)
    p.square().sum().backward()
    optimizer.step()
    tensors: dict[str, torch.Tensor] = {}
    packed = pack_state(optimizer.state_dict(), "o", tensors)
    save_state(tmp_path, tensors, {"step": 1, "per_step": 1, "optimizer": packed})
    loaded, values = load_state(tmp_path)
    state = unpack_state(values["optimizer"], loaded)
    assert state["param_groups"] == optimizer.state_dict()["param_groups"]
    wanted = optimizer.state_dict()["state"][0]
    assert state["state"][0].keys() == wanted.keys()
    assert all(torch.equal(state["state"][0][k], wanted[k]) for k in wanted)


@pytest.mark.parametrize("damage", ["cut", "change", "remove", "state"])
def test_damaged_checkpoints_are_named(tmp_path: Path, damage: str) -> None:
    for step in (1, 2):
        folder = tmp_path / f"step-{step:06d}"
        (folder / "adapter").mkdir(parents=True)
        (folder / "adapter/a.txt").write_text("hello", "utf-8")
        save_state(folder, {"w": torch.ones(100)}, {"step": step, "per_step": 1, "optimizer": {}})
    file = folder / (
        "state.json"
        if damage == "state"
        else "adapter/a.txt"
        if damage == "remove"
        else "trainer.safetensors"
    )
    if damage == "remove":
        file.unlink()
    else:
        content = bytearray(file.read_bytes())
        content[-3] ^= 1
        file.write_bytes(content if damage == "change" else content[:-4])
    offer = "delete the folder to resume from the previous one, step-000001"
    with pytest.raises(ValueError, match=f"step-000002: this checkpoint is damaged.*{file.name}.*{offer}"):
        load_state(folder)
    (tmp_path / "step-000001/trainer.safetensors").unlink()
    with pytest.raises(ValueError, match="start again from step 0: no earlier checkpoint is usable"):
        load_state(folder)


def test_run_folder(tmp_path: Path) -> None:
    run = Run(tmp_path)
    with pytest.raises(ValueError, match="not a run folder"):
        run.config()
    for step in (5, 10, 100000):
        with run.writing(step) as folder:
            (folder / "x").write_text("x", "utf-8")
    (tmp_path / f"checkpoints/.tmp-{ended_process()}-step-000015").mkdir()
    assert [p.name for p in run.checkpoints()] == ["step-000005", "step-000010", "step-100000"]
    assert run.checkpoint("10") == run.checkpoint("step-000010") == tmp_path / "checkpoints/step-000010"
    with pytest.raises(ValueError, match="no checkpoint `7`; available: step-000005, step-000010"):
        run.checkpoint("7")
    run.keep(2)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-000010", "step-100000"]


def test_a_checkpoint_that_fails_half_way_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="full"), Run(tmp_path).writing(3) as folder:
        (folder / "x").write_text("x", "utf-8")
        raise OSError("full")
    assert list((tmp_path / "checkpoints").iterdir()) == []


def meters(tmp_path: Path) -> Meters:
    return Meters(Run(tmp_path), Context(torch.device("cpu"), torch.float32, "adamw"))


def test_meters_average_and_write(tmp_path: Path) -> None:
    m = meters(tmp_path)
    m.add(1, {"losses": torch.tensor([1.0, 2.0])}, ["a", "b"])
    m.add(2, {"losses": torch.tensor([6.0])}, ["c"])
    m.norm(2, torch.tensor(4.0))
    m.check()
    line = m.flush(2, learning_rate=0.5)
    assert (line["loss"], line["gradient_norm"], line["learning_rate"]) == (3.0, 4.0, 0.5)
    (tmp_path / "metrics.jsonl").open("a").write('{"step": 3, "loss"')
    Run(tmp_path).truncate_metrics(2)
    assert [json.loads(x) for x in (tmp_path / "metrics.jsonl").read_text("utf-8").splitlines()] == [line]
    Run(tmp_path).truncate_metrics(0)
    assert read_metrics(tmp_path / "metrics.jsonl") == []


def test_meters_name_the_first_clips_that_are_not_finite(tmp_path: Path) -> None:
    m = meters(tmp_path)
    m.add(7, {"losses": torch.tensor([1.0, float("nan")])}, ["good.mp4", "bad.mp4"])
    m.add(8, {"losses": torch.tensor([float("inf")])}, ["later.mp4"])
    with pytest.raises(ValueError, match=r"at step 7 \(clips: bad\.mp4\)"):
        m.check()


@pytest.mark.parametrize("name", ["trackio", "wandb"])
def test_trackers_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The two have one interface; a missing one says what to install."""
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match=f"train.trackers: `{name}` needs a package that is not installed"):
        Meters(Run(tmp_path), Context(torch.device("cpu"), torch.float32, "adamw"), [name])
    calls: list[tuple] = []

    class Fake:
        init = staticmethod(lambda **options: calls.append(("init", options["project"], options["name"])))
        log = staticmethod(lambda values, step: calls.append((step, values)))

    monkeypatch.setitem(sys.modules, name, Fake)  # type: ignore[arg-type]
    m = Meters(Run(tmp_path), Context(torch.device("cpu"), torch.float32, "adamw"), [name])
    m.write({"step": 3, "loss": 1.5})
    assert calls == [("init", "inlaid", tmp_path.name), (3, {"loss": 1.5})]


def test_changes_that_make_another_run(recipe: Callable[..., dict]) -> None:
    old = config.build(recipe())
    assert recipe_changes(old, config.build(recipe(train__steps=99, sample__steps=3, train__keep=1))) == []
    assert recipe_changes(old, config.build(recipe(tuner__rank=8))) == ["tuner.rank was 4, is 8"]
    decaying = recipe(optim__schedule="cosine")
    longer = recipe(optim__schedule="cosine", train__steps=99)
    assert recipe_changes(config.build(decaying), config.build(longer)) == ["train.steps was 6, is 99"]
