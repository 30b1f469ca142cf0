"""What people do wrong with runs and adapters: one clear message, exit code 2, no traceback."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from support.commands import files, inlaid
from support.ground import WEIGHTS, Evil, Ground, cut, raw, refused

# --- use ----------------------------------------------------------------------------------------------------


def broken_run(damage: Callable[[Path], Any]) -> Callable[[Ground], Path]:
    """A copy of the run with something done to its adapter file."""

    def make(ground: Ground) -> Path:
        shutil.copytree(ground.run, "run")
        damage(Path("run") / WEIGHTS)
        return Path("run")

    return make


def widened(path: Path) -> None:
    """Makes an adapter for a wider network."""
    wide = {k: torch.zeros(2, 999) if "lora_A" in k else v.clone() for k, v in load_file(path).items()}
    save_file(wide, path)


def untrained(ground: Ground) -> Path:
    Path("new").mkdir()
    shutil.copy(ground.run / "config.yaml", "new")
    return Path("new")


GENERATE: dict[str, tuple[Callable[[Ground], Any], list[Any], list[str]]] = {
    "no such run": (lambda g: "nowhere", ["a cat"], ["nowhere: not a run folder (it has no config.yaml)"]),
    "another folder": (lambda g: g.clips, ["a cat"], ["not a run folder", "`inlaid train` creates"]),
    "nothing trained": (
        untrained,
        ["a cat"],
        ["new: nothing is trained yet; run `inlaid train` first", "base"],
    ),
    "no prompt": (lambda g: g.run, [], ["generate: no prompt; pass prompts or --file"]),
    "empty prompt": (lambda g: g.run, [" "], ["generate: prompt is missing or empty"]),
    "size": (lambda g: g.run, ["a", "--size", "32"], ["--size: `32` is not HEIGHTxWIDTH; write for"]),
    "odd size": (lambda g: g.run, ["a", "--size", "33x32"], ["33x32 is not a multiple of 16: use 32x32"]),
    "more than memory": (
        lambda g: g.run,
        ["a", "--size", "160000x160000"],
        ["frames of 160000x160000 are", "of pixels, above the limit of 4: set INLAID_MAX_ARRAY_GB"],
    ),
    "endless strength": (
        lambda g: g.run,
        ["a", "--strength", "1e30"],
        ["strength 1e+30 is not a number from -100 to 100"],
    ),
    "length": (lambda g: g.run, ["a", "--frames", "8"], ["8 frames is not 4n+1: use 5 or 9"]),
    "no frames": (lambda g: g.run, ["a", "--frames", "0"], ["sample.frames", "equal to 1 (got 0)"]),
    "no steps": (lambda g: g.run, ["a", "--steps", "0"], ["sample.steps", "equal to 1 (got 0)"]),
    "guidance": (lambda g: g.run, ["a", "--guidance", "-1"], ["sample.guidance", "equal to 0 (got -1.0)"]),
    "strength": (
        lambda g: g.run,
        ["a", "--strength", "nan"],
        ["strength nan is not a number from -100 to 100, such as 0.5"],
    ),
    "steps in words": (lambda g: g.run, ["a", "--steps", "few"], ["Invalid value for '--steps'"]),
    "no videos": (lambda g: g.run, ["a", "--count", "0"], ["Invalid value for '--count'"]),
    "folder that is a file": (
        lambda g: g.run,
        ["a", "--out", "blank.txt"],
        ["generate: blank.txt is a file; pass a folder with --out"],
    ),
    "endless seed": (lambda g: g.run, ["a", "--seed", "9" * 30], ["sample.seed: should be less than"]),
    "misspelt option": (
        lambda g: g.run,
        ["a", "--strenght", "1"],
        ["No such option: --strenght", "--strength"],
    ),
    "unknown checkpoint": (
        lambda g: g.run,
        ["a", "--checkpoint", "step-9"],
        ["no checkpoint `step-9`; available: step-000001, step-000002"],
    ),
    "no such file": (lambda g: g.run, ["--file", "no.txt"], ["--file: ", "no.txt", "No such file"]),
    "file without prompts": (
        lambda g: g.run,
        ["--file", "blank.txt"],
        ["blank.txt contains no prompt", "line"],
    ),
    "file that is no text": (lambda g: g.run, ["--file", "latin.txt"], ["--file: ", "latin.txt", "UTF-8"]),
    "unknown device": (lambda g: g.run, ["a", "--device", "tpu"], ["runtime.device", "'cpu' (got 'tpu')"]),
    "truncated adapter": (broken_run(cut), ["a"], [WEIGHTS, "truncated or damaged", "copy it again"]),
    "empty adapter": (broken_run(lambda p: p.write_bytes(b"")), ["a"], [f"run/{WEIGHTS}: the file is empty"]),
    "no adapter": (broken_run(lambda p: p.unlink()), ["a"], ["run/adapter: no adapter file"]),
    "adapter of a wider network": (
        broken_run(widened),
        ["a"],
        ["trained on a network of another size", "24 x 999 in the adapter and 24 x 24 in the network"],
    ),
    "pickle for an adapter": (
        broken_run(lambda p: p.write_bytes(pickle.dumps(Evil()))),
        ["a"],
        ["a pickle with the extension of a safetensors file: not loaded, it could run code"],
    ),
}


@pytest.mark.parametrize("case", GENERATE)
def test_generate(ground: Ground, case: str) -> None:
    make, arguments, words = GENERATE[case]
    Path("blank.txt").write_text("\n \n", "utf-8")
    Path("latin.txt").write_bytes("Käse".encode("latin-1"))
    refused(inlaid("generate", make(ground), "--out", "videos", *arguments), *words)
    assert not Path("videos").exists() and not Path("opened").exists()


def test_full_fine_tune(ground: Ground) -> None:
    run = untrained(ground)
    (run / "config.yaml").write_text(json.dumps(ground.recipe(tuner={"kind": "full"})), "utf-8")
    refused(
        inlaid("generate", run, "a cat", "--strength", "0.5"),
        "strength 0.5 is not possible for a full fine-tune; use 0 or 1, or train a LoRA",
    )
    shutil.copytree(ground.checkpoint / "transformer", run / "adapter")
    cut(run / "adapter/diffusion_pytorch_model.safetensors")
    for command in (["generate", run, "a cat"], ["evaluate", run]):
        refused(inlaid(*command), "error: new/adapter cannot be loaded (", "may be incomplete")
    assert not (run / "report").exists()


@pytest.mark.parametrize(
    ("make", "arguments", "words"),
    [
        (lambda g: "nowhere", [], ["nowhere: not a run folder"]),
        (untrained, [], ["new: nothing is trained yet"]),
        (lambda g: g.run, ["--checkpoint", "7"], ["no checkpoint `7`; available: step-000001, step-000002"]),
        (
            lambda g: g.run,
            ["--checkpoint", "base"],
            ["base would be compared with itself; choose"],
        ),
        (lambda g: g.run, ["--file", "blank.txt"], ["blank.txt contains no prompt; write one per line"]),
        (broken_run(cut), [], [WEIGHTS, "truncated or damaged", "copy it again"]),
    ],
)
def test_evaluate(ground: Ground, make: Any, arguments: list[str], words: list[str]) -> None:
    Path("blank.txt").write_text("\n", "utf-8")
    run = make(ground)
    refused(inlaid("evaluate", run, *arguments), *words)
    assert not Path(run, "report").exists()


# --- adapters of other trainers -----------------------------------------------------------------------------


def adapter(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Any:
    """Writes the run's adapter with other tensors, and no word on alpha."""

    def put(path: Path, ground: Ground) -> None:
        save_file(change(load_file(ground.run / WEIGHTS)), path)

    return put


ADAPTERS: dict[str, tuple[str, Any, list[Any], list[str]]] = {
    "missing": ("a.safetensors", lambda p, g: None, [], ["a.safetensors: no such file or folder"]),
    "pickle": (
        "a.safetensors",
        raw(lambda b: pickle.dumps(Evil())),
        [],
        ["a.safetensors: a pickle with the extension of a safetensors file: not loaded, it could run code"],
    ),
    "torch file": (
        "a.safetensors",
        lambda p, g: torch.save({"x": torch.zeros(2)}, p),
        [],
        ["a.safetensors: a pickle with the extension of a safetensors file"],
    ),
    "malicious pickle": (
        "a.bin",
        raw(lambda b: pickle.dumps(Evil())),
        [],
        ["a.bin: a pickle that runs code: not loaded"],
    ),
    "malicious torch file": (
        "a.pt",
        lambda p, g: torch.save({"x": Evil()}, p),
        [],
        ["a.pt: a pickle that calls posix.mkdir: not loaded"],
    ),
    "truncated": ("a.safetensors", raw(lambda b: b[:-40]), [], ["truncated or damaged", "copy it again"]),
    "cut in its header": (
        "a.safetensors",
        raw(lambda b: b[:30]),
        [],
        ["a.safetensors: truncated: the header alone needs", "bytes, the file has 30: copy it again"],
    ),
    "empty": ("a.safetensors", raw(lambda b: b""), [], ["a.safetensors: the file is empty"]),
    "empty torch file": ("a.bin", raw(lambda b: b""), [], ["a.bin: the file is empty"]),
    "noise": ("a.safetensors", raw(lambda b: b"\x07" * 500), [], ["a.safetensors: not a safetensors file"]),
    "text": (
        "a.txt",
        raw(lambda b: b"an adapter, honestly"),
        [],
        ["a.txt: neither a safetensors nor a torch"],
    ),
    "folder without one": ("a", lambda p, g: p.mkdir(), [], ["a: no adapter file"]),
    "another architecture": (
        "a.safetensors",
        adapter(lambda t: {"unet.down.lora_A.weight": torch.zeros(2, 3)}),
        [],
        ["no tensor matches a layer of Wan (unet.down.lora_A.weight): another architecture, or not an"],
    ),
    "unknown key": (
        "a.safetensors",
        adapter(lambda t: {**t, "something.else": torch.zeros(2)}),
        [],
        ["1 tensors match no layer of Wan (something.else)"],
    ),
    "half of the factors": (
        "a.safetensors",
        adapter(lambda t: {k: v for k, v in t.items() if "lora_A" in k}),
        [],
        ["20 layers lack a factor, A or B (blocks.0.attn1.to_k has A"],
    ),
    "not finite": (
        "a.safetensors",
        adapter(lambda t: {k: v * torch.nan for k, v in t.items()}),
        [],
        ["20 layers with values that are not finite numbers (blocks.0.attn1.to_k", "and 16 more)"],
    ),
    "wider network": (
        "a.safetensors",
        adapter(lambda t: {k: torch.zeros(2, 999) if "lora_A" in k else v for k, v in t.items()}),
        ["--checkpoint", "BASE"],
        ["trained on a network of another size", "24 x 999 in the adapter and 24 x 24 in the network"],
    ),
    "unknown family": ("a.safetensors", raw(bytes), ["--family", "sora"], ["model.family: no family `sora`"]),
    "alpha of zero": (
        "a.safetensors",
        raw(bytes),
        ["--alpha", "0"],
        ["--alpha: 0 is not a finite number above 0"],
    ),
    "alpha that differs": (
        "a.safetensors",
        raw(bytes),
        ["--alpha", "7"],
        ["--alpha is 7, but the file stores alpha 2: omit --alpha"],
    ),
    "unknown rule": (
        "a.safetensors",
        raw(bytes),
        ["--dora-scale", "kohya"],
        ["--dora-scale: `kohya` is not comfyui or merged"],
    ),
}


@pytest.mark.parametrize("case", ADAPTERS)
def test_import(ground: Ground, case: str) -> None:
    name, put, options, words = ADAPTERS[case]
    put(Path(name), ground)
    options = [ground.checkpoint if x == "BASE" else x for x in options]
    refused(inlaid("import", name, "out", *options), *words)
    assert not Path("out").exists() and not Path("opened").exists()
    if case in (
        "missing",
        "pickle",
        "malicious pickle",
        "malicious torch file",
        "truncated",
        "empty",
        "noise",
    ):
        refused(inlaid("inspect", name), *words)
        assert not Path("opened").exists()


def test_import_onto_something(ground: Ground) -> None:
    Path("mine").mkdir()
    Path("mine/notes").write_text("keep", "utf-8")
    for place in ("mine", "mine/notes"):
        refused(
            inlaid("import", ground.run / "adapter", place),
            f"{place} exists and is not empty; choose another folder",
        )
    assert files(Path("mine")) == {"notes": b"keep"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere", "--to", "merged"], ["nowhere: not a run folder"]),
        (["RUN", "--to", "onnx"], ["--to: `onnx` is not one of diffusers, merged, comfyui, musubi"]),
        (["RUN"], ["Missing option '--to'", "--to comfyui --merge: ComfyUI", "--to merged: diffusers"]),
        (["RUN", "--to", "comfyui", "--dtype", "bfloat16"], ["--dtype: adapters keep their dtype"]),
        (["RUN", "--to", "comfyui", "--out", "a.pt"], ["--out: comfyui reads a .safetensors file"]),
        (["RUN", "--to", "merged", "--dtype", "int8"], ["--dtype: `int8` is not one of float32, bfloat16"]),
        (["RUN", "--to", "merged", "--checkpoint", "7"], ["no checkpoint `7`; available: step-000001"]),
        (
            ["RUN", "--to", "comfyui", "--out", "there"],
            ["there already exists; choose another path with --out"],
        ),
    ],
)
def test_export(ground: Ground, arguments: list[Any], words: list[str]) -> None:
    Path("there").write_text("keep", "utf-8")
    refused(inlaid("export", *[ground.run if x == "RUN" else x for x in arguments]), *words)
    assert files(Path()) == {"there": b"keep"}


def test_inspect_what_is_nothing(ground: Ground) -> None:
    Path("folder").mkdir()
    refused(inlaid("inspect", "nowhere"), "nowhere: no such file or folder")
    refused(inlaid("inspect", "folder"), "folder: no adapter, cached item, checkpoint, run or model in this")
    refused(inlaid("inspect", ground.clips / "0.mp4"), "0.mp4: neither a safetensors nor a torch file")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["sora", "CLIPS"], ["model.family: no family `sora`; choose from: ", "wan"]),
        (["wan", "nowhere"], ["nowhere: no such file or folder"]),
        (["wan", "empty"], ["empty: contains no clips"]),
        (["wan", "CLIPS", "--checkpoint", "CLIPS"], ["clips is not a diffusers folder"]),
        (["wan", "CLIPS", "--checkpoint", "BASE", "--out", "mine.yaml"], ["mine.yaml: already exists"]),
    ],
)
def test_new(ground: Ground, arguments: list[Any], words: list[str]) -> None:
    Path("empty").mkdir()
    Path("mine.yaml").write_text("keep", "utf-8")
    known = {"CLIPS": ground.clips, "BASE": ground.checkpoint}
    refused(inlaid("new", *[known.get(x, x) for x in arguments]), *words)
    assert files(Path()) == {"mine.yaml": b"keep"}


# --- the whole way ------------------------------------------------------------------------------------------


def test_a_process_of_its_own(ground: Ground) -> None:
    """What a shell sees: one line on standard error, nothing on standard output, the exit code."""
    command = [sys.executable, "-m", "inlaid", "train", "missing.yaml"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: missing.yaml") and done.stderr.count("\n") == 1


def test_misspelt_command(ground: Ground) -> None:
    refused(inlaid("trian", "r.yaml"), "No such command 'trian'", "train")
    refused(inlaid("train"), "Missing argument")
