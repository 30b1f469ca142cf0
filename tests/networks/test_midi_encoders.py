"""Adapters on the image encoders of scenes: pictures are cached, and the encoders are part of what trains."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from support.commands import inlaid

pytest.importorskip("trimesh")

from inlaid import config, families
from inlaid.adapters import tuners
from inlaid.adapters.adapter import WEIGHTS
from inlaid.adapters.of_run import trained_folder
from inlaid.check import estimate
from inlaid.check.counting import Counts
from inlaid.data.batch import Batch
from inlaid.data.cache import Cache
from inlaid.data.modality import modality_of
from inlaid.generation.generate import load_pipeline
from inlaid.runs.folder import Run
from inlaid.training.loop import train
from support.slow import slow

CPU = torch.device("cpu")
CLIP, DINO = "image_encoder_1", "image_encoder_2"


def family(checkpoint: object, **options: Any) -> Any:
    return families.get("midi")(config.Model(family="midi", checkpoint=str(checkpoint), options=options))


@pytest.fixture
def scene_recipe(
    checkpoint: Callable[[str, str], Path], make_scenes: Callable[..., Path], encoded: Path, tmp_path: Path
) -> Callable[..., dict]:
    def make(chosen: str = "both", variant: str = "scene", **changes: object) -> dict:
        folder = tmp_path / "scenes"
        if not folder.is_dir():
            make_scenes((2, 2, 2))
        raw: dict = {
            "run": str(tmp_path / "run"),
            "model": {
                "family": "midi",
                "checkpoint": str(checkpoint("midi", variant)),
                "options": {"image_encoders": chosen},
            },
            "data": {"sources": str(folder), "validation": 0, "cache": str(encoded)},
            "tuner": {"kind": "lora", "rank": 4},
            "optim": {"lr": 2e-2},
            "train": {"steps": 4, "save_every": 2, "log_every": 1, "trackers": []},
            "sample": {"steps": 2, "grid": 16},
        }
        for key, value in changes.items():
            section, _, name = key.partition("__")
            raw[section] = {**raw.get(section, {}), name: value} if name else value
        return raw

    return make


def items(one: Any, settings: config.Config) -> list[dict[str, torch.Tensor]]:
    """Cached scenes, without a cache."""
    windows = modality_of("scene").plan(settings, one).train
    encoder = one.load_media_encoder(CPU)
    return [one.encode_media(encoder, w.read()) for w in windows]


@pytest.mark.parametrize(
    ("variant", "chosen"),
    [slow("scene", "dino"), ("scene", "clip"), ("scene", "both"), slow("triposg", "dino")],
)
def test_untrained_it_is_what_frozen_encoders_are(
    variant: str, chosen: str, scene_recipe: Callable[..., dict]
) -> None:
    raw = scene_recipe(chosen, variant)
    settings, place = config.build(raw), raw["model"]["checkpoint"]
    frozen, trained = family(place), family(place, image_encoders=chosen)
    seen, shown = items(frozen, settings), items(trained, settings)
    for kind, encoder in trained.conditioning.trained.items():
        assert shown[0][kind].dtype == torch.uint8 and shown[0][kind].shape[1] == encoder.channels
    assert all(
        shown[0][k].is_floating_point()
        for k in trained.conditioning.encoders.keys() - trained.conditioning.trained.keys()
    )
    assert {k: tuple(v.shape) for k, v in shown[0].items()} == trained.stored(2)
    assert {k for k, v in shown[0].items() if v.dtype == torch.uint8} == {*trained.bytewise}
    x, t = torch.randn(3, *frozen.shapes(2)["latents"]), torch.tensor([0.2, 0.6, 0.9])
    losses = []
    for one, cached in ((frozen, seen), (trained, shown)):
        one.options["image_dropout"] = 0.5
        batch = Batch.of(one, cached, [{}] * 3, ["a", "b", "c"], 3)
        network = one.load_denoiser(torch.float32)
        tuners.attach(config.LowRank(), one.targets, network, seed=0)
        with torch.no_grad():
            losses.append((batch.latents, one.predict(network.train(), x, t, batch.cond)))
    assert set(batch.cond["conditioned"].tolist()) == {0.0, 1.0}, "some see, some do not"
    assert torch.equal(losses[0][0], losses[1][0]), "the same draws"
    assert (losses[0][1] - losses[1][1]).abs().max() < 1e-5


def test_pictures_are_other_items_of_the_cache(scene_recipe: Callable[..., dict], tmp_path: Path) -> None:
    raw = scene_recipe()
    settings, store = config.build(raw), Cache(tmp_path / "cache")
    named = {}
    for chosen in ("frozen", "dino", "clip", "both"):
        one = family(raw["model"]["checkpoint"], image_encoders=chosen)
        named[chosen] = store.media_names(one, modality_of("scene").plan(settings, one).train)
    assert len({n for names in named.values() for n in names}) == 4 * 3


@pytest.mark.slow
@pytest.mark.parametrize("kind", [slow("lora"), "dora"])
def test_the_way_with_image_encoders(
    kind: str, scene_recipe: Callable[..., dict], tmp_path: Path, media_root: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModel, CLIPVisionModelWithProjection

    raw = scene_recipe(tuner__kind=kind, tuner__alpha=8, optim__ema=0.5)
    recipe, run = tmp_path / "r.yaml", tmp_path / "run"
    recipe.write_text(yaml.safe_dump(raw), "utf-8")
    assert inlaid("train", recipe).code == 0
    adapter = run / "adapter"
    stated = inlaid("inspect", run)
    assert stated.code == 0 and stated.output.count("adapter_model.safetensors") == 2, stated.output
    assert "`image_encoder_1`, `image_encoder_2`" in (adapter / "README.md").read_text("utf-8")

    # Stock peft reads the files, and does with them what the run's own pipeline does.
    settings = config.load(run)
    one = family(raw["model"]["checkpoint"], image_encoders="both")
    pipe = load_pipeline(settings, one, adapter, 1.0, _context())
    place = Path(raw["model"]["checkpoint"])
    shown = items(one, settings)[0]
    for name, kind_, stock in (
        (CLIP, "clip", CLIPVisionModelWithProjection.from_pretrained(place / CLIP)),
        (DINO, "dino", AutoModel.from_pretrained(place / DINO)),
    ):
        pixels = one.conditioning.encoders[kind_].extractor.normalized(shown[kind_])
        with torch.no_grad():
            before = stock(pixel_values=pixels)[0]
            theirs = PeftModel.from_pretrained(stock, str(adapter / name)).eval()(pixel_values=pixels)[0]
            ours = pipe.transformer.get_submodule(name)(pixel_values=pixels)[0]
        assert (theirs - ours).abs().max() < 1e-5
        assert (theirs - before).abs().max() > 1e-4, "it learned something"

    # Merged, the checkpoint's own folders hold it.
    assert inlaid("export", run, "--to", "merged").code == 0
    merged = run / "export/merged"
    assert sorted(p.name for p in merged.iterdir()) == [CLIP, DINO, "transformer"]
    assert json.loads((merged / "transformer/config.json").read_text())["_class_name"] == "TripoSGTransformer"
    whole = AutoModel.from_pretrained(merged / DINO)
    with torch.no_grad():
        assert (whole(pixel_values=pixels)[0] - ours).abs().max() < 1e-5
    assert inlaid("export", run, "--to", "diffusers").code == 0
    copied = run / "export/diffusers"
    assert load_file(copied / DINO / "adapter_model.safetensors").keys()
    refused = inlaid("export", run, "--to", "comfyui")
    assert refused.code == 2 and "no comfyui layout is known for Midi; use `diffusers`" in refused.output

    # Made with it, at half its strength, and without.
    pair = ["--image", media_root / "scenes/bedroom_rgb.png", "--seg", media_root / "scenes/bedroom_seg.png"]
    for strength in ("1", "0.5", "0"):
        out = tmp_path / f"{strength}.glb"
        done = inlaid("generate", run, *pair, "-o", out, "--grid", 16, "--steps", 2, "--strength", strength)
        assert done.code == 0, done.output
    pipe.set_adapters(["inlaid"], [0.0])
    with torch.no_grad():
        off = pipe.transformer.get_submodule(DINO)(pixel_values=pixels)[0]
    assert (off - before).abs().max() < 1e-5 or kind == "dora"


def _context() -> Any:
    from types import SimpleNamespace

    return SimpleNamespace(device=CPU, precision=torch.float32)


@pytest.mark.slow
def test_it_goes_on_exactly_and_recomputes_the_same(
    scene_recipe: Callable[..., dict], tmp_path: Path
) -> None:
    raw = scene_recipe(train__steps=2)
    train(config.build(raw))
    train(config.build(raw, ["train.steps=4"]))
    train(config.build(raw, ["train.steps=4", f"run={tmp_path / 'whole'}"]))
    saving = ["train.steps=4", f"run={tmp_path / 'saving'}", "memory.gradient_checkpointing=true"]
    train(config.build(raw, saving))
    for file in (f"{DINO}/adapter_model.safetensors", f"{CLIP}/adapter_model.safetensors", WEIGHTS):
        parts, whole, saved = (load_file(tmp_path / r / "adapter" / file) for r in ("run", "whole", "saving"))
        assert all(torch.equal(parts[k], whole[k]) for k in whole)
        assert all((saved[k] - whole[k]).abs().max() < 1e-4 for k in whole)
        assert any(whole[k].any() for k in whole if "lora_B" in k)


@pytest.mark.slow
def test_recomputed_blocks_of_encoders_keep_less(checkpoint: Callable[[str, str], Path]) -> None:
    one = family(checkpoint("midi", "scene"), image_encoders="dino")

    def counted(checkpointing: bool) -> Counts:
        network = one.load_denoiser(torch.float32, meta=True)
        with torch.device("meta"):
            tuners.attach(config.LowRank(), one.targets, network, seed=0)
        return estimate.count_operations(one, network, (2, 32, 32), 4, checkpointing=checkpointing)

    kept, recomputed = counted(False), counted(True)
    assert recomputed.activations < kept.activations and recomputed.linear > kept.linear


def test_what_cannot_be_is_reported(
    scene_recipe: Callable[..., dict], checkpoint: Callable[[str, str], Path], tmp_path: Path
) -> None:
    raw = scene_recipe()
    one = family(raw["model"]["checkpoint"], image_encoders="both")
    for changes, message in (
        ({"tuner": {"kind": "full"}}, "needs tuner.kind lora or dora, not full"),
        ({"tuner__kind": "lokr"}, "needs tuner.kind lora or dora, not lokr"),
        ({"runtime": {"parallel": "fsdp"}}, "not supported with runtime.parallel=fsdp; use ddp"),
    ):
        assert message in "; ".join(one.problems(config.build(scene_recipe(**changes))))
    assert one.problems(config.build(raw)) == []
    with pytest.raises(ValueError, match="this checkpoint has DINO only: set it to dino"):
        family(checkpoint("midi", "triposg"), image_encoders="both")
    with pytest.raises(
        ValueError, match="no pattern matches a layer of image_encoder_1, which this recipe trains"
    ):
        train(config.build(scene_recipe(tuner__targets=[rf"({DINO}|blocks).*(to_|_proj).*"])))


@pytest.mark.slow
def test_damaged_and_foreign_adapters_are_reported(scene_recipe: Callable[..., dict], tmp_path: Path) -> None:
    raw = scene_recipe("dino")
    run = train(config.build(raw))
    one = family(raw["model"]["checkpoint"], image_encoders="dino")
    place = Run(run)
    trained_folder(place, None, one)
    with pytest.raises(ValueError, match=r"trained with model\.options\.image_encoders=dino, not frozen"):
        trained_folder(place, None, family(raw["model"]["checkpoint"]))
    file = run / "adapter" / DINO / "adapter_model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="truncated or damaged"):
        trained_folder(place, None, one)
    file.unlink()
    with pytest.raises(ValueError, match="image_encoder_2"):
        trained_folder(place, None, one)


@pytest.mark.untraced
@pytest.mark.slow
def test_what_it_costs_at_the_published_size() -> None:
    raw = {
        "run": "x",
        "model": {
            "family": "midi", "checkpoint": "VAST-AI/MIDI-3D", "options": {"image_encoders": "both"},
        },
        "data": {"sources": "x"},
        "tuner": {"kind": "lora", "rank": 16},
        "memory": {"gradient_checkpointing": True},
    }  # fmt: skip
    shape = (2, 512, 512)
    one = family("VAST-AI/MIDI-3D", image_encoders="both")
    found = estimate.estimate_recipe(
        one, config.build(raw), {shape: 1}, {shape: 1}, [""],
        device=torch.device("meta"), precision=torch.bfloat16, optimizer="adamw",
    )  # fmt: skip
    assert 303e6 + 304e6 < found.parameters - 1_681_911_616 < 309e6 + 309e6
    assert found.trained == 16 * (935_424 + 2 * 24 * 4 * 2 * 1024)
    pictures = 2 * (3 * 224 * 224 + 7 * 512 * 512)
    assert found.cache["clips"] == 2 * 2 * 2048 * 128 + pictures
