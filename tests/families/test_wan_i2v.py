"""Wan from images: what the network is shown, and gives, is what the stock pipeline shows it, and gets."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import WanImageToVideoPipeline
from PIL import Image

from inlaid import config
from inlaid.adapters import tuners
from inlaid.families.wan import Wan
from inlaid.media.video import probe
from inlaid.tiny import random
from inlaid.tiny.random import TEXT_WIDTH
from support.commands import inlaid
from support.slow import mostly_slow, slow

CPU = torch.device("cpu")
VARIANTS = ("i2v", "flf2v", "i2v-a14b", "ti2v-i2v")
mostly_few_variants = pytest.mark.parametrize(
    "variant", mostly_slow(VARIANTS, ("flf2v", "ti2v-i2v").__contains__)
)
"""All ways of images into the network: by CLIP, beside the noise and, in TI2V, as the first latent frame."""
Checkpoint = Callable[[str, str], Path]


def family(folder: Path | str, variant: str, **options: Any) -> Wan:
    return Wan(config.Model(checkpoint=str(folder), **{**random.model("wan", variant), **options}))


def clip(wan: Wan, frames: int = 9) -> np.ndarray:
    side = 2 * wan.grid.spatial
    return np.random.default_rng(0).integers(0, 255, (frames, side, side, 3), dtype=np.uint8)


def stock(folder: Path, wan: Wan, frames: np.ndarray, steps: int = 1, **options: Any) -> dict[str, Any]:
    """Runs the stock pipeline from a clip's own images; what the network was first given, and gave."""
    pipe: Any = WanImageToVideoPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    seen: dict[str, Any] = {}

    def record(module: torch.nn.Module, args: tuple, kwargs: dict, output: tuple) -> None:
        if not seen:
            seen.update(kwargs, output=output[0])

    getattr(pipe, wan.component).register_forward_hook(record, with_kwargs=True)
    images = [Image.fromarray(frames[i]) for i in (0, -1)]
    video = pipe(
        images[0],
        "a car",
        last_image=images[1] if "last" in wan.images else None,
        height=frames.shape[1],
        width=frames.shape[2],
        num_frames=len(frames),
        num_inference_steps=steps,
        generator=torch.Generator().manual_seed(0),
        **{"output_type": "latent", **options},
    ).frames
    return {**seen, "video": video}


@pytest.mark.parametrize(
    ("variant", "expert"),
    [slow("i2v", None), ("flf2v", None), slow("i2v-a14b", "high"), ("i2v-a14b", "low"), ("ti2v-i2v", None)],
)
def test_first_step_equals_the_stock_pipeline(
    variant: str, expert: str | None, checkpoint: Checkpoint
) -> None:
    folder = checkpoint("wan", variant)
    wan = family(folder, variant, expert=expert)
    frames = clip(wan)
    theirs = stock(folder, wan, frames, steps=8 if expert else 1)
    item = wan.encode_media(wan.load_media_encoder(CPU), frames)
    item = {k: v[None] for k, v in item.items()}
    x, time = theirs["hidden_states"], theirs["timestep"].flatten()
    if wan.expand_timesteps:
        assert torch.equal(item["first"], x[:, :, :1])
        x_t = x[:, :, 1:]
        assert (time.view(3, -1)[0] == 0).all() and (time.view(3, -1)[1:] == time[-1]).all()
    else:
        assert torch.equal(item["image_latents"], x[:, 20:])
        x_t = x[:, :16]
        assert x[:, 16:20].sum() == (4 + (variant == "flf2v")) * x[0, 0, 0].numel()
    if "image_embeds" in item:
        assert torch.equal(item["image_embeds"][0], theirs["encoder_hidden_states_image"])
    t = time[-1:].float() / 1000
    assert (t.item() >= 0.9) == (expert != "low")
    text = wan.collate(wan.encode_text(wan.load_text_encoder(CPU, torch.float32), ["a car"]))
    with torch.no_grad():
        ours = wan.predict(wan.load_denoiser(torch.float32), x_t, t, {**text, **item})
    expected = theirs["output"][:, :, 1:] if wan.expand_timesteps else theirs["output"]
    limit = 1e-6 if t.item() * 1000 != time[-1].item() else 0.0
    assert ours.shape == x_t.shape and (ours - expected).abs().max().item() <= limit


@mostly_few_variants
def test_clips_of_a_batch_do_not_mix(variant: str, checkpoint: Checkpoint) -> None:
    wan = family(checkpoint("wan", variant), variant)
    encoder, denoiser = wan.load_media_encoder(CPU), wan.load_denoiser(torch.float32)
    frames = clip(wan)
    items = [wan.encode_media(encoder, each) for each in (frames, frames[::-1])]
    both = {k: torch.stack([item[k] for item in items]) for k in items[0]}
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(both.pop("latents").shape, generator=generator)
    t, text = torch.tensor([0.3, 0.8]), torch.randn(2, 512, TEXT_WIDTH, generator=generator)
    with torch.no_grad():
        together = wan.predict(denoiser, noise, t, {"text": text, **both})
        for i in range(2):
            one = {k: v[i : i + 1] for k, v in {"text": text, **both}.items()}
            alone = wan.predict(denoiser, noise[i : i + 1], t[i : i + 1], one)
            assert (together[i : i + 1] - alone).abs().max() < 1e-5
            for name in both:
                changed = wan.predict(
                    denoiser, noise[i : i + 1], t[i : i + 1], {**one, name: both[name][[1 - i]]}
                )
                assert (changed - alone).abs().max() > 1e-6, f"{name} is seen"


@mostly_few_variants
def test_sample_is_the_stock_pipeline(variant: str, checkpoint: Checkpoint) -> None:
    folder = checkpoint("wan", variant)
    wan = family(folder, variant)
    frames = clip(wan)
    text, negative = wan.encode_text(wan.load_text_encoder(CPU, torch.float32), ["a car", ""])
    ours = wan.sample(
        wan.pipeline(denoiser=None, device=CPU, dtype=torch.float32),
        text,
        negative,
        size=frames.shape[1:3],
        frames=len(frames),
        steps=2,
        guidance=5.0,
        generator=torch.Generator().manual_seed(0),
        images=[frames[i] for i in (0, -1)][: len(wan.images)],
    )
    theirs = stock(folder, wan, frames, steps=2, output_type="np")["video"][0]
    assert np.array_equal(ours, (theirs * 255).round().astype(np.uint8))


@pytest.mark.slow
def test_published_checkpoints_have_the_published_sizes() -> None:
    def model(name: str, **options: Any) -> Wan:
        return Wan(config.Model(family="wan", checkpoint=f"Wan-AI/{name}", **options))

    def size(wan: Wan) -> int:
        return sum(p.numel() for p in wan.load_denoiser(torch.float32, meta=True).parameters())

    i2v, flf2v = model("Wan2.1-I2V-14B-480P-Diffusers"), model("Wan2.1-FLF2V-14B-720P-diffusers")
    low = model("Wan2.2-I2V-A14B-Diffusers", expert="low")
    both = model("Wan2.2-TI2V-5B-Diffusers", task="i2v")
    assert size(i2v) == pytest.approx(16.40e9, rel=1e-3)
    assert size(flf2v) - size(i2v) == 514 * 1280
    assert size(low) == pytest.approx(14.29e9, rel=1e-3)
    assert [f.images for f in (i2v, flf2v, low)] == [("first",), ("first", "last"), ("first",)]
    latent = (16, 21, 60, 104)
    shapes = {"latents": latent, "image_latents": latent}
    assert low.shapes(81, 480, 832) == shapes
    assert i2v.shapes(81, 480, 832) == {**shapes, "image_embeds": (1, 257, 1280)}
    assert flf2v.shapes(81, 480, 832)["image_embeds"] == (2, 257, 1280)
    assert both.shapes(121, 704, 1280) == {"latents": (48, 30, 44, 80), "first": (48, 1, 44, 80)}
    assert both.tokens(121, 704, 1280) == 27280 and i2v.tokens(81, 480, 832) == 32760
    assert low.objective(config.Objective(), (480, 832)).interval == (0.0, 0.9)
    trained = tuners.attach(
        config.LowRank(rank=32), i2v.targets, i2v.load_denoiser(torch.float32, meta=True), seed=0
    )
    assert sum(p.numel() for p in trained.values()) == 153_354_240


def test_layers_that_read_the_image_can_be_trained_too(checkpoint: Checkpoint) -> None:
    wan = family(checkpoint("wan", "i2v"), "i2v")
    section = config.LowRank(targets=[*wan.targets, r"blocks\.\d+\.attn2\.add_[kv]_proj"])
    trained = tuners.attach(section, wan.targets, wan.load_denoiser(torch.float32), seed=0)
    assert len(trained) == 2 * 12 * 2


# --- mistakes -----------------------------------------------------------------------------------------------


@pytest.fixture
def written(checkpoint: Checkpoint, make_clips: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """A function that writes the recipe of a variant; keyword `section__key` changes a value."""

    def write(variant: str, **changes: Any) -> Path:
        raw: dict[str, Any] = {
            "run": str(tmp_path / "run"),
            "model": {**random.model("wan", variant), "checkpoint": str(checkpoint("wan", variant))},
            "data": {"sources": str(make_clips(2)), "size": [32, 32], "frames": 9, "validation": 0},
            "train": {"steps": 1, "trackers": []},
            "sample": {"steps": 1},
        }
        for key, value in changes.items():
            section, _, name = key.partition("__")
            raw[section] = {**raw[section], name: value}
        path = tmp_path / "run" / "config.yaml"  # so that the folder is a run, too
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(raw), "utf-8")
        return path

    return write


@pytest.fixture
def pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The current folder has two images and a file that only looks like one."""
    monkeypatch.chdir(tmp_path)
    for name in ("start.png", "end.png"):
        Image.new("RGB", (40, 30), "orange").save(name)
    Path("text.png").write_text("not an image", "utf-8")
    Path("clip.mp4").write_bytes(b"")


FIRST = "needs a first image for each prompt: "
BOTH = "needs a first image and a last image for each prompt: "


@pytest.mark.usefixtures("pictures")
@pytest.mark.parametrize(
    ("variant", "arguments", "stated"),
    [
        ("i2v", ["a cat"], FIRST + "1 prompts, 0 with images"),
        ("i2v", ["a cat", "--image", "none.png"], "--image: none.png: no such file"),
        ("i2v", ["a cat", "--image", "text.png"], "text.png: is not an image"),
        ("i2v", ["a cat", "--image", "clip.mp4"], "clip.mp4: not an image; use a file such as start.png"),
        ("i2v", ["a cat", "-i", "start.png", "--last-image", "end.png"], FIRST + "prompt 1 has 2"),
        ("i2v", ["a", "b", "c", "-i", "start.png", "-i", "end.png"], "3 prompt(s) need one --image, or 3"),
        ("i2v", ["a cat", "-i", "start.png", "--frames", "1"], "1 frames is not 4n+5: use 5"),
        ("flf2v", ["a cat", "--image", "start.png"], BOTH + "prompt 1 has 1"),
        ("flf2v", ["a cat", "--last-image", "end.png"], "--image: 1 prompt(s) need one --image"),
        ("ti2v-i2v", ["a cat"], FIRST + "1 prompts, 0 with images"),
        ("ti2v", ["a cat", "-i", "start.png"], "is text-to-video and uses no images; leave"),
        ("t2v", ["a cat", "-i", "start.png"], "is text-to-video and uses no images; leave"),
    ],
)
def test_generate_refuses(
    variant: str, arguments: list[str], stated: str, written: Callable[..., Path]
) -> None:
    done = inlaid("generate", written(variant).parent, *arguments)
    assert done.code == 2 and stated in done.output and "Traceback" not in done.output, done.output


@pytest.mark.usefixtures("pictures")
@pytest.mark.parametrize(
    ("variant", "changes", "stated"),
    [
        ("i2v", {"sample__prompts": ["a cat"]}, "sample.images: "),
        (
            "i2v",
            {"sample__prompts": ["a cat"], "sample__images": ["none.png"]},
            "sample.images: none.png: no such file",
        ),
        ("i2v", {"sample__prompts": ["a cat"], "sample__images": ["text.png"]}, "text.png: is not an image"),
        ("flf2v", {"sample__prompts": ["a"], "sample__images": ["end.png"]}, BOTH + "prompt 1 has 1"),
        ("t2v", {"sample__prompts": ["a"], "sample__images": ["end.png"]}, "is text-to-video and uses no"),
        ("t2v", {"model__task": "i2v"}, "is for t2v, not for i2v; leave `task` out"),
        ("i2v", {"model__task": "t2v"}, "is for i2v, not for t2v; leave `task` out"),
        ("i2v", {"data__frames": 1}, "data: 1 frames is not 4n+5: use 5"),
        ("i2v-a14b", {"model__expert": None}, "two experts; choose `high` (t >= 0.9) or `low`"),
    ],
)
def test_check_refuses(
    variant: str, changes: dict[str, Any], stated: str, written: Callable[..., Path]
) -> None:
    done = inlaid("check", written(variant, **changes))
    assert done.code == 2 and stated in done.output and "Traceback" not in done.output, done.output


@pytest.mark.parametrize("part", ["image_encoder", "image_processor"])
def test_a_checkpoint_without_its_eyes_is_refused(part: str, checkpoint: Checkpoint, tmp_path: Path) -> None:
    folder = shutil.copytree(checkpoint("wan", "i2v"), tmp_path / "copy")
    shutil.rmtree(folder / part)
    with pytest.raises(ValueError, match=f"`{part}`.*"):
        family(folder, "i2v").load_media_encoder(CPU)


@pytest.mark.usefixtures("pictures")
def test_the_json_beside_a_video_names_its_images(written: Callable[..., Path]) -> None:
    path = written("flf2v", data__cache="cache", sample__every=1)
    assert inlaid("train", path).code == 0
    run = path.parent
    (during,) = run.glob("samples/step-000001/00-*.json")
    assert json.loads(during.read_text("utf-8"))["images"] == [
        "first frame of 00.mp4",
        "last frame of 00.mp4",
    ]
    done = inlaid("generate", run, "a cat", "-i", "start.png", "--last-image", "end.png")
    assert done.code == 0, done.output
    (after,) = run.glob("samples/generated/*.json")
    assert json.loads(after.read_text("utf-8"))["images"] == ["start.png", "end.png"]
    assert probe(after.with_suffix(".mp4")).frames == 9


@pytest.mark.parametrize("variant", ["i2v", "flf2v"])
def test_short_text_is_refused_where_clip_comes_before_the_text(variant: str, checkpoint: Checkpoint) -> None:
    with pytest.raises(ValueError, match=r"model\.options\.text: .* leave it out"):
        family(checkpoint("wan", variant), variant, options={"text": "short"})
