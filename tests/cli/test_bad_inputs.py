"""Every mistake that a person can make ends in one message that names the thing, the value and the way out.

The exit code is 2 (130 after Ctrl-C), no traceback is shown, and nothing is lost or left half-written.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from inlaid.data import cache as cache_module
from inlaid.media import video
from inlaid.runs.folder import Run
from inlaid.runs.launch import Devices
from inlaid.training import checkpoints
from inlaid.training.steps import DenoisingStep
from support import videos
from support.commands import Done, files, inlaid

WEIGHTS = "adapter/pytorch_lora_weights.safetensors"
NO_SPACE = "Error while serializing: I/O error: No space left on device (os error 28)"


@dataclass(frozen=True)
class Ground:
    """What all tests stand on and none may change."""

    clips: Path
    cache: Path
    checkpoint: Path
    run: Path

    def recipe(self, **changes: Any) -> dict[str, Any]:
        """A recipe that works; keyword `section__key` changes a value, None removes a section."""
        raw: dict[str, Any] = {
            "run": "run",
            "model": {"family": "wan", "checkpoint": str(self.checkpoint)},
            "data": {
                "sources": str(self.clips),
                "size": [32, 32],
                "frames": 9,
                "validation": 0,
                "cache": str(self.cache),
            },
            "tuner": {"kind": "lora", "rank": 2},
            "train": {"steps": 2, "save_every": 1, "log_every": 1, "trackers": []},
            "sample": {"prompts": ["a cat"], "steps": 1},
        }
        for key, value in changes.items():
            section, _, name = key.partition("__")
            if name:
                raw[section] = {**raw.get(section, {}), name: value}
            elif value is None:
                del raw[section]
            else:
                raw[section] = value
        return raw

    def write(self, **changes: Any) -> Path:
        """The same as a file in the current folder."""
        path = Path("r.yaml")
        path.write_text(json.dumps(self.recipe(**changes)), "utf-8")  # JSON is YAML
        return path


@pytest.fixture(scope="module")
def ground(tiny_wan: Path, tmp_path_factory: pytest.TempPathFactory) -> Ground:
    folder = tmp_path_factory.mktemp("ground")
    (folder / "clips").mkdir()
    for i in range(3):
        pixels = np.random.default_rng(i).integers(0, 255, (9, 32, 32, 3), dtype=np.uint8)
        video.write_video(folder / "clips" / f"{i}.mp4", pixels, 16)
        (folder / "clips" / f"{i}.txt").write_text(f"clip number {i}", "utf-8")
    made = Ground(folder / "clips", folder / "cache", tiny_wan, folder / "run")
    (folder / "r.yaml").write_text(json.dumps(made.recipe(run=str(made.run))), "utf-8")
    assert inlaid("train", folder / "r.yaml").code == 0
    return made


@pytest.fixture(autouse=True)
def here(ground: Ground, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Each test works in an empty folder, leaves no temporary file, and leaves the ground as it was."""
    monkeypatch.chdir(tmp_path)
    kept = (ground.clips, ground.cache / "media", ground.run)
    before = [files(folder) for folder in kept]
    yield tmp_path
    assert not list(tmp_path.rglob(".tmp-*"))
    assert [files(folder) for folder in kept] == before


def refused(done: Done, *words: str, code: int = 2) -> str:
    """Asserts one clear message and gives it."""
    assert done.code == code, f"exit code {done.code}\n{done.out}{done.err}"
    assert "Traceback" not in done.said
    assert done.said.lower().count("error: ") == (code == 2), done.said
    message = done.said[done.said.lower().find("error: ") :]
    for word in words:
        assert word in message, f"`{word}` is missing in: {message}"
    return message


# --- recipes ------------------------------------------------------------------------------------------------

RECIPES: dict[str, tuple[dict[str, Any] | str | bytes, list[str], list[str]]] = {
    "broken YAML": ("run: [a\nmodel: {", [], ["r.yaml: not valid YAML: line 2, column 6", "expected ','"]),
    "tab": ("run: x\nmodel:\n\tfamily: wan", [], ["r.yaml: not valid YAML: line 3", "'\\t'"]),
    "binary": (b"\xff\xfe\x00", [], ["r.yaml: not a recipe, the file is not UTF-8"]),
    "empty": ("# nothing yet\n", [], ["a recipe is a mapping of sections (run, model, data", "empty"]),
    "a list": ("- run\n- model", [], ["a recipe is a mapping of sections (run, model, data", "found list"]),
    "a section twice": ("run: x\ntrain: {}\ntrain: {}", [], ["line 3", "duplicate key `train`; keep one"]),
    "unknown key": ({"train__step": 5}, [], ["train.step: unknown key; did you mean `steps`?"]),
    "far key": ({"optim__wd": 0}, [], ["optim.wd: unknown key; known keys: name, lr, betas"]),
    "unknown section": ({"optimizer": {}}, [], ["optimizer: unknown key; did you mean `optim`?"]),
    "key of a source": (
        {"data__sources": [{"path": "x", "videocolumn": "clip"}]},
        [],
        ["data.sources.0.videocolumn: unknown key; did you mean `video_column`?"],
    ),
    "rank of a full tune": (
        {"tuner": {"kind": "full", "rank": 4}},
        [],
        ["tuner.rank: unknown key; known keys: kind, targets"],
    ),
    "empty section": ({"train": []}, [], ["train: needs a mapping with keys (steps", "(got [])"]),
    "no model": ({"model": None}, [], ["r.yaml: 1 mistake", "model: missing"]),
    "no run": ({"run": None}, [], ["run: missing"]),
    "empty run": ({"run": ""}, [], ["run: String should have at least 1 character (got '')"]),
    "two mistakes at once": (
        {"optim": {"lr": "fast"}, "train__steps": "many"},
        [],
        ["2 mistakes", "optim.lr: should be a valid number", "'fast'", "train.steps", "'many'"],
    ),
    "size as a number": ({"data__size": 480}, [], ["data.size: needs a list", "(got 480)"]),
    "odd size": ({"data__size": [33, 32]}, [], ["data: 33x32 is not a multiple of 16: use 32x32"]),
    "size off the grid": ({"data__size": [32, 40]}, [], ["data: 32x40 is not a multiple of 16: use 32x32"]),
    "negative size": ({"data__size": [-32, 32]}, [], ["data: -32x32 is not a multiple of 16: use 16x32"]),
    "80 frames": ({"data__frames": 80}, [], ["data: 80 frames is not 4n+1: use 77 or 81"]),
    "no frames": ({"data__frames": 0}, [], ["data.frames: needs at least one length"]),
    "sample size": ({"sample__size": [40, 40]}, [], ["sample: 40x40 is not a multiple of 16: use 32x32"]),
    "negative rate": ({"optim": {"lr": -1}}, [], ["optim.lr: should be greater than 0 (got -1)"]),
    "infinite rate": ({}, ["optim.lr=.inf"], ["optim.lr: should be a finite number (got inf)"]),
    "betas": ({"optim": {"betas": [0.9, 1.5]}}, [], ["optim.betas: needs two numbers", "[0.9, 1.5]"]),
    "aspect": ({"data__aspects": ["16x9"]}, [], ["data.aspects: `16x9` is not an aspect ratio", "`16:9`"]),
    "no sources": ({"data__sources": []}, [], ["data.sources: needs at least one source"]),
    "empty prompt": ({"sample__prompts": [" "]}, [], ["sample.prompts: contains an empty prompt"]),
    "noise levels": (
        {"objective": {"interval": [0.9, 0.1]}},
        [],
        ["objective.interval: needs 0 <= low < high <= 1 (got [0.9, 0.1])"],
    ),
    "unknown family": (
        {"model__family": "sora"},
        [],
        ["model.family: no family `sora`; choose from: ", "wan"],
    ),
    "unknown tuner": (
        {"tuner__kind": "oft"},
        [],
        ["tuner.kind: no kind `oft`; choose from: lora, dora, lokr, loha, full"],
    ),
    "unknown optimizer": (
        {"optim": {"name": "lion"}},
        [],
        ["optim.name: should be 'adamw', 'adamw8bit', 'adamw4bit' or 'prodigy' (got 'lion')"],
    ),
    "unknown tracker": ({"train__trackers": ["mlflow"]}, [], ["train.trackers.0", "wandb", "'mlflow'"]),
    "world size": (
        {"runtime": {"world_size": 2}},
        [],
        ["runtime.world_size: the recipe requires 2 process(es), this launch has 1", "torchrun"],
    ),
    "override without =": ({}, ["optim.lr"], ["`optim.lr` is not an override; write section.key=value"]),
    "override of no key": ({}, ["optim..lr=1"], ["`optim..lr=1` is not an override", "optim.lr=2e-4"]),
    "override of an unknown key": ({}, ["optim.lrr=1"], ["optim.lrr: unknown key; did you mean `lr`?"]),
    "override that is no YAML": ({}, ["optim.lr=["], ["`optim.lr=[`: the value is not valid YAML"]),
    "override inside a list": (
        {},
        ["data.sources.0.path=x"],
        ["`data.sources.0.path=x`: data.sources is a list; set all of it, such as data.sources=[a, b]"],
    ),
    "endless seed": ({"sample__seed": 10**30}, [], ["sample.seed: should be less than 9223372036854775808"]),
    "keys that are no text": ("1: 2\nrun: x\n", [], ["1: Keys should be strings"]),
    "override of a section": ({}, ["train=5"], ["train: needs a mapping with keys (steps", "(got 5)"]),
}


@pytest.mark.parametrize("case", RECIPES)
def test_recipe(ground: Ground, case: str) -> None:
    wrong, overrides, words = RECIPES[case]
    path = Path("r.yaml")
    if isinstance(wrong, dict):
        ground.write(**wrong)
    else:
        path.write_bytes(wrong if isinstance(wrong, bytes) else wrong.encode())
    refused(inlaid("cache", path, *overrides), *words)
    assert sorted(p.name for p in Path().iterdir()) == ["r.yaml"], "nothing is made"


def test_no_such_recipe(ground: Ground) -> None:
    refused(inlaid("check", "nope.yaml"), "nope.yaml: no such recipe; `inlaid new FAMILY DATA` writes")
    refused(inlaid("train", ground.clips), "config.yaml: no such recipe")


def test_device_that_is_not_there(ground: Ground, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Devices, "here", classmethod(lambda cls: Devices()))
    path = ground.write(runtime={"device": "cuda"})
    refused(inlaid("train", path), "runtime.device: no `cuda` on this machine (available: cpu)", "use `auto`")


# --- checkpoints of the base --------------------------------------------------------------------------------


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), **values}), "utf-8")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def two_experts(base: Path) -> None:
    edit(
        base / "model_index.json", boundary_ratio=0.875, transformer_2=["diffusers", "WanTransformer3DModel"]
    )
    shutil.copytree(base / "transformer", base / "transformer_2")


BASES: dict[str, tuple[Callable[[Path], Any], dict[str, Any], list[str]]] = {
    "a control checkpoint": (
        lambda base: edit(base / "transformer/config.json", in_channels=48),
        {},
        ["takes 48 channels, not 16 for text-to-video or 36", "not supported"],
    ),
    "another family": (
        lambda base: edit(base / "transformer/config.json", _class_name="FluxTransformer2DModel"),
        {},
        [
            "model.family: base is not a Wan text-to-video or image-to-video checkpoint",
            "FluxTransformer2DModel",
        ],
    ),
    "expert is missing": (
        two_experts,
        {},
        ["model.expert: base has two experts; choose `high` (t >= 0.875)"],
    ),
    "expert is too much": (
        lambda base: None,
        {"model__expert": "low"},
        ["model.expert: base has one network; leave `expert` out"],
    ),
    "unknown expert": (
        lambda base: None,
        {"model__expert": "mid"},
        ["model.expert: "],
    ),
    "experts disagree": (
        lambda base: edit(base / "model_index.json", boundary_ratio=0.9),
        {},
        ["base sets boundary_ratio 0.9 but has no transformer_2", "remove boundary_ratio"],
    ),
    "no checkpoint": (
        lambda base: (base / "model_index.json").unlink(),
        {},
        ["model.checkpoint: base is not a diffusers folder (it has no model_index.json)"],
    ),
    "no network": (
        lambda base: shutil.rmtree(base / "transformer"),
        {},
        ["model.checkpoint: base has no `vae` or no `transformer` with a config.json"],
    ),
    "garbled configuration": (
        lambda base: (base / "vae/config.json").write_text('{"z_dim": ['),
        {},
        ["base/vae/config.json is not a JSON object; copy or download the checkpoint again"],
    ),
    "truncated VAE": (
        lambda base: cut(base / "vae/diffusion_pytorch_model.safetensors"),
        {"data__cache": "cache"},
        ["model.checkpoint: `vae` of base cannot be loaded", "download it again"],
    ),
    "truncated text encoder": (
        lambda base: cut(base / "text_encoder/model.safetensors"),
        {"data__cache": "cache"},
        ["model.checkpoint: `text_encoder` of base cannot be loaded", "download it again"],
    ),
    "no tokenizer": (
        lambda base: shutil.rmtree(base / "tokenizer"),
        {"data__cache": "cache"},
        ["model.checkpoint: `tokenizer` of base cannot be loaded", "download it again"],
    ),
    "no weights": (
        lambda base: (base / "transformer/diffusion_pytorch_model.safetensors").unlink(),
        {},
        ["model.checkpoint: `transformer` of base cannot be loaded", "download it again"],
    ),
    "missing weights": (
        lambda base: edit(base / "transformer/config.json", num_layers=3),
        {},
        ["`transformer` of base", "27 weights are missing from its files, such as blocks.2."],
    ),
}


@pytest.mark.parametrize("case", BASES)
def test_base(ground: Ground, case: str) -> None:
    damage, changes, words = BASES[case]
    shutil.copytree(ground.checkpoint, "base")
    damage(Path("base"))
    # the cache knows the whole checkpoint by its encoders' content, so training alone loads its network
    refused(inlaid("train", ground.write(**{"model__checkpoint": "base", **changes})), *words)
    assert not Path("run/checkpoints").exists()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("./nothing", ["model.checkpoint: `./nothing` is neither a folder in diffusers layout nor a Hub id"]),
        ("tiny:sora", ["there is no tiny model 'sora': use wan"]),
        ("some/one", ["model.checkpoint: `some/one` is not a local folder", "the Hub", "check the name"]),
    ],
)
def test_no_such_base(ground: Ground, monkeypatch: pytest.MonkeyPatch, name: str, words: list[str]) -> None:
    def offline(*_: Any, **__: Any) -> None:
        raise ConnectionError("no network in tests")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", offline)
    refused(inlaid("cache", ground.write(model__checkpoint=name)), *words)


# --- clips --------------------------------------------------------------------------------------------------


class Evil:
    """What a pickle may do to who opens it."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("opened",)


def captioned(name: str, data: bytes) -> Callable[[Path], Any]:
    """Puts a file and its caption among the clips."""

    def put(folder: Path) -> None:
        (folder / name).write_bytes(data)
        (folder / name).with_suffix(".txt").write_text("something", "utf-8")

    return put


def manifest(name: str, text: str) -> Callable[[Path], Any]:
    """Puts a manifest in place of the captions."""

    def put(folder: Path) -> None:
        for caption in folder.glob("*.txt"):
            caption.unlink()
        (folder / name).write_text(text, "utf-8")

    return put


def lines(prompts: str, clips: str) -> Callable[[Path], Any]:
    def put(folder: Path) -> None:
        manifest("prompts.txt", prompts)(folder)
        (folder / "videos.txt").write_text(clips, "utf-8")

    return put


def array(**arrays: Any) -> Callable[[Path], Any]:
    """Puts an npz clip and its manifest."""

    def put(folder: Path) -> None:
        np.savez(folder / "a.npz", **arrays)
        manifest("m.jsonl", '{"frames_path": "a.npz", "caption": "x"}')(folder)

    return put


def link(name: str, target: str) -> Callable[[Path], Any]:
    def put(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(target)
        if name.endswith(".mp4"):
            (folder / name).with_suffix(".txt").write_text("something", "utf-8")

    return put


def shortened(folder: Path) -> None:
    clip = folder / "0.mp4"
    clip.write_bytes(clip.read_bytes()[:-20])


def picture(folder: Path) -> None:
    Image.new("RGB", (32, 32)).save(folder / "9.png")
    (folder / "9.txt").write_text("a square", "utf-8")


CSV = "video,caption\n0.mp4,hello\n"
CLIPS: dict[str, tuple[Callable[[Path], Any], Any, list[str]]] = {
    "unreadable": (
        captioned("9.mp4", b"this is no video" * 50),
        "d",
        ["1 of 3 clips cannot be read (9.mp4:", "convert or remove the file"],
    ),
    "empty file": (captioned("9.mp4", b""), "d", ["1 of 3 clips cannot be read (9.mp4: the file is empty"]),
    "truncated": (
        shortened,
        "d",
        ["1 of 2 clips is truncated (0.mp4:", "of 9 frames", "copy the file again"],
    ),
    "too short": (
        lambda d: videos.write(d / "0.mp4", 3, 16, (32, 32)),
        "d",
        ["1 of 2 clips is too short (0.mp4: 9 frames at 16 fps need 0.56 s", "data.frames"],
    ),
    "an image": (picture, "d", ["1 of 3 clips is an image (9.png): add 1 to data.frames"]),
    "no caption": (
        lambda d: (d / "0.txt").unlink(),
        "d",
        ["1 of 2 clips has no caption (0.mp4): add a .txt beside each"],
    ),
    "empty caption": (
        lambda d: (d / "0.txt").write_text(" \n"),
        "d",
        ["1 of 2 clips has an empty caption (0.mp4): describe the clip"],
    ),
    "caption in another encoding": (
        lambda d: (d / "0.txt").write_bytes("Käse".encode("latin-1")),
        "d",
        ["1 of 2 clips has no caption (0.mp4: 0.txt is not UTF-8)", "UTF-8 text"],
    ),
    "several things at once": (
        lambda d: [(d / "0.txt").unlink(), captioned("9.mp4", b"no video")(d)],
        "d",
        ["1 of 3 clips has no caption (0.mp4)", "1 of 3 clips cannot be read (9.mp4"],
    ),
    "empty folder": (
        lambda d: [f.unlink() for f in d.iterdir()],
        "d",
        ["d: contains no clips"],
    ),
    "clip of another kind": (
        captioned("9.wmv", b"something"),
        "d",
        ["1 of 3 clips cannot be read (9.wmv: `.wmv` files are not supported)", "convert or remove the file"],
    ),
    "no such folder": (lambda d: None, "nowhere", ["nowhere: no such file or folder"]),
    "not a manifest": (lambda d: None, "d/0.txt", ["d/0.txt: is neither a folder nor a manifest (.csv"]),
    "no such root": (
        manifest("m.csv", CSV),
        {"path": "d/m.csv", "root": "nowhere"},
        ["d/m.csv: `root` nowhere is not a folder"],
    ),
    "two layouts": (
        lambda d: (d / "m.csv").write_text(CSV),
        "d",
        ["d: is ambiguous: it contains m.csv; 2 clips", "Set `path` to the manifest, or set `layout`"],
    ),
    "layout that is not there": (
        lambda d: None,
        {"path": "d", "layout": "lines"},
        ["d: contains no prompts.txt and videos.txt"],
    ),
    "missing file": (
        manifest("m.csv", CSV + "gone.mp4,bye\n"),
        "d/m.csv",
        ["1 of 2 clips does not exist (gone.mp4: line 3): correct the manifest or `root`"],
    ),
    "escape in CSV": (
        manifest("m.csv", CSV + "../../etc/passwd,root\n"),
        "d/m.csv",
        ["1 of 2 clips is outside of its source (../../etc/passwd: line 3)", "`root`"],
    ),
    "escape in JSONL": (
        manifest("m.jsonl", '{"video": "../../etc/passwd", "caption": "root"}\n'),
        "d/m.jsonl",
        ["is outside of its source (../../etc/passwd: line 1)", "`root`"],
    ),
    "escape in lines": (
        lines("one\ntwo", "0.mp4\n../../etc/passwd"),
        "d",
        ["is outside of its source (../../etc/passwd: line 2)", "`root`"],
    ),
    "absolute path": (
        manifest("m.csv", CSV + "/etc/passwd,root\n"),
        "d/m.csv",
        ["is outside of its source (/etc/passwd: line 3)"],
    ),
    "drive of Windows": (
        manifest("m.csv", CSV + "C:\\clips\\0.mp4,root\n"),
        "d/m.csv",
        ["is outside of its source (C:\\clips\\0.mp4: line 3)"],
    ),
    "link out of the folder": (link("9.mp4", "/etc/passwd"), "d", ["is outside of its source (9.mp4)"]),
    "links in a circle": (link("9.mp4", "9.mp4"), "d", ["1 of 3 clips does not exist (9.mp4)"]),
    "name that is no text": (
        lambda d: captioned(os.fsdecode(b"\xff.mp4"), b"")(d),
        "d",
        ["1 of 3 clips cannot be read (?.mp4: the file name is not UTF-8, rename the file)"],
    ),
    "half of a character": (
        manifest("m.jsonl", '{"video": "0.mp4", "caption": "a \\ud83d cat"}\n'),
        "d/m.jsonl",
        ["1 of 1 clips has no caption (0.mp4: line 1: invalid Unicode in `a ? cat`)"],
    ),
    "path with a null": (
        manifest("m.jsonl", '{"video": "0\\u0000.mp4", "caption": "x"}\n'),
        "d/m.jsonl",
        ["1 of 1 clips does not exist (0\\0.mp4: line 1)"],
    ),
    "endless path": (
        manifest("m.csv", f"video,caption\n{'a' * 5000}.mp4,x\n"),
        "d/m.csv",
        ["1 of 1 clips does not exist (aaaa", "line 2)"],
    ),
    "caption linked out": (link("0.txt", "/etc/passwd"), "d", ["is outside of its source (0.txt)"]),
    "unequal lines": (
        lines("one\ntwo\nthree", "0.mp4\n1.mp4"),
        "d",
        ["d: prompts.txt has 3 lines and videos.txt has 2"],
    ),
    "empty manifest": (manifest("m.csv", ""), "d/m.csv", ["d/m.csv: m.csv is empty"]),
    "manifest without rows": (
        manifest("m.csv", "video,caption\n"),
        "d/m.csv",
        ["d/m.csv: contains no clips"],
    ),
    "unknown columns": (
        manifest("m.csv", "clip,words\n0.mp4,hello\n"),
        "d/m.csv",
        ["none of the columns video, file_name", "its columns are clip, words: set `video_column`"],
    ),
    "no such column": (
        manifest("m.csv", CSV),
        {"path": "d/m.csv", "caption_column": "text"},
        ["d/m.csv: has no column `text`; its columns are video, caption: set `caption_column`"],
    ),
    "comma without quotes": (
        manifest("m.csv", "video,caption\n0.mp4,hello, world\n"),
        "d/m.csv",
        ["has a broken row (line 2: 3 cells for 2 columns: quote texts that contain commas)"],
    ),
    "open quotation mark": (
        manifest("m.csv", 'video,caption\n0.mp4,"hello\n1.mp4,bye\n'),
        "d/m.csv",
        ["d/m.csv: is not valid CSV", "look for an unclosed quote"],
    ),
    "broken JSONL": (
        manifest("m.jsonl", '{"video": "0.mp4", "caption": "x"}\n{"video": \n'),
        "d/m.jsonl",
        ["m.jsonl, line 2: not valid JSON (column 11:"],
    ),
    "JSONL of lists": (
        manifest("m.jsonl", '["0.mp4", "x"]\n'),
        "d/m.jsonl",
        ["m.jsonl, line 1: expected an object with a path and a caption"],
    ),
    "JSONL of other types": (
        manifest("m.jsonl", '{"video": "0.mp4", "caption": 5}\n{"video": 7, "caption": "x"}\n'),
        "d/m.jsonl",
        ["line 2: `video` is not a file name", "0.mp4: line 1: int, not text"],
    ),
    "npz with pickled objects": (
        array(frames=np.array([Evil()], object)),
        "d/m.jsonl",
        ["1 of 1 clips cannot be read (a.npz: `frames` is object (1,); it must be uint8"],
    ),
    "npz of another shape": (
        array(frames=np.zeros((9, 32, 32), np.uint8)),
        "d/m.jsonl",
        ["a.npz: `frames` is uint8 (9, 32, 32); it must be uint8 and (t, h, w, 3)"],
    ),
    "npz of another type": (
        array(frames=np.zeros((9, 32, 32, 3), np.float32)),
        "d/m.jsonl",
        ["a.npz: `frames` is float32 (9, 32, 32, 3); it must be uint8"],
    ),
    "npz without frames": (
        array(video=np.zeros((9, 32, 32, 3), np.uint8)),
        "d/m.jsonl",
        ["a.npz: has no array `frames`; its arrays are: video"],
    ),
    "truncated npz": (
        lambda d: [array(frames=np.zeros((9, 32, 32, 3), np.uint8))(d), cut(d / "a.npz")],
        "d/m.jsonl",
        ["1 of 1 clips cannot be read (a.npz: is not an npz clip"],
    ),
    "nothing left to train on": (
        lambda d: None,
        "d",
        ["data.validation=2 of 2 clips leaves none to train on"],
    ),
}


@pytest.mark.parametrize("case", CLIPS)
def test_clips(ground: Ground, case: str) -> None:
    damage, source, words = CLIPS[case]
    Path("d").mkdir()
    for name in ("0.mp4", "0.txt", "1.mp4", "1.txt"):
        shutil.copy(ground.clips / name, "d")
    damage(Path("d"))
    clips = files(Path("d"))
    changes = {"data__validation": 2} if case == "nothing left to train on" else {}
    recipe = ground.write(data__sources=[source], data__cache="cache", **changes)
    refused(inlaid("cache", recipe), *words)
    assert not Path("cache").exists(), "nothing is encoded before all is well"
    checked = inlaid("check", recipe)
    assert checked.code == 2 and "not ready: " in checked.said
    assert all(word in checked.said for word in words), checked.said
    assert files(Path("d")) == clips, "the clips are only read"
    assert not Path("opened").exists(), "nothing of a pickle is run"


UNEVEN = [k / 16 + 0.02 * (k % 2) for k in range(14)]
WARNINGS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "duplicate": (
        lambda d: captioned("9.mp4", (d / "0.mp4").read_bytes())(d),
        "1 of 3 clips is a copy (9.mp4: same content as 0.mp4): keep one copy, or set `repeats`",
    ),
    "odd size": (
        lambda d: [Image.new("RGB", (33, 31)).save(d / "9.png"), (d / "9.txt").write_text("a square")],
        "1 of 3 clips has an odd size (9.png: 33x31): nothing to do, clips are scaled and cropped",
    ),
    "variable frame rate": (
        lambda d: videos.write(d / "0.mp4", 14, 16, (32, 32), stamps=UNEVEN),
        "1 of 2 clips has a variable frame rate (0.mp4: 15.64 fps on average): nothing to do",
    ),
}


@pytest.mark.parametrize("case", WARNINGS)
def test_what_is_only_worth_a_warning(ground: Ground, case: str) -> None:
    damage, words = WARNINGS[case]
    Path("d").mkdir()
    for name in ("0.mp4", "0.txt", "1.mp4", "1.txt"):
        shutil.copy(ground.clips / name, "d")
    damage(Path("d"))
    recipe = ground.write(data__sources="d", data__frames=[1, 9])
    done = inlaid("check", recipe)
    assert done.code == 0 and f"warning: {words}" in done.said and "ready to train: 0 errors" in done.said
    assert inlaid("cache", recipe, "data.cache=cache").code == 0


def test_quarantine_names_what_is_left_out(ground: Ground) -> None:
    shutil.copytree(ground.clips, "d")
    captioned("9.mp4", b"this is no video")(Path("d"))
    done = inlaid("cache", ground.write(data__sources="d", data__bad_clips="quarantine"))
    assert done.code == 0 and "excluded 1 clip(s) with errors; run/quarantine.json lists" in done.said
    assert "cannot be read" in json.loads(Path("run/quarantine.json").read_text("utf-8"))["9.mp4"]


# --- the cache ----------------------------------------------------------------------------------------------


def items(folder: Path | str = "cache") -> list[Path]:
    return sorted(Path(folder).rglob("*.safetensors"))


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            SafetensorError(NO_SPACE),
            ["cache: the disk is full; 2 of 3 items are cached and kept", "Free space"],
        ),
        (
            SafetensorError("I/O error: Read-only file system (os error 30)"),
            ["cache: cannot be written (Read-only file system); 2 of 3 items are cached", "data.cache"],
        ),
    ],
)
@pytest.mark.parametrize("bad_clips", ["stop", "quarantine"])
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
    assert done.code == 0 and "1 encoded, 2 already cached" in done.said
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
        assert "interrupted: finished work is kept; run the same command again" in done.said
        assert len(items(command)) == 2 and not list(Path().rglob(".tmp-*"))
        monkeypatch.setattr(cache_module, "save_file", save_file)
        done = inlaid("cache", ground.write(data__cache=command))
        assert done.code == 0 and "1 encoded, 2 already cached" in done.said


GARBLED: Mapping[str, Callable[[bytes], bytes]] = {
    "truncated": lambda b: b[:-10],
    "cut in its header": lambda b: b[:40],
    "empty": lambda b: b"",
    "garbled header": lambda b: b.replace(b"data_offsets", b"data-offsets"),
    "header of another kind": lambda b: b"\x02" + bytes(7) + b"[]",
    "endless header": lambda b: b"\xff" * 100,
}


@pytest.mark.parametrize("kind", ["media", "text"])
@pytest.mark.parametrize("case", GARBLED)
def test_damaged_item_is_encoded_again(ground: Ground, case: str, kind: str) -> None:
    shutil.copytree(ground.cache, "cache")
    damaged = items(f"cache/{kind}")[0]
    whole = {k: v.clone() for k, v in load_file(damaged).items()}  # not a view of what is cut
    damaged.write_bytes(GARBLED[case](damaged.read_bytes()))
    done = inlaid("cache", ground.write(data__cache="cache"))
    assert done.code == 0 and "error" not in done.said
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
        f"{place}: the run folder cannot be written (",
        "choose another folder (run=...)",
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
        refused(inlaid("train", recipe), "run/checkpoints/step-000002: No space left on device: free disk")
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
        assert done.code == 0 and "resuming after step 1" in done.said


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
    "length": (lambda g: g.run, ["a", "--frames", "8"], ["8 frames is not 4n+1: use 5 or 9"]),
    "no frames": (lambda g: g.run, ["a", "--frames", "0"], ["sample.frames", "equal to 1 (got 0)"]),
    "no steps": (lambda g: g.run, ["a", "--steps", "0"], ["sample.steps", "equal to 1 (got 0)"]),
    "guidance": (lambda g: g.run, ["a", "--guidance", "-1"], ["sample.guidance", "equal to 0 (got -1.0)"]),
    "strength": (
        lambda g: g.run,
        ["a", "--strength", "nan"],
        ["strength nan is not a finite number such as 0.5"],
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
    "no such file": (lambda g: g.run, ["--file", "no.txt"], ["no.txt: No such file or directory"]),
    "file without prompts": (
        lambda g: g.run,
        ["--file", "blank.txt"],
        ["blank.txt contains no prompt", "line"],
    ),
    "file that is no text": (lambda g: g.run, ["--file", "latin.txt"], ["latin.txt is not UTF-8 text; save"]),
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


def raw(change: Callable[[bytes], bytes]) -> Any:
    def put(path: Path, ground: Ground) -> None:
        path.write_bytes(change((ground.run / WEIGHTS).read_bytes()))

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
        (["RUN", "--to", "onnx"], ["--to: `onnx` is not one of diffusers, comfyui, kohya, merged"]),
        (["RUN"], ["Missing option '--to'"]),
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
    Path("a.bin").write_bytes(pickle.dumps(Evil()))
    command = [sys.executable, "-m", "inlaid", "import", "a.bin", "out"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: a.bin: a pickle that runs code: not loaded\n"
    assert not Path("opened").exists()


def test_misspelt_command(ground: Ground) -> None:
    refused(inlaid("trian", "r.yaml"), "No such command 'trian'", "train")
    refused(inlaid("train"), "Missing argument")
