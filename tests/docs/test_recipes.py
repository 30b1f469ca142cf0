"""Every recipe that ships loads, suits its checkpoint, and trains on a tiny random sibling of it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import AutoencoderKLWan
from PIL import Image
from safetensors.torch import load_file

from inlaid import config, families
from inlaid.adapters.adapter import WEIGHTS
from inlaid.alpha.opening import build_family
from inlaid.check.estimate import Estimate
from inlaid.generation.generate import generate
from inlaid.networks import rgba_vae_checkpoint
from inlaid.runs.folder import Run, read_metrics
from inlaid.tiny import random
from inlaid.training.loop import train
from support import forks
from support.ranks import free_port
from support.rgba_vaes import made, rgba_clips
from support.slow import mostly_slow, slow

ROOT = Path(__file__).parents[2]
RECIPES = sorted(p for p in (ROOT / "recipes").glob("*/*.yaml") if p.parent.name != "launch")
PUBLISHED = [p for p in RECIPES if "tiny" not in p.name]
SETTINGS = {p: config.load(p) for p in RECIPES}

name = pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
published = pytest.mark.parametrize("path", PUBLISHED, ids=lambda p: p.stem)


def family(settings: config.Config) -> families.Family:
    """Return the family of a recipe; its RGBA VAE may be untrained yet."""
    if settings.alpha.kind == "merged":
        return families.get(settings.model.family)(settings.model)
    return build_family(settings)


def test_there_are_recipes() -> None:
    checkpoints = {SETTINGS[p].model.checkpoint for p in PUBLISHED}
    published = {id for name in families.names() for id in families.get(name).published}
    assert checkpoints == published, "one recipe or more for each published checkpoint"


@name
def test_is_short_and_has_a_run_of_its_own(path: Path) -> None:
    lines = path.read_text("utf-8").splitlines()
    assert 7 <= len(lines) <= 25 and lines[0].startswith("# ")
    assert max(map(len, lines)) <= 120
    runs = [settings.run for settings in SETTINGS.values()]
    assert runs.count(SETTINGS[path].run) == 1


@published
def test_published_checkpoint_can_do_it(path: Path) -> None:
    settings = config.load(path)
    assert family(settings).problems(settings) == []


TRAINED = ("t2v-14b-rgba-dora", "rgba-vae")
"""Recipes with alpha and of an RGBA VAE, that every run of the tests trains; others are trained elsewhere."""


@pytest.mark.slow
@pytest.mark.untraced
@pytest.mark.parametrize("path", PUBLISHED, ids=lambda p: p.stem)
def test_cost_is_known_and_comments_are_right(path: Path, estimated: Callable[..., Estimate]) -> None:
    """The network is made without weights, its tuner attached: targets and numbers are the real ones."""
    settings = config.load(path)
    shape = (max(settings.data.frames), *settings.data.size)
    found = estimated(
        family(settings),
        settings,
        {shape: 1},
        {shape: 1},
        [],
        device=torch.device("meta"),
        precision=torch.bfloat16,
        optimizer=settings.optim.name,
    )
    assert found.peak < 80e9, "one large GPU must do"
    assert (found.trained == found.parameters) == (settings.tuner.kind == "full")
    text = path.read_text("utf-8")
    for value, unit in re.findall(r"([\d.]+) (million|billion) (?:numbers|weights)", text):
        assert found.trained / {"million": 1e6, "billion": 1e9}[unit] == pytest.approx(float(value), rel=0.02)
    for value in re.findall(r"([\d.]+) GB by the estimate", text):
        assert found.peak / 1e9 == pytest.approx(float(value), rel=0.01)
    if size := re.search(r"(\d+)gb", path.stem):
        assert found.peak + 1e9 < float(size[1]) * 1e9, "with what CUDA takes for itself"


@pytest.mark.parametrize(
    "path",
    mostly_slow(RECIPES, lambda p: p.stem in TRAINED),
    ids=lambda p: p.stem,
)
def test_trains_two_steps(
    path: Path,
    checkpoint: Callable[[str, str], Path],
    make_clips: Callable[..., Path],
    make_scenes: Callable[..., Path],
    encoded: Path,
    tmp_path: Path,
) -> None:
    raw = yaml.safe_load(path.read_text("utf-8"))
    model = raw["model"]
    folder = checkpoint(model["family"], random.sibling(model["family"], model["checkpoint"]))
    grid = families.get(model["family"])(config.Model(**{**model, "checkpoint": str(folder)})).grid
    size, frames = grid.spatial * 2, grid.snap_frames(grid.offset + 2 * grid.temporal)
    for package in {"adamw8bit": ["bitsandbytes"]}.get(raw["optim"].get("name"), []):
        pytest.importorskip(package)
    changes = [
        f"run={tmp_path / 'run'}",
        f"model.checkpoint={folder}",
        f"data.sources={make_clips(6, size=(size, size), frames=3 * frames)}",
        f"data.size=[{size},{size}]",
        f"data.frames={frames}",
        f"data.cache={encoded}",
        "train.steps=2",
        "train.trackers=[]",
        "sample.steps=2",
    ]
    if "alpha" in raw or "rgba_vae" in raw:
        changes.append(f"data.sources={rgba_clips(tmp_path / 'rgba_clips', 6, 3 * frames, size)}")
    if "vae" in raw.get("alpha", {}):
        vae = AutoencoderKLWan.from_pretrained(folder, subfolder="vae")
        rgba_vae_checkpoint.save(made(vae), tmp_path / "vae")
        changes.append(f"alpha.vae={tmp_path / 'vae'}")
    if families.get(model["family"]).modality == "scene":
        changes = [c for c in changes if not c.startswith(("data.s", "data.f"))]
        changes += [f"data.sources={make_scenes((2, 1, 2, 3, 1, 2))}", "sample.grid=16"]
    if "every" in raw.get("sample", {}):
        changes.append("sample.every=2")
    if raw["data"].get("validation"):
        changes += ["data.validation=1"]  # a share of many clips is none of six
    settings = config.load(path, changes)
    run = train(settings)
    lines = read_metrics(run / "metrics.jsonl")
    assert [x["step"] for x in lines if "loss" in x] == [2]
    assert [x["step"] for x in lines if "validation_loss" in x] == ([2] if settings.data.validation else [])
    drawn = [*run.glob("samples/step-000002/*.mp4"), *run.glob("samples/step-000002/*.glb")]
    assert bool(drawn) == bool(settings.sample.every)
    if settings.rgba_vae is not None:
        assert (run / "rgba_vae/merge.safetensors").is_file()
        return
    if settings.tuner.kind == "full":
        assert (run / "adapter/config.json").is_file()
    else:
        tensors = load_file(run / "adapter" / WEIGHTS)
        assert any(t.any() for n, t in tensors.items() if "lora_B" in n), "something was learned"
        dora = [n for n in tensors if "lora_magnitude_vector" in n]
        assert bool(dora) == (settings.tuner.kind == "dora")
    start = tmp_path / "start.png"
    Image.new("RGB", (size, size), "orange").save(start)
    kind = families.get(model["family"])(settings.model)
    images = [[str(start)] * len(kind.images)] if kind.images else []
    assert len(generate(run, ["a clip"] if kind.text_length else [], images=images, steps=2)) == 1


def test_the_joint_demo_is_its_recipe() -> None:
    from inlaid.cli import demo_joint

    ours = config.load(ROOT / "recipes/wan/tiny-joint.yaml")
    theirs = config.build(demo_joint.recipe(Path("runs/demo-joint")))
    assert ours == theirs.model_copy(update={"run": ours.run, "sample": ours.sample})


def test_the_transparent_demo_is_its_recipe() -> None:
    from inlaid.cli import demo_rgba

    ours = config.load(ROOT / "recipes/wan/tiny-merged.yaml")
    theirs = config.build(demo_rgba.recipe(Path("runs/demo-merged")))
    sources = [s.model_copy(update={"repeats": 1}) for s in theirs.data.sources]
    assert ours.tuner == theirs.tuner and ours.alpha == theirs.alpha and ours.optim == theirs.optim
    assert ours.data.sources == sources and ours.train == theirs.train and ours.memory == theirs.memory


def test_the_demo_of_scenes_is_its_recipe() -> None:
    from inlaid.cli import demo_scenes

    ours = config.load(ROOT / "recipes/midi/tiny-demo.yaml")
    assert ours == config.build(demo_scenes.recipe(Path("runs/demo-midi")))


def test_experts_share_their_cache() -> None:
    high, low = (config.load(ROOT / f"recipes/wan/a14b-{side}.yaml") for side in ("high", "low"))
    assert high.data == low.data and high.data.cache
    assert (high.model.expert, low.model.expert) == ("high", "low")


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_the_demo_is_its_recipe(kind: str) -> None:
    """`inlaid demo` adds prompts and nothing else."""
    from inlaid.cli import demo

    ours = config.load(ROOT / "recipes/wan/tiny-demo.yaml", [f"tuner.kind={kind}"])
    theirs = config.build(demo.recipe(Path("runs/demo"), kind))
    plain = {"sample": theirs.sample.model_copy(update={"prompts": []})}
    assert ours == theirs.model_copy(update=plain)


def test_a_run_that_was_moved_goes_on_where_it_is(recipe: Callable[..., dict], tmp_path: Path) -> None:
    raw = recipe(train__steps=2, runtime__world_size=1)
    old, new = Path(raw["run"]), tmp_path / "elsewhere/run"
    train(config.build(raw))
    new.parent.mkdir()
    old.rename(new)
    assert train(config.load(new, ["train.steps=4"])) == new
    assert Run(new).checkpoints()[-1].name == "step-000004" and not old.exists()
    assert config.load(new, ["run=other"]).run == "other"


# --- launch files -------------------------------------------------------------------------------------------

LAUNCH = ROOT / "recipes/launch"
SLURM = {"SLURM_JOB_NODELIST": "here", "SLURM_JOB_ID": "77", "SLURM_NTASKS": "2", "SLURM_CPUS_PER_TASK": "1"}
ACCELERATE = ["--num_processes", "2", "-m", "inlaid", "train"]
SHIMS = {
    "scontrol": "echo localhost",
    "srun": 'for i in 1 0; do SLURM_PROCID=$i SLURM_LOCALID=$i "$@" & p="$p $!"; done; '
    "for q in $p; do wait $q || exit 1; done",
}
"""What Slurm's commands do here: one host, two tasks."""


def launch(command: list[str], recipe: Path, run: Path, tmp_path: Path, *overrides: str) -> list[float]:
    """Starts two processes as a launch file does, and gives the losses that they wrote."""
    shims = tmp_path / "bin"
    shims.mkdir(exist_ok=True)
    for program, body in SHIMS.items():
        (shims / program).write_text(f"#!/usr/bin/env bash\n{body}\n", "utf-8")
        (shims / program).chmod(0o755)
    python = forks.python()
    path = os.pathsep.join(map(str, [shims, python.parent, Path(sys.executable).parent, os.environ["PATH"]]))
    done = subprocess.run(
        [*command, str(recipe), f"run={run}", *overrides],
        env={**os.environ, **SLURM, "PYTHON_EXEC": str(python), "PATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return [x["loss"] for x in read_metrics(run / "metrics.jsonl") if "loss" in x]


@pytest.mark.parametrize("mode", ["ddp", slow("fsdp")])
@pytest.mark.parametrize("how", ["torchrun", slow("nodes"), slow("accelerate"), slow("slurm")])
def test_launch_file_equals_accumulation_two(
    how: str, mode: str, recipe: Callable[..., dict], tmp_path: Path
) -> None:
    nodes = f'{LAUNCH / "torchrun-nodes.sh"} 2 localhost:{free_port()} 1 "$@"'
    command = {
        "torchrun": [str(LAUNCH / "torchrun.sh"), "2"],
        "nodes": ["bash", "-c", f"{nodes} & other=$!; {nodes} && wait $other", "two machines"],
        "accelerate": ["accelerate", "launch", "--config_file", str(LAUNCH / "accelerate.yaml"), *ACCELERATE],
        "slurm": ["bash", str(LAUNCH / "slurm.sbatch")],
    }[how]
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe(runtime__world_size=2, train__steps=2)), "utf-8")
    two = launch(command, file, tmp_path / "two", tmp_path, f"runtime.parallel={mode}")
    one = train(config.build(recipe(run=str(tmp_path / "one"), train__accumulate=2, train__steps=2)))
    alone = [x["loss"] for x in read_metrics(one / "metrics.jsonl") if "loss" in x]
    assert len(two) == 1 and two == pytest.approx(alone, rel=1e-5)
