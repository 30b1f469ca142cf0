"""Whole runs with offload: the same files as without, killed or not; and what is refused."""

from __future__ import annotations

import json
import os
import random as chance
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from inlaid import config
from inlaid.runs.folder import Run, read_metrics
from inlaid.runs.launch import Context
from inlaid.tiny import random
from inlaid.training import job, memory, offload, store, transport
from inlaid.training.loop import train
from support import forks, ranks
from support.checkpoints import load_state

ALL = {"offload": "all"}


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """A function that gives a random checkpoint with four blocks."""

    def get(family: str = "wan", variant: str | None = None) -> str:
        folder = tmp_path_factory.getbasetemp() / f"deep-{family}-{variant}"
        return str(folder if folder.is_dir() else random.build(family, folder, variant, layers=4))

    return get


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "LEAST", 500)
    monkeypatch.setattr(memory, "KEPT_TOKENS", 9)


@pytest.fixture
def program(tmp_path: Path) -> str:
    """A program like `inlaid` for other processes, where small tensors go to the host too."""
    file = tmp_path / "small.py"
    file.write_text(
        "from inlaid.cli.main import main\n"
        "from inlaid.training import memory, store\n"
        "store.LEAST, memory.KEPT_TOKENS = 500, 9\n"
        "main()\n"
    )
    return str(file)


def same(a: Path, b: Path, step: int) -> None:
    """Weights, average, moments, adapter, metrics and samples."""
    name = f"checkpoints/step-{step:06d}"
    (x, _), (y, _) = (load_state(run / name) for run in (a, b))
    assert x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x)
    files = [f.relative_to(a) for f in sorted(a.rglob("*.safetensors"))]
    files += [f.relative_to(a) for f in sorted((a / "samples").rglob("*")) if f.suffix in (".mp4", ".glb")]
    assert files and all((a / f).read_bytes() == (b / f).read_bytes() for f in files)
    keys = ("step", "loss", "validation_loss", "gradient_norm")
    lines = [[{k: x[k] for k in keys if k in x} for x in read_metrics(r / "metrics.jsonl")] for r in (a, b)]
    assert lines[0] and all(line in lines[1] for line in lines[0])


def test_files_are_the_same(
    recipe: Callable[..., dict], make_clips: Callable[..., Path], deep: Any, tmp_path: Path
) -> None:
    """With an average, validation and samples, and with prior preservation by the network as it was."""
    known = {"path": str(make_clips(2, name="known")), "prior_preservation": 0.5}
    options = {
        "model__checkpoint": deep(),
        "data__sources": [recipe()["data"]["sources"], known],
        "optim__ema": 0.9,
        "sample__every": 3,
        "train__steps": 3,
    }
    plain = train(config.build(recipe(run=str(tmp_path / "plain"), **options)))
    section = {"offload": ["activations"], "blocks_to_swap": 3, "gradient_checkpointing": "attention"}
    offloaded = train(config.build(recipe(run=str(tmp_path / "offloaded"), memory=section, **options)))
    same(plain, offloaded, 3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "options"),
    [
        (("wan", "t2v"), {"alpha": {"kind": "joint"}, "tuner": {"kind": "dora"}}),
        (("wan", "t2v"), {"memory": {"gradient_checkpointing": "attention"}}),
        (("wan", "t2v"), {"tuner": {"kind": "full"}, "memory": {"offload": "activations"}}),
        (("wan", "t2v"), {"memory": {"quantize": "int8"}}),
        (("wan", "t2v"), {"train__accumulate": 2, "train__batch": 2, "tuner": {"kind": "lokr"}}),
        (("mochi", "t2v"), {"alpha": {"kind": "joint"}}),
        (("cogvideox", "5b"), {}),
        (("midi", "scene"), {}),
    ],
    ids=str,
)
def test_files_of_other_runs_are_the_same(
    contract_recipe: Callable[..., dict], deep: Any, tmp_path: Path, case: tuple[str, str], options: dict
) -> None:
    runs: list[Path] = []
    for chosen in ({"offload": []}, {}):
        section = {**ALL, **options.get("memory", {}), **chosen}
        name = str(tmp_path / f"run{len(runs)}")
        raw = contract_recipe(case, **{**options, "run": name, "memory": section})
        raw["model"]["checkpoint"] = deep(*case)
        if "alpha" in options and not runs:  # an alpha matte beside each clip
            for file in sorted(Path(raw["data"]["sources"]).glob("*.mp4")):
                shutil.copy(file, file.with_name(f"{file.stem}_alpha.mp4"))
        runs.append(train(config.build(raw)))
    same(*runs, 4)


@pytest.mark.slow
@pytest.mark.parametrize("every", [True, "attention"])
def test_resume_after_a_kill_is_bit_exact(
    recipe: Callable[..., dict], deep: Any, tmp_path: Path, program: str, every: Any
) -> None:
    section = {**ALL, "gradient_checkpointing": every}
    options = {"model__checkpoint": deep(), "memory": section, "train__steps": 20, "optim__ema": 0.9}
    whole = train(config.build(recipe(run=str(tmp_path / "whole"), **options)))
    raw = recipe(run=str(tmp_path / "parts"), **options)
    file, place = tmp_path / "r.yaml", Run(tmp_path / "parts")
    file.write_text(json.dumps(raw), "utf-8")  # JSON is YAML
    words = [str(forks.python()), program, "train", str(file)]
    process = subprocess.Popen(words, stderr=subprocess.DEVNULL, start_new_session=True)
    while not place.checkpoints() and process.poll() is None:
        time.sleep(0.01)
    time.sleep(chance.random() * 0.3)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert place.checkpoints() and not place.adapter.exists(), "it was killed on the way"
    same(whole, train(config.build(raw)), 20)


@pytest.mark.slow
def test_two_processes_equal_accumulation(
    recipe: Callable[..., dict], deep: Any, tmp_path: Path, program: str
) -> None:
    options, start = {"model__checkpoint": deep(), "memory": ALL}, partial(ranks.launch, program=(program,))
    one = train(config.build(recipe(run=str(tmp_path / "one"), train__accumulate=2, **options)))
    two = ranks.together(
        recipe(run=str(tmp_path / "two"), **options), tmp_path / "two.yaml", "ddp", start=start
    )
    assert ranks.difference(one, two, 6) < 1e-5


@pytest.mark.slow
def test_processes_that_share_a_sample(
    recipe: Callable[..., dict], deep: Any, tmp_path: Path, program: str
) -> None:
    runs, start = [], partial(ranks.launch, program=(program,))
    for i, section in enumerate(({}, {**ALL, "gradient_checkpointing": "attention"})):
        raw = recipe(run=str(tmp_path / str(i)), model__checkpoint=deep(), memory=section)
        runs.append(ranks.together(raw, tmp_path / "r.yaml", "ddp", "runtime.sequence=2", start=start))
    same(*runs, 6)


def test_what_is_asked_is_what_is_prepared(recipe: Callable[..., dict], deep: Any, tmp_path: Path) -> None:
    made = []

    def note(*args: Any, **how: Any) -> Any:
        made.append(real(*args, **how))
        return made[-1]

    real = offload.offload
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(offload, "offload", note)
        sections = ({"blocks_to_swap": 3}, {"offload": "activations"}, ALL)
        for i, section in enumerate(sections):
            raw = recipe(memory=section, model__checkpoint=deep(), run=str(tmp_path / str(i)))
            settings = config.build(raw)
            job.prepare(
                settings, Context(torch.device("cpu"), torch.float32, "adamw"), Run(Path(settings.run))
            )
    swapped = [conductor and list(conductor.masters) for conductor, _ in made]
    assert swapped == [[0, 1, 2], None, [0, 1, 2, 3]]
    assert [store is not None for _, store in made] == [False, True, True]


# --- refusals ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"memory": {"offload": "weights"}}, r"memory\.offload"),
        ({"memory": {"blocks_to_swap": 0}}, r"memory\.blocks_to_swap"),
        ({"memory": ALL, "tuner": {"kind": "full"}}, r"memory\.offload: `blocks` needs a frozen base model"),
        (
            {"memory": {"blocks_to_swap": 4}, "tuner": {"kind": "full"}},
            r"memory\.blocks_to_swap: `blocks` needs a frozen base model.*memory\.offload=activations",
        ),
        (
            {"memory": {"offload": "activations", "gradient_checkpointing": False}},
            r"memory\.offload: needs gradient checkpointing",
        ),
        (
            {"memory": {"offload": "blocks", "gradient_checkpointing": 2}},
            r"memory\.offload: `blocks` needs gradient checkpointing of all blocks, not of one in 2",
        ),
        (
            {"memory": {"blocks_to_swap": 4, "layerwise_casting": "bfloat16"}},
            r"memory\.blocks_to_swap: .* memory\.layerwise_casting.*: use memory\.quantize",
        ),
        (
            {"memory": {"offload": "blocks"}, "runtime": {"compile": True}},
            r"runtime\.compile: cannot be combined with memory\.offload of blocks",
        ),
        (
            {"memory": {"offload": "activations"}, "runtime": {"parallel": "fsdp"}},
            r"memory\.offload: not supported with runtime\.parallel=fsdp",
        ),
        (
            {"memory": ALL, "tuner": None, "rgba_vae": {}},
            r"memory\.offload: not supported for an RGBA VAE",
        ),
    ],
)
def test_keys_that_do_not_go_together(recipe: Callable[..., dict], changes: dict, message: str) -> None:
    raw = {k: v for k, v in recipe(**changes).items() if v is not None}
    with pytest.raises(ValueError, match=message):
        config.build(raw)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"offload": "activations"}, None),
        ({"offload": "activations", "gradient_checkpointing": 3}, None),
        ({"offload": ["activations", "blocks"], "gradient_checkpointing": 1}, None),
        ({"blocks_to_swap": 2}, r"memory\.blocks_to_swap: 2 is not from 3 to 4: the network has 4 blocks"),
        ({"blocks_to_swap": 5}, r"memory\.blocks_to_swap: 5 is not from 3 to 4: the network has 4 blocks"),
    ],
)
def test_what_the_network_does_not_have(
    recipe: Callable[..., dict], deep: Any, section: dict, message: str | None, monkeypatch: Any
) -> None:
    settings = config.build(recipe(memory=section, model__checkpoint=deep()))
    ctx = Context(torch.device("cpu"), torch.float32, "adamw")
    family = job.open_family(settings)
    if message is None:
        job.check_recipe(settings, ctx, family)
        return
    with pytest.raises(ValueError, match=message):
        job.check_recipe(settings, ctx, family)


def test_a_network_of_two_blocks(recipe: Callable[..., dict]) -> None:
    with pytest.raises(ValueError, match=r"the network has 2 blocks.* `blocks` saves nothing"):
        train(config.build(recipe(memory={"offload": "blocks"})))


def test_other_devices(recipe: Callable[..., dict]) -> None:
    settings = config.build(recipe(memory=ALL))
    for device, wrong in (("mps", 1), ("cuda", 0), ("cpu", 0)):
        found = memory.problems(settings, torch.device(device), torch.bfloat16)
        assert len(found) == wrong and all("memory.offload: has no effect on mps" in f for f in found)


@pytest.mark.parametrize("world", [1, 2])
def test_too_little_host_memory_is_refused_before_anything_is_loaded(
    recipe: Callable[..., dict], deep: Any, monkeypatch: pytest.MonkeyPatch, world: int
) -> None:
    """What fits for one process need not fit for two on the same machine."""
    settings = config.build(recipe(memory={"offload": "blocks"}, model__checkpoint=deep()))
    family = job.open_family(settings)
    network = family.load_denoiser(torch.float32, meta=True)
    need = sum(p.numel() * 4 for n, p in network.named_parameters() if n.startswith("blocks."))
    monkeypatch.setattr(offload, "free_host_memory", lambda: round(1.5 * need / 0.8))
    monkeypatch.setattr(Context, "gather", lambda self, value: [value] * world)
    ctx = Context(torch.device("cpu"), torch.float32, "adamw")
    if world == 1:
        job.check_recipe(settings, ctx, family)
        return
    with pytest.raises(
        ValueError, match=r"2 processes x .* GB of frozen weights do not fit .*: .* GB are free"
    ):
        job.check_recipe(settings, ctx, family)


def test_too_little_host_memory_for_activations(
    recipe: Callable[..., dict], deep: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transport, "free_host_memory", lambda: 100)
    with pytest.raises(ValueError, match=r"memory\.offload: needs .* GB more of host memory"):
        train(config.build(recipe(memory={"offload": "activations"}, model__checkpoint=deep())))


def test_free_host_memory_is_that_of_the_group(monkeypatch: pytest.MonkeyPatch) -> None:
    files = {
        "/proc/meminfo": "MemTotal: 64000 kB\nMemAvailable: 32000 kB\n",
        "/proc/self/cgroup": "0::/job/7\n",
        "/sys/fs/cgroup/job/memory.max": "20000000\n",
        "/sys/fs/cgroup/job/memory.current": "12000000\n",
        "/sys/fs/cgroup/job/memory.stat": "anon 8000000\ninactive_file 4000000\n",
        "/sys/fs/cgroup/job/7/memory.max": "max\n",
        "/sys/fs/cgroup/job/7/memory.current": "12000000\n",
    }
    monkeypatch.setattr(transport, "_read", lambda path: files.get(str(path), ""))
    assert transport.free_host_memory() == 12_000_000
    del files["/sys/fs/cgroup/job/memory.max"]
    assert transport.free_host_memory() == 32_768_000
    files.clear()
    assert transport.free_host_memory() is None
    transport.check_free(1 << 60)
