"""Training data of the tiny MIDI: scenes, rendered and encoded once, and batches by step number."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import repeat
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from inlaid.networks.triposg import TripoSGVAE, sample_posterior
from inlaid.tiny import midi_world
from inlaid.tiny.midi_solids import surface
from tiny_models import midi_images, midi_vae
from tiny_models.training import Progress

PIECE = 250
"""Number of scenes per file."""

COUNTS = (1, 2, 3, 2, 3, 4)
"""Numbers of objects per scene, used cyclically."""

SHIFT = 2.0
"""Timestep shift, as in the scheduler configuration."""


@torch.no_grad()
def _piece(work: Path, vae: TripoSGVAE, start: int) -> None:
    file = work / f"scenes-{start:05d}.safetensors"
    if file.exists():
        return
    scenes = midi_world.scenes(0, PIECE, counts=COUNTS, start=start)
    parts = [midi_images.encoder_inputs(*midi_world.render(scene)) for scene in scenes]
    tensors = {k: torch.from_numpy(np.concatenate([p[k] for p in parts])).contiguous() for k in parts[0]}
    things = [thing for scene in scenes for thing in scene.things]
    surfaces = [surface(thing, 1024, [start, k]) for k, thing in enumerate(things)]
    tensors["moments"] = midi_vae.moments(vae, surfaces, start)
    tensors["facts"] = torch.from_numpy(np.stack([midi_images.describe(t) for t in things]))
    tensors["rows"] = torch.tensor([len(s.things) for s in scenes])
    save_file(tensors, file.with_suffix(".tmp"))
    file.with_suffix(".tmp").replace(file)


def cache(work: Path, vae: TripoSGVAE, n: int, workers: int) -> None:
    """Render and encode `n` training scenes, in files of `PIECE` scenes; existing files are kept."""
    starts, progress = range(0, n, PIECE), Progress("scenes", n)
    with ExitStack() as stack:
        each = map
        if workers:
            pool = ProcessPoolExecutor(workers, get_context("spawn"), torch.set_num_threads, (1,))
            each = stack.enter_context(pool).map
        for done, _ in enumerate(each(_piece, repeat(work), repeat(vae), starts), 1):
            progress(done * PIECE)


@dataclass(frozen=True)
class Batch:
    """Batch of the transformer: one row per object and repeat.

    Rows are in the order of scenes; all objects of all scenes are repeated with other noise.
    """

    inputs: dict[str, Tensor]
    """`midi_images.encoder_inputs` of each object, without repeats."""
    kept: Tensor
    """False for objects of scenes whose image conditioning is dropped: bool (rows / repeats,)."""
    groups: list[int]
    """Number of rows of each scene, for all repeats."""
    x0: Tensor
    """Clean latents (rows, tokens, channels); `noise` has the same shape, `sigma` (noise levels) (rows,)."""
    noise: Tensor
    sigma: Tensor

    def to(self, device: torch.device) -> Batch:
        """Return the batch on a device."""
        inputs = {name: t.to(device) for name, t in self.inputs.items()}
        names = ("kept", "x0", "noise", "sigma")
        return replace(self, inputs=inputs, **{name: getattr(self, name).to(device) for name in names})


class Scenes:
    """Cached scenes in memory; latents have mean 0 and standard deviation 1 in every channel."""

    def __init__(self, work: Path, n: int) -> None:
        pieces = [load_file(work / f"scenes-{start:05d}.safetensors") for start in range(0, n, PIECE)]
        self.tensors = {name: torch.cat([p[name] for p in pieces]) for name in pieces[0]}
        rows = self.tensors.pop("rows")
        self.starts, self.rows = (rows.cumsum(0) - rows).tolist(), rows.tolist()
        mean, logvar = self.tensors.pop("moments").chunk(2, -1)
        self.mean = mean.mean((0, 1))
        self.std = (mean.var((0, 1)) + logvar.exp().mean((0, 1))).sqrt()
        self.moments = torch.cat([(mean - self.mean) / self.std, logvar - 2 * self.std.log()], -1)

    def inputs(self, scenes: Sequence[int], seed: int) -> tuple[dict[str, Tensor], Tensor, list[int]]:
        """Return encoder inputs with RGB channels permuted at random, row indices, and rows per scene."""
        groups = [self.rows[k] for k in scenes]
        index = torch.cat([torch.arange(self.starts[k], self.starts[k] + self.rows[k]) for k in scenes])
        out = {name: t[index] for name, t in self.tensors.items()}
        swap = torch.from_numpy(np.stack([np.random.default_rng([seed, k]).permutation(3) for k in scenes]))
        swap = swap.repeat_interleave(torch.tensor(groups), 0)[:, :, None, None]
        for name in ("clip", "own", "whole"):
            out[name] = out[name].gather(1, swap.expand_as(out[name]))
        return out, index, groups

    def batch(self, step: int, scenes: int, repeats: int, dropped: float) -> Batch:
        """Return batch `step`, which depends only on `step` and the arguments.

        Args:
            step: step number.
            scenes: number of scenes.
            repeats: noise samples per scene.
            dropped: share of scenes without image conditioning.
        """
        rng, generator = np.random.default_rng([step, 71]), torch.Generator().manual_seed(step)
        chosen = sorted(rng.integers(len(self.rows), size=scenes).tolist(), key=self.rows.__getitem__)
        inputs, index, groups = self.inputs(chosen, step)
        kept = (torch.rand(scenes, generator=generator) >= dropped).repeat_interleave(torch.tensor(groups))
        groups = groups * repeats
        moments = self.moments[index].repeat(repeats, 1, 1)
        a, b = (torch.randn(moments.chunk(2, -1)[0].shape, generator=generator) for _ in range(2))
        sigma = sample_sigma(len(groups), generator).repeat_interleave(torch.tensor(groups))
        return Batch(inputs, kept, groups, sample_posterior(moments, a), b, sigma)


def sample_sigma(n: int, generator: torch.Generator) -> Tensor:
    """Sample noise levels (n,) in (0, 1): logit-normal, stratified, shuffled, shifted towards noise."""
    even = (torch.randperm(n, generator=generator) + torch.rand(n, generator=generator)) / n
    u = torch.sigmoid(torch.special.ndtri(even.clamp(1e-5, 1 - 1e-5)))
    return SHIFT * u / (1 + (SHIFT - 1) * u)
