"""Untrained RGBA VAEs, and transparent discs for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLWan

from inlaid.networks import rgba_vae_checkpoint
from inlaid.networks.rgba_vae import RgbaVae


def made(vae: AutoencoderKLWan, seed: int = 0, rank: int = 2) -> RgbaVae:
    """An RGBA VAE whose decoders differ from the VAE's and from each other."""
    rgba_vae = rgba_vae_checkpoint.new(vae, rank, seed)
    generator = torch.Generator().manual_seed(seed)
    for lora in (rgba_vae.rgb, rgba_vae.alpha):
        for b in lora.b:
            b.data.copy_(torch.randn(b.shape, generator=generator) * 0.3)
    blocks: Any = rgba_vae.merge.att
    for attention in blocks:
        torch.nn.init.normal_(attention.proj.weight, generator=generator)  # zero until trained
    return rgba_vae


def disc(
    frames: int = 9, size: int = 32, radius: float = 9, *, soft: float = 3.0, seed: int = 0
) -> np.ndarray:
    """A soft-edged, half transparent disc that moves: uint8 (t, h, w, 4)."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size]
    out = np.empty((frames, size, size, 4), np.uint8)
    out[..., :3] = rng.integers(40, 220, 3)
    start = rng.uniform(10, 14, 2)
    for t in range(frames):
        away = np.hypot(x - start[0] - t * 0.6, y - start[1])
        out[t, ..., 3] = 255 * np.clip(0.5 + (radius - away) / soft, 0, 1) * np.where(x > 14, 0.5, 1.0)
    return out


def rgba_clips(folder: Path, n: int = 4, frames: int = 9, size: int = 32) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(n):
        np.savez(folder / f"{i}.npz", frames=disc(frames, size, seed=i), fps=16)
        (folder / f"{i}.txt").write_text(f"disc number {i}", "utf-8")
    return folder
