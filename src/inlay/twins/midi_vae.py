"""The shape VAE of the MIDI twin: building, training, and how well it keeps shapes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from inlay import mesh
from inlay.models.triposg import TripoSGVAE, choose, sample

from . import midi_world as world
from .training import MuonAdamW, Progress, load_state, save_state

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
"""Latent tokens of an object."""

REACH = 0.1
"""Distance from the surface at which the field ends: it is distance / REACH, between -1 and 1."""

KL = 5e-3
THINGS, STEPS, BATCH, POINTS, ASKED = 4000, 2000, 24, 256, 256
RATES = 0.02, 2e-3
SAVE_EVERY = 60.0
"""Seconds between checkpoints."""


def moments(vae: TripoSGVAE, surfaces: Sequence[np.ndarray], seed: int) -> Tensor:
    """Moments (n, TOKENS, 2 channels) of surfaces (p, 6) with as many points each."""
    chosen = np.stack([s[choose(s, TOKENS, seed)] for s in surfaces])
    return vae.encode(torch.from_numpy(np.stack(surfaces)), torch.from_numpy(chosen))


class Pool:
    """Things of the VAE's training, drawn once: surfaces, places around them and distances there."""

    def __init__(self, n: int = THINGS, points: int = 8 * POINTS, places: int = 8 * ASKED) -> None:
        self.surfaces = np.empty((n, points, 6), np.float32)
        self.places = np.empty((n, places, 3), np.float32)
        self.distances = np.empty((n, places), np.float32)
        for k in range(n):
            thing, rng = world.wild([2, k]), np.random.default_rng([3, k])
            self.surfaces[k] = world.surface(thing, points, [4, k])
            half, quarter = self.surfaces[k, : places // 2, :3], places // 4
            near = np.resize(half, (places // 2, 3)) + rng.normal(
                0, rng.choice([0.02, 0.06], (places // 2, 1)), (places // 2, 3)
            )
            low, high = world.bounds(thing) + np.array([[-0.15], [0.15]])
            around = rng.uniform(low, high, (quarter, 3))
            anywhere = rng.uniform(-mesh.BOUND, mesh.BOUND, (places - len(near) - quarter, 3))
            self.places[k] = rng.permutation(np.concatenate([near, around, anywhere]))
            self.distances[k] = world.distance(thing, self.places[k])

    def batch(self, step: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Batch `step`, a function of it: surfaces, chosen points of them, places, distances there.

        Things come in any of the eight ways to mirror and swap the horizontal axes.
        """
        rng, out = np.random.default_rng([5, step]), []
        for k in rng.integers(len(self.surfaces), size=BATCH):
            points = self.surfaces[k, rng.integers(self.surfaces.shape[1], size=POINTS)]
            where = rng.integers(self.places.shape[1], size=ASKED)
            axes = np.array([0, 1, 2] if rng.random() < 0.5 else [2, 1, 0])
            signs = np.array([rng.choice([-1, 1]), 1, rng.choice([-1, 1])], np.float32)
            points = np.concatenate([points[:, axes] * signs, points[:, 3 + axes] * signs], -1)
            places = self.places[k, where][:, axes] * signs
            out.append((points, points[choose(points, TOKENS, step)], places, self.distances[k, where]))
        a, b, c, d = (torch.from_numpy(np.stack(x)) for x in zip(*out, strict=True))
        return a, b, c, d


def train(work: Path, minutes: float | None = None, steps: int = STEPS) -> Path:
    """Train in `work`, continuing what is there. Returns the file of the weights.

    Args:
        work: Folder for checkpoints.
        minutes: Scale the training to this time; the count is recorded.
        steps: How many, otherwise.
    """
    state, facts, groups = work / "vae.safetensors", {"done": 0, "steps": steps, "seconds": 0.0}, {}
    torch.manual_seed(0)
    vae = TripoSGVAE(**CONFIG)
    optimizer = MuonAdamW(vae.named_parameters(), *RATES, lambda n: "proj_out" in n)
    average = {name: p.detach().clone() for name, p in vae.named_parameters()}
    if state.exists():
        facts, groups = load_state(state)
        vae.load_state_dict(groups["model"])
        optimizer.load(groups["optimizer"])
        average = groups["average"]
    pool = Pool()
    progress, saved = Progress("vae", facts["steps"], facts["done"]), time.monotonic()
    for step in range(facts["done"], 10**9):
        if step >= facts["steps"]:
            break
        surfaces, chosen, places, distances = pool.batch(step)
        noise = torch.randn(
            BATCH, TOKENS, CONFIG["latent_channels"], generator=torch.Generator().manual_seed(step)
        )
        with sdpa_kernel(SDPBackend.MATH), torch.autocast("cpu", torch.bfloat16):
            mean_logvar = vae.encode(surfaces, chosen).float()
            field = vae.field(vae.tokens(sample(mean_logvar, noise)), places).float()
        fit = (field - (distances / REACH).clamp(-1, 1)).abs().mean()
        mean, logvar = mean_logvar.chunk(2, -1)
        kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()
        (fit + KL * kl).backward()
        left = (facts["steps"] - step) / (0.5 * facts["steps"])
        optimizer.step(min(1.0, (step + 1) / 50, left))
        torch._foreach_lerp_(
            list(average.values()),
            [p.detach() for p in vae.parameters()],
            1 - min(0.99, (1 + step) / (10 + step)),
        )
        if minutes and step == 40 and facts["seconds"] == 0.0:
            facts["steps"] = max(60, round(minutes * 60 / ((time.monotonic() - saved) / 41)))
            progress.total = facts["steps"]
        wrong = ((field < 0) != (distances < 0)).float().mean()
        progress(step + 1, fit=fit.detach(), kl=kl.detach(), wrong=wrong)
        if time.monotonic() - saved > SAVE_EVERY or step + 1 == facts["steps"]:
            facts |= {"seconds": facts["seconds"] + time.monotonic() - saved, "done": step + 1}
            saved = time.monotonic()
            save_state(state, facts, model=vae.state_dict(), optimizer=optimizer.tensors(), average=average)
    return state
