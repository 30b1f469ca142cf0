"""What people do wrong with recipes and base checkpoints: one clear message, exit code 2, no traceback."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from inlaid.runs.launch import Devices
from support.commands import inlaid
from support.ground import Ground, cut, refused

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
    "keys that are no text": ("1: 2\nrun: x\n", [], ["1: unknown key; known keys: run, seed"]),
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
        ["model.expert: should be 'high' or 'low' (got 'mid')"],
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
    "an unknown class": (
        lambda base: edit(base / "vae/config.json", _class_name="AutoencoderKLWan2"),
        {},
        ["model.family: base is not a Wan", "AutoencoderKLWan2"],
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
    ],
)
def test_no_such_base(ground: Ground, name: str, words: list[str]) -> None:
    refused(inlaid("cache", ground.write(model__checkpoint=name)), *words)
