"""Shape VAE of the tiny MIDI: configuration, data and training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from inlaid.media.isosurface import BOUND
from inlaid.networks.triposg import TripoSGVAE, choose_points, sample_posterior
from inlaid.tiny import midi_world
from inlaid.tiny.midi_solids import bounds, distance, surface
from tiny_models.training import MuonAdamW, run

CONFIG: dict[str, Any] = {
    "latent_channels": 16,
    "num_attention_heads": 4,
    "width_encoder": 96,
    "width_decoder": 96,
    "num_layers_encoder": 2,
    "num_layers_decoder": 3,
    "embed_frequency": 6,
}

TOKENS = 16
"""Latent tokens per object."""

REACH = 0.1
"""Truncation distance of the field, which is distance / REACH clamped to [-1, 1]."""

KL = 5e-3

THINGS, STEPS, BATCH, POINTS, ASKED = 16000, 2800, 64, 256, 256

RATES = 0.02, 2e-3


def moments(vae: TripoSGVAE, surfaces: Sequence[np.ndarray], seed: int) -> Tensor:
    """Return the moments (n, TOKENS, 2 * channels) of surfaces (p, 6) with equal numbers of points."""
    chosen = np.stack([s[choose_points(s, TOKENS, seed)] for s in surfaces])
    return vae.encode(torch.from_numpy(np.stack(surfaces)), torch.from_numpy(chosen))


class Batch(NamedTuple):
    """Training batch of the VAE."""

    surfaces: Tensor
    """Surface points (b, POINTS, 6); `chosen` holds selected points (b, TOKENS, 6)."""
    chosen: Tensor
    places: Tensor
    """Query points (b, ASKED, 3); `distances` holds their signed distances (b, ASKED)."""
    distances: Tensor
    noise: Tensor
    """Noise for posterior sampling (b, TOKENS, channels)."""


class Pool:
    """Training objects of the VAE, sampled once: surfaces, query points and signed distances."""

    def __init__(self, n: int = THINGS, points: int = 8 * POINTS, places: int = 8 * ASKED) -> None:
        self.surfaces = np.empty((n, points, 6), np.float32)
        self.places = np.empty((n, places, 3), np.float32)
        self.distances = np.empty((n, places), np.float32)
        for k in range(n):
            thing, rng = midi_world.wild([2, k]), np.random.default_rng([3, k])
            self.surfaces[k] = surface(thing, points, [4, k])
            half, quarter = self.surfaces[k, : places // 2, :3], places // 4
            near = np.resize(half, (places // 2, 3)) + rng.normal(
                0, rng.choice([0.02, 0.06], (places // 2, 1)), (places // 2, 3)
            )
            low, high = bounds(thing) + np.array([[-0.15], [0.15]])
            around = rng.uniform(low, high, (quarter, 3))
            anywhere = rng.uniform(-BOUND, BOUND, (places - len(near) - quarter, 3))
            self.places[k] = rng.permutation(np.concatenate([near, around, anywhere]))
            self.distances[k] = distance(thing, self.places[k])

    def batch(self, step: int) -> Batch:
        """Return batch `step`, which depends only on `step`.

        The horizontal axes of each object are randomly mirrored and swapped (eight variants).
        """
        rng, out = np.random.default_rng([5, step]), []
        for k in rng.integers(len(self.surfaces), size=BATCH):
            points = self.surfaces[k, rng.integers(self.surfaces.shape[1], size=POINTS)]
            where = rng.integers(self.places.shape[1], size=ASKED)
            axes = np.array([0, 1, 2] if rng.random() < 0.5 else [2, 1, 0])
            signs = np.array([rng.choice([-1, 1]), 1, rng.choice([-1, 1])], np.float32)
            points = np.concatenate([points[:, axes] * signs, points[:, 3 + axes] * signs], -1)
            places = self.places[k, where][:, axes] * signs
            out.append(
                (points, points[choose_points(points, TOKENS, step)], places, self.distances[k, where])
            )
        shape = BATCH, TOKENS, CONFIG["latent_channels"]
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(step))
        a, b, c, d = (torch.from_numpy(np.stack(x)) for x in zip(*out, strict=True))
        return Batch(a, b, c, d, noise)


def train(work: Path, device: torch.device, workers: int, steps: int = STEPS) -> Path:
    """Train for `steps` steps in `work`, resuming from a checkpoint. Return the path of the weights."""
    torch.manual_seed(0)
    vae, pool = TripoSGVAE(**CONFIG), Pool()
    torch.nn.Module.to(vae, device)

    def losses(batch: Batch) -> dict[str, Tensor]:
        surfaces, chosen, places, distances, noise = (t.to(device) for t in batch)
        with sdpa_kernel(SDPBackend.MATH), torch.autocast(device.type, torch.bfloat16):
            moments = vae.encode(surfaces, chosen).float()
            field = vae.field(vae.tokens(sample_posterior(moments, noise)), places).float()
        fit = (field - (distances / REACH).clamp(-1, 1)).abs().mean()
        mean, logvar = moments.chunk(2, -1)
        kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()
        wrong = ((field < 0) != (distances < 0)).float().mean()
        return {"loss": fit + KL * kl, "fit": fit, "kl": kl, "wrong": wrong}

    optimizer = MuonAdamW(vae.named_parameters(), *RATES, lambda name: "proj_out" in name)
    return run("vae", work / "vae.safetensors", vae, optimizer, steps, pool.batch, losses, workers=workers)
