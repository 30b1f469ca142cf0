"""Wan from images: what the network is shown, and gives, is what the stock pipeline shows it, and gets."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import WanImageToVideoPipeline
from PIL import Image

from inlay import config
from inlay.families.wan import Wan
from inlay.twins import tiny

CPU = torch.device("cpu")
VARIANTS = ("i2v", "flf2v", "i2v-a14b", "ti2v-i2v")
Checkpoint = Callable[[str, str], Path]


def family(folder: Path | str, variant: str, **options: Any) -> Wan:
    return Wan(config.Model(checkpoint=str(folder), **{**tiny.model("wan", variant), **options}))


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
    [("i2v", None), ("flf2v", None), ("i2v-a14b", "high"), ("i2v-a14b", "low"), ("ti2v-i2v", None)],
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
