"""Every command from end to end, as a shell calls it; what goes wrong is in `mistakes`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from inlaid import config
from inlaid.cli.app import app
from inlaid.media import video
from inlaid.runs.folder import Run, read_metrics
from support.commands import Done, files, inlaid

ADAPTER = Path("runs/clips/adapter/pytorch_lora_weights.safetensors")
SHORT = [
    "train.steps=4",
    "train.save_every=2",
    "train.validate_every=4",
    "train.trackers=[]",
    "optim.lr=0.05",
]
SHORT += ["optim.warmup=0", "sample.every=null", "sample.steps=1", "tuner.rank=2"]
COMMANDS = {
    "prepare": [
        *[
            "SOURCE",
            "OUT",
            "--as",
            "--size",
            "--frames",
            "--fps",
            "--stride",
            "--max-clips",
            "--start",
            "--end",
        ],
        *["--crop", "--sequence-fps", "--decontaminate", "--background", "--crf", "--family", "--workers"],
    ],
    "new": ["FAMILY", "DATA", "--out", "--checkpoint", "--alpha"],
    "check": ["RECIPE", "SECTION.KEY=VALUE"],
    "cache": ["RECIPE", "SECTION.KEY=VALUE"],
    "train": ["RECIPE", "SECTION.KEY=VALUE", "Ctrl-C"],
    "generate": [
        *["RUN", "PROMPTS", "--file", "--count", "--checkpoint", "--strength", "--size", "--frames"],
        *["--steps", "--guidance", "--negative", "--seed", "--transparent", "--out", "--device"],
    ],
    "evaluate": ["RUN", "--file", "--count", "--checkpoint", "--against", "--size", "--steps", "--seed"],
    "export": ["RUN", "--to", "--out", "--checkpoint", "comfyui", "merged"],
    "import": ["ADAPTER", "OUT", "--family", "--checkpoint", "--alpha", "--dora-scale"],
    "inspect": ["PATH"],
    "composite": ["FOREGROUND", "BACKGROUND", "--out", "--premultiplied", "--linear", "--fps"],
    "demo": ["--out", "--dora"],
}


def worked(*arguments: object) -> Done:
    done = inlaid(*arguments)
    assert done.code == 0, done.out + done.err
    return done


@pytest.fixture(scope="module")
def place(tiny_wan: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with clips, where the first commands of the README have been run."""
    folder = tmp_path_factory.mktemp("place")
    (folder / "clips").mkdir()
    for i in range(5):
        pixels = np.random.default_rng(i).integers(0, 255, (9, 32, 32, 3), dtype=np.uint8)
        video.write_video(folder / "clips" / f"{i}.mp4", pixels, 16)
        (folder / "clips" / f"{i}.txt").write_text(f"clip number {i}", "utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert (
            "next: inlaid check clips.yaml" in worked("new", "wan", "clips", "--checkpoint", tiny_wan).output
        )
        worked("train", "clips.yaml", *SHORT)
        yield folder


@pytest.fixture(autouse=True)
def _here(place: Path) -> None:
    """All tests work in that folder."""


def drawn(*arguments: object) -> list[np.ndarray]:
    """Runs `inlaid generate` with one step and gives the frames of the videos whose paths it prints.

    They are 64 wide: of narrower ones, x264 does not make the same file twice.
    """
    done = worked("generate", "runs/clips", *arguments, "--steps", 1, "--size", "64x64", "--frames", 5)
    return [video.read_frames(p, 0, 5, 16, (64, 64)) for p in done.out.split()]


# --- help ---------------------------------------------------------------------------------------------------


def test_help_names_every_command() -> None:
    message = worked("--help").output
    assert all(f" {name} " in message for name in COMMANDS)
    assert "inlaid demo" in message and "no download, no GPU" in message
    assert sorted(COMMANDS) == sorted(c.name or c.callback.__name__ for c in app.registered_commands)  # type: ignore[union-attr]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_names_its_arguments(command: str) -> None:
    message = worked(command, "--help").output
    missing = [word for word in COMMANDS[command] if word.lower() not in message.lower()]
    assert not missing, message


def test_help_imports_nothing_slow() -> None:
    code = (
        "import runpy, sys\n"
        "sys.argv = ['inlaid', '--help']\n"
        "try:\n    runpy.run_module('inlaid', run_name='__main__')\n"
        "finally:\n    print([m for m in ('torch', 'diffusers', 'numpy', 'pydantic') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "Usage" in done.stdout
    assert done.stdout.endswith("[]\n"), done.stdout[-200:]


def test_without_arguments_it_helps() -> None:
    assert "Commands" in inlaid().output


def test_our_own_mistakes_show_a_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise AssertionError("what we promised ourselves")

    monkeypatch.setattr(config, "load", broken)
    with pytest.raises(AssertionError, match="what we promised"):
        inlaid("train", "clips.yaml")


def test_a_developer_may_see_where_a_message_comes_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INLAID_TRACEBACK", "1")
    with pytest.raises(ValueError, match="no such recipe"):
        inlaid("train", "nowhere.yaml")


# --- from clips to an adapter -------------------------------------------------------------------------------


def test_new_writes_a_recipe_that_check_passes(tiny_wan: Path) -> None:
    text = Path("clips.yaml").read_text("utf-8")
    assert "# Made by `inlaid new wan clips` from 5 clips in folder layout." in text
    assert yaml.safe_load(text)["data"]["frames"] == [9]
    worked("new", "wan", "clips", "--out", "other.yaml", "--checkpoint", tiny_wan)
    done = worked("check", "other.yaml")
    assert "ready to train: 0 errors" in done.output
    report = json.loads(Path("runs/other/check/report.json").read_text("utf-8"))
    assert report["ok"] and Path("runs/other/check/contact_sheet.png").is_file()
    assert not list(Path("runs/other/cache").rglob("*.safetensors")), "nothing is encoded"


def test_cache_encodes_once() -> None:
    first = worked("cache", "clips.yaml", "run=runs/cached", "data.validation=0")
    assert first.output.endswith("5 encoded, 0 already cached: runs/cached/cache ")
    kept = files(Path("runs/cached/cache/media"))
    second = worked("cache", "clips.yaml", "run=runs/cached", "data.validation=0")
    assert second.output.endswith("0 encoded, 5 already cached: runs/cached/cache ")
    assert files(Path("runs/cached/cache/media")) == kept


def test_train_leaves_a_run() -> None:
    run = Run(Path("runs/clips"))
    assert [c.name for c in run.checkpoints()] == ["step-000002", "step-000004"]
    assert run.config().optim.lr == 0.05 and run.config().train.steps == 4
    assert ADAPTER.is_file() and (run.adapter / "README.md").is_file()
    lines = read_metrics(run.metrics)
    assert {"loss", "validation_loss"} <= {key for line in lines for key in line}


def test_a_finished_run_stays_as_it_is_and_goes_on_when_asked() -> None:
    before = files(Path("runs/clips/checkpoints"))
    done = worked("train", "runs/clips")
    assert "runs/clips" in done.output and "next: inlaid generate runs/clips" in done.output
    assert files(Path("runs/clips/checkpoints")) == before
    worked("train", "clips.yaml", *SHORT, "run=runs/more")
    done = worked("train", "runs/more", "train.steps=5")
    assert "resuming after step 4" in done.output
    assert Run(Path("runs/more")).checkpoints()[-1].name == "step-000005"


# --- videos -------------------------------------------------------------------------------------------------


def test_generate_takes_every_option() -> None:
    options = ["--count", 2, "--size", "48x32", "--frames", 5, "--steps", 1, "--guidance", 1.5, "--seed", 7]
    options += ["--negative", "dark", "--out", "videos", "--device", "cpu"]
    done = worked("generate", "runs/clips", "a red ball", "a blue ball", *options)
    paths = [Path(line) for line in done.out.splitlines()]
    assert [p.name for p in paths] == [
        "00-a-red-ball-seed7.mp4",
        "00-a-red-ball-seed8.mp4",
        "01-a-blue-ball-seed7.mp4",
        "01-a-blue-ball-seed8.mp4",
    ]
    probe = video.probe(paths[0])
    assert (probe.frames, probe.height, probe.width) == (5, 48, 32)
    about = json.loads(paths[1].with_suffix(".json").read_text("utf-8"))
    wanted = {"prompt": "a red ball", "seed": 8, "size": [48, 32], "frames": 5, "steps": 1, "guidance": 1.5}
    wanted |= {"negative_prompt": "dark", "strength": 1.0, "checkpoint": "adapter", "run": "runs/clips"}
    assert wanted.items() <= about.items()
    assert about["versions"]["torch"] == torch.__version__


def test_generate_takes_prompts_from_a_file() -> None:
    Path("prompts.txt").write_text("\ufeffa cat\n\n  a dog  \n", "utf-8")
    done = worked("generate", "runs/clips", "--file", "prompts.txt", "--steps", 1)
    assert [Path(p).name for p in done.out.split()] == ["00-a-cat-seed42.mp4", "01-a-dog-seed42.mp4"]
    assert all(p.startswith("runs/clips/samples/generated/") for p in done.out.split())


def test_strength_goes_from_the_base_to_what_was_trained() -> None:
    (base,) = drawn("a cat", "--checkpoint", "base")
    (none,) = drawn("a cat", "--strength", 0)
    (half,) = drawn("a cat", "--strength", 0.5)
    (whole,) = drawn("a cat")
    (early,) = drawn("a cat", "--checkpoint", "step-000002")
    assert np.array_equal(base, none)
    for other in (half, whole, early):
        assert not np.array_equal(base, other)
    assert not np.array_equal(half, whole) and not np.array_equal(early, whole)
    assert np.array_equal(drawn("a cat", "--checkpoint", "4")[0], whole)


@pytest.mark.slow
def test_strength_of_a_dora_is_not_linear() -> None:
    worked("train", "clips.yaml", *SHORT, "run=runs/dora", "tuner.kind=dora", "train.steps=1")
    done = worked("generate", "runs/dora", "a cat", "--strength", 0.5)
    assert "note: DoRA is not linear in its strength" in done.output
    assert "yes, magnitudes as in peft" in worked("inspect", "runs/dora").output


def test_a_full_fine_tune_is_used_like_an_adapter() -> None:
    recipe = yaml.safe_load(Path("clips.yaml").read_text("utf-8")) | {"tuner": {"kind": "full"}}
    Path("full.yaml").write_text(yaml.safe_dump(recipe), "utf-8")
    worked("train", "full.yaml", *SHORT[:-1], "run=runs/full", "train.steps=1")
    for strength in (0, 1):
        assert len(worked("generate", "runs/full", "a cat", "--strength", strength).out.split()) == 1
    for target in ("diffusers", "merged"):
        folder = Path(worked("export", "runs/full", "--to", target).out.strip())
        assert files(folder) == files(Path("runs/full/adapter"))
    path = worked("export", "runs/full", "--to", "comfyui", "--dtype", "bfloat16")
    assert path.out.strip() == "runs/full/export/full-comfyui-model.safetensors"
    assert "ComfyUI/models/diffusion_models" in path.err and "note: other programs assume" in path.err
    assert "head.modulation" in load_file(path.out.strip())
    refused = inlaid("export", "runs/full", "--to", "wan-alpha")
    assert refused.code == 2 and "takes adapters only, not a whole model; use `merged`" in refused.output
    assert "WanTransformer3DModel" in worked("inspect", "runs/full").output


@pytest.mark.slow
def test_evaluate_writes_a_report() -> None:
    Path("one.txt").write_text("a cat\n", "utf-8")
    done = worked("evaluate", "runs/clips", "--file", "one.txt", "--count", 2, "--steps", 1, "--seed", 3)
    page = Path(done.out.strip())
    assert page.name == "report.html" and "data:video/mp4" in page.read_text("utf-8")
    report = json.loads((page.parent / "report.json").read_text("utf-8"))
    assert [pair["seed"] for pair in report["pairs"]] == [3, 4]
    assert "base" in done.err and "tuned" in done.err
    done = worked("evaluate", "runs/clips", "--against", "step-000002", "--file", "one.txt", "--steps", 1)
    assert "step-000002" in done.err


# --- other programs -----------------------------------------------------------------------------------------


def same(a: Path, b: Path) -> bool:
    x, y = load_file(a), load_file(b)
    return x.keys() == y.keys() and all(torch.allclose(x[k], y[k].float(), atol=1e-6) for k in x)


@pytest.mark.parametrize("target", ["diffusers", "comfyui", "kohya"])
def test_export_and_import_again(target: str, tiny_wan: Path) -> None:
    path = Path(worked("export", "runs/clips", "--to", target).out.strip())
    assert path.is_file() and path.is_relative_to("runs/clips/export")
    facts = worked("inspect", path).output
    assert f"layout {target}" in facts and "rank 2" in facts
    done = worked("import", path, f"imported-{target}", "--checkpoint", tiny_wan)
    assert done.out.strip() == f"imported-{target}/{ADAPTER.name}"
    assert f"note: {target}: " in done.output and "rank 2, LoRA" in done.output
    ours, theirs = load_file(ADAPTER), load_file(done.out.strip())
    if target == "kohya":  # which needs all layers or none: those that were not trained are zero
        assert all(not v.any() for k, v in theirs.items() if k not in ours and "lora_B" in k)
    for key in ours:
        assert torch.allclose(ours[key], theirs[key].float(), atol=1e-6), key


def test_export_of_a_checkpoint_to_a_place() -> None:
    done = worked(
        "export", "runs/clips", "--to", "comfyui", "--checkpoint", "2", "--out", "early.safetensors"
    )
    assert done.out == "early.safetensors\n"
    worked("import", "early.safetensors", "early")
    assert same(
        Path("runs/clips/checkpoints/step-000002/adapter") / ADAPTER.name, Path("early", ADAPTER.name)
    )


def test_export_of_merged_weights_is_a_network(tiny_wan: Path) -> None:
    from diffusers import WanTransformer3DModel

    folder = Path(worked("export", "runs/clips", "--to", "merged").out.strip())
    merged = WanTransformer3DModel.from_pretrained(folder).state_dict()
    base = WanTransformer3DModel.from_pretrained(tiny_wan, subfolder="transformer").state_dict()
    changed = {k for k in base if not torch.equal(base[k], merged[k])}
    layers = {k.split(".lora_")[0].removeprefix("transformer.") for k in load_file(ADAPTER)}
    assert changed == {f"{layer}.weight" for layer in layers}
    assert "class WanTransformer3DModel" in worked("inspect", folder).output


def test_inspect_tells_what_each_thing_is(tiny_wan: Path) -> None:
    item = next(Path("runs/clips/cache/media").rglob("*.safetensors"))
    step = Path("runs/clips/checkpoints/step-000004")
    expected: dict[Path, list[str]] = {
        ADAPTER: [
            "adapter",
            "family wan",
            "layout diffusers",
            "rank 2",
            "alpha 2",
            "DoRA no",
            "inlaid_step 4",
        ],
        ADAPTER.parent: ["adapter", "family wan"],
        item: ["cached item", "latents float16 [16, 3, 4, 4]", "inlaid_cache 1", "window"],
        step: ["checkpoint", "step 4", "trainer.safetensors: tensors", "layout diffusers"],
        step / "trainer.safetensors": ["tensors"],
        Path("runs/clips"): ["run", "checkpoints 2, 4", "layout diffusers"],
        tiny_wan: ["pipeline", "class WanPipeline", "vae AutoencoderKLWan"],
        tiny_wan / "vae": ["model", "class AutoencoderKLWan", "z_dim 16"],
    }
    for path, words in expected.items():
        message = worked("inspect", path).output
        assert message.startswith(f"{path}") and f": {words[0]} " in message, message
        assert not [word for word in words if word not in message], message


@pytest.mark.parametrize("theirs", [{}, {"GOMP_SPINCOUNT": "7"}, {"OMP_WAIT_POLICY": "active"}])
def test_waiting_threads_sleep_unless_the_user_says_otherwise(
    monkeypatch: pytest.MonkeyPatch, theirs: dict[str, str]
) -> None:
    """Beside another busy process, threads that spin make a step 3.4 times as long (benchmarks/busy.py)."""
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.setenv(name, "")  # restored after the test
        monkeypatch.delenv(name)
    for name, value in theirs.items():
        monkeypatch.setenv(name, value)
    assert inlaid("--help").code == 0
    found = {name: os.environ[name] for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY") if name in os.environ}
    assert found == (theirs or {"GOMP_SPINCOUNT": "1000"})
