"""What goes wrong in caching and training: one clear message, exit code 2, no traceback."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from inlaid.data import cache as cache_module
from inlaid.runs.folder import Run
from inlaid.training import checkpoints
from inlaid.training.steps import DenoisingStep
from support.commands import files, inlaid
from support.ground import WEIGHTS, Ground, cut, refused
from support.slow import slow

NO_SPACE = "Error while serializing: I/O error: No space left on device (os error 28)"


# --- the cache ----------------------------------------------------------------------------------------------


def items(folder: Path | str = "cache") -> list[Path]:
    return sorted(Path(folder).rglob("*.safetensors"))


FULL = (
    SafetensorError(NO_SPACE),
    ["cache: the disk is full (No space left on device", "; 2 of 3 items are cached and kept"],
)
READ_ONLY = (
    SafetensorError("I/O error: Read-only file system (os error 30)"),
    ["cache: cannot be written (Read-only file system); 2 of 3 items are cached", "data.cache"],
)


@pytest.mark.parametrize(
    ("bad_clips", "error", "words"),
    [("stop", *FULL), slow("stop", *READ_ONLY), slow("quarantine", *FULL), ("quarantine", *READ_ONLY)],
)
def test_cache_that_cannot_be_written(
    ground: Ground, monkeypatch: pytest.MonkeyPatch, error: Exception, words: list[str], bad_clips: str
) -> None:
    written: list[Path] = []

    def full(tensors: Any, path: Path, metadata: Any = None) -> None:
        if len(written) == 2:
            path.write_bytes(b"half of it")
            raise error
        written.append(path)
        save_file(tensors, path, metadata=metadata)

    recipe = ground.write(data__cache="cache", data__bad_clips=bad_clips)
    with monkeypatch.context() as patch:
        patch.setattr(cache_module, "save_file", full)
        refused(inlaid("cache", recipe), *words)
    kept = {p: p.read_bytes() for p in items()}
    assert len(kept) == 2
    done = inlaid("cache", recipe)
    assert done.code == 0 and "1 encoded, 2 already cached" in done.output
    assert {p: p.read_bytes() for p in kept} == kept, "what was encoded stays as it was"


def test_ctrl_c_while_caching(ground: Ground, monkeypatch: pytest.MonkeyPatch) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs start without it
    for command in ("cache", "train"):
        written: list[Path] = []

        def stopped(tensors: Any, path: Path, metadata: Any = None, written: list[Path] = written) -> None:
            if len(written) == 2:
                os.kill(os.getpid(), signal.SIGINT)
            written.append(path)
            save_file(tensors, path, metadata=metadata)

        monkeypatch.setattr(cache_module, "save_file", stopped)
        done = inlaid(command, ground.write(data__cache=command))
        refused(done, code=130)
        assert "interrupted: finished work is kept; run the same command again" in done.output
        assert len(items(command)) == 2 and not list(Path().rglob(".tmp-*"))
        monkeypatch.setattr(cache_module, "save_file", save_file)
        done = inlaid("cache", ground.write(data__cache=command))
        assert done.code == 0 and "1 encoded, 2 already cached" in done.output


GARBLED: Mapping[str, Callable[[bytes], bytes]] = {
    "truncated": lambda b: b[:-10],
    "cut in its header": lambda b: b[:40],
    "empty": lambda b: b"",
    "garbled header": lambda b: b.replace(b"data_offsets", b"data-offsets"),
    "header of another kind": lambda b: b"\x02" + bytes(7) + b"[]",
    "endless header": lambda b: b"\xff" * 100,
}


@pytest.mark.parametrize(
    ("case", "kind"),
    [
        (case, kind) if (i + k) % 2 == 0 else slow(case, kind)
        for i, case in enumerate(GARBLED)
        for k, kind in enumerate(("media", "text"))
    ],
)
def test_damaged_item_is_encoded_again(ground: Ground, case: str, kind: str) -> None:
    shutil.copytree(ground.cache, "cache")
    damaged = items(f"cache/{kind}")[0]
    whole = {k: v.clone() for k, v in load_file(damaged).items()}  # not a view of what is cut
    damaged.write_bytes(GARBLED[case](damaged.read_bytes()))
    done = inlaid("cache", ground.write(data__cache="cache"))
    assert done.code == 0 and "error" not in done.output
    again = load_file(damaged)
    assert again.keys() == whole.keys() and all(torch.equal(again[k], whole[k]) for k in whole)


@pytest.mark.parametrize("kind", ["media", "text"])
def test_item_that_was_changed(ground: Ground, kind: str) -> None:
    """A flipped bit cannot be seen from outside; it is found when the item is read."""
    shutil.copytree(ground.cache, "cache")
    for path in items(f"cache/{kind}"):
        data = bytearray(path.read_bytes())
        data[-5] ^= 1
        path.write_bytes(bytes(data))
    message = refused(
        inlaid("train", ground.write(data__cache="cache")),
        ".safetensors: cached item was modified after it was written: delete the file and run again",
    )
    assert f"cache/{kind}/" in message
    assert not Path("run/checkpoints").exists()


@pytest.mark.parametrize("place", ["file", "file/run"])
def test_run_that_cannot_be_written(ground: Ground, place: str) -> None:
    Path("file").write_text("mine", "utf-8")
    refused(
        inlaid("train", ground.write(run=place)),
        f"run: {place} cannot be a folder, because ",
        "is a file: choose another",
    )
    assert Path("file").read_text("utf-8") == "mine"


def test_cache_in_the_way_of_a_file(ground: Ground) -> None:
    Path("file").write_text("mine", "utf-8")
    refused(inlaid("cache", ground.write(data__cache="file")), "file: cannot be written (Not a directory)")
    assert Path("file").read_text("utf-8") == "mine"


def test_run_on_a_read_only_disk(ground: Ground, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(ground.run, "run")
    before = files(Path("run"))

    def replace(*_: Any) -> None:
        raise OSError(30, "Read-only file system", "x", None, "y")

    with monkeypatch.context() as patch:
        patch.setattr("inlaid.files.os.replace", replace)
        done = inlaid("train", ground.write(train__steps=3))
    refused(done, "run: the run folder cannot be written (Read-only file system)", "run=...")
    assert files(Path("run")) == before


# --- training -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tuner", "words"),
    [
        ({"targets": ["proj_in"]}, ["`proj_in` matches no linear or convolution layer", "patch_embedding"]),
        (
            {"targets": ["to_q"]},
            ["`to_q` matches no linear", "`.*to_q` would match 4, such as blocks.0.attn1.to_q"],
        ),
        ({"targets": ["blocks.("]}, ["`blocks.(` is not a regular expression", "unterminated subpattern"]),
        ({"kind": "full", "targets": ["nothing"]}, ["`nothing` matches no parameter", "scale_shift_table"]),
    ],
)
def test_targets(ground: Ground, tuner: dict[str, Any], words: list[str]) -> None:
    refused(inlaid("train", ground.write(tuner=tuner, data__cache="cache")), "tuner.targets: ", *words)
    assert not Path("cache").exists(), "found before the clips are encoded"


@pytest.mark.parametrize(
    ("changes", "module", "words"),
    [
        ({"optim": {"name": "adamw8bit"}}, "bitsandbytes.optim", ["optim.name: `adamw8bit`", "inlaid[bnb]"]),
        ({"optim": {"name": "prodigy"}}, "prodigyopt", ["optim.name: `prodigy`", "inlaid[prodigy]"]),
        (
            {"train__trackers": ["tensorboard"]},
            "torch.utils.tensorboard",
            ["train.trackers: `tensorboard`", "pip install 'tensorboard'"],
        ),
        ({"train__trackers": ["wandb"]}, "wandb", ["train.trackers: `wandb`", "pip install 'inlaid[wandb]'"]),
    ],
)
def test_missing_package(
    ground: Ground, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], module: str, words: list[str]
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    message = refused(inlaid("train", ground.write(data__cache="cache", **changes)), *words)
    assert "needs a package that is not installed" in message
    assert not Path("cache").exists(), "found before the clips are encoded"


def test_tracker_that_does_not_start(ground: Ground, monkeypatch: pytest.MonkeyPatch) -> None:
    class Wandb:
        @staticmethod
        def init(**_: Any) -> None:
            raise RuntimeError("api_key not configured")

    monkeypatch.setitem(sys.modules, "wandb", Wandb)  # type: ignore[arg-type]
    refused(
        inlaid("train", ground.write(train__trackers=["wandb"])),
        "train.trackers: `wandb` does not start (api_key not configured); log in to it, or remove it",
    )


def test_loss_that_is_not_finite(ground: Ground) -> None:
    recipe = ground.write(optim={"lr": 1e30, "clip": None}, train__steps=20)
    message = refused(inlaid("train", recipe), "the loss stopped being finite at step", "lower optim.lr")
    assert "(clips: " in message and ".mp4)" in message
    assert Run(Path("run")).checkpoints(), "the checkpoints before it stay"


def test_out_of_memory(ground: Ground, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ...")

    monkeypatch.setattr(DenoisingStep, "__call__", full)
    refused(
        inlaid("train", ground.write()), "CUDA out of memory: lower data.size, data.frames or train.batch"
    )


def test_disk_full_while_saving(ground: Ground, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checkpoint before it stays whole, and the same command goes on from there to the same weights."""
    saved: list[Path] = []

    def full(tensors: Any, path: Path) -> None:
        saved.append(path)
        if len(saved) == 2:
            Path(path).write_bytes(b"half of it")
            raise SafetensorError(NO_SPACE)
        save_file(tensors, path)

    recipe = ground.write()
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "save_file", full)
        words = (
            "run/checkpoints/step-000002: No space left on device (it needs more than ",
            "free disk space",
        )
        refused(inlaid("train", recipe), *words)
    assert [p.name for p in Run(Path("run")).checkpoints()] == ["step-000001"]
    assert not list(Path().rglob(".tmp-*"))
    assert inlaid("train", recipe).code == 0
    ours, theirs = load_file(f"run/{WEIGHTS}"), load_file(ground.run / WEIGHTS)
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)


LAST = "run/checkpoints/step-000002"

DAMAGED: dict[str, tuple[Callable[[], Any], list[str]]] = {
    "truncated weights": (
        lambda: cut(Path(LAST, "trainer.safetensors")),
        ["missing, truncated or changed: trainer.safetensors"],
    ),
    "no weights": (
        lambda: Path(LAST, "trainer.safetensors").unlink(),
        ["missing, truncated or changed: trainer.safetensors"],
    ),
    "truncated adapter": (lambda: cut(Path(LAST, WEIGHTS)), [f"missing, truncated or changed: {WEIGHTS}"]),
    "no state": (lambda: Path(LAST, "state.json").unlink(), ["state.json: No such file or directory"]),
    "garbled state": (lambda: Path(LAST, "state.json").write_text("{{"), ["state.json: Expecting property"]),
    "state of another kind": (lambda: Path(LAST, "state.json").write_text("[]"), ["state.json"]),
    "state without values": (
        lambda: Path(LAST, "state.json").write_text('{"files": {}}'),
        ["step in state.json"],
    ),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_checkpoint(ground: Ground, case: str) -> None:
    damage, words = DAMAGED[case]
    shutil.copytree(ground.run, "run")
    damage()
    before = files(Path("run/checkpoints"))
    recipe = ground.write(train__steps=3)
    refused(inlaid("train", recipe), f"{LAST}: this checkpoint is damaged (", *words, "delete the folder")
    assert files(Path("run/checkpoints")) == before
    if case == "truncated weights":  # the way out that the message names
        shutil.rmtree(LAST)
        done = inlaid("train", recipe)
        assert done.code == 0 and "resuming after step 1" in done.output


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"optim": {"lr": 0.5}},
            ["run: this run was started with another recipe", "optim.lr was 0.0001, is 0.5"],
        ),
        ({"tuner__rank": 8}, ["tuner.rank was 2, is 8", "restore these values to resume, or choose another"]),
        ({"train__accumulate": 2}, ["1 micro-batches per step", "this launch has 2", "train.accumulate"]),
    ],
)
def test_another_recipe(ground: Ground, changes: dict[str, Any], words: list[str]) -> None:
    shutil.copytree(ground.run, "run")
    before = files(Path("run/checkpoints"))
    refused(inlaid("train", ground.write(train__steps=3, **changes)), *words)
    assert files(Path("run/checkpoints")) == before
