"""CogVideoX: what we compute is what the stock pipelines compute, for every variant; and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from inlay import config
from inlay.families.cogvideox import CogVideoX
from inlay.twins import tiny

CPU = torch.device("cpu")
VARIANTS = [variant for name, variant in tiny.cases() if name == "cogvideox"]
SHAPES = {
    "5b": (9, 32, 64),
    "2b": (9, 48, 32),
    "1.5": (13, 32, 64),
    "i2v": (9, 32, 32),
    "1.5-i2v": (13, 32, 48),
}
"""Frames, height and width; where positions are not learned, none that the table or grid was made for."""
every_variant = pytest.mark.parametrize("variant", VARIANTS)
image_variants = pytest.mark.parametrize("variant", ["i2v", "1.5-i2v"])
Checkpoints = Callable[[str, str], Path]


def family(checkpoint: Path | str, **options: object) -> CogVideoX:
    return CogVideoX(config.Model(family="cogvideox", checkpoint=str(checkpoint), **options))  # type: ignore[arg-type]


def picture(shape: tuple[int, int, int]) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (*shape[1:], 3), dtype=np.uint8)


def first_step(folder: Path, prompt: str, shape: tuple[int, int, int]) -> dict:
    """Runs the stock pipeline without guidance; what its transformer was first given, and gave."""
    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    seen: dict = {}

    def record(module: torch.nn.Module, args: tuple, kwargs: dict, output: tuple) -> None:
        if not seen:
            seen.update(kwargs, output=output[0])

    pipe.transformer.register_forward_hook(record, with_kwargs=True)
    image = {"image": Image.fromarray(picture(shape))} if "Image" in type(pipe).__name__ else {}
    pipe(
        prompt=prompt,
        num_frames=shape[0],
        height=shape[1],
        width=shape[2],
        num_inference_steps=3,
        guidance_scale=1.0,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
        **image,
    )
    return seen


@every_variant
def test_first_step_equals_the_stock_pipeline(variant: str, checkpoint: Checkpoints) -> None:
    folder, shape = checkpoint("cogvideox", variant), SHAPES[variant]
    stock = first_step(folder, "A red  car", shape)
    cog = family(folder)
    text = cog.collate(cog.encode_text(cog.load_text_encoder(CPU, torch.float32), ["A red  car"]))
    assert text["text"].shape == (1, 226, 32)
    assert torch.equal(text["text"], stock["encoder_hidden_states"])
    x = stock["hidden_states"].transpose(1, 2)
    shapes = {k: (1, *s) for k, s in cog.shapes(*shape).items()}
    cond = {"image": x[:, 16:, :1]} if cog.images else {}
    assert {"latents": tuple(x[:, :16].shape), **{k: tuple(v.shape) for k, v in cond.items()}} == shapes
    t = (stock["timestep"] + 1) / 1000
    with torch.no_grad():
        ours = cog.predict(cog.load_denoiser(torch.float32), x[:, :16], t, {**text, **cond})
    assert (ours.transpose(1, 2) - stock["output"]).abs().max().item() == 0.0
    assert stock["timestep"].item() == 999 and t.item() == 1.0
