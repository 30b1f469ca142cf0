"""Video VAE of the tiny Wan: training and measurement."""

from __future__ import annotations

import bisect
import contextlib
import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanRMS_norm
from torch import Tensor

from inlaid.tiny import world
from inlaid.tiny.world import FRAMES
from tiny_models.training import MuonAdamW, Progress, load_state, save_state

CONFIG = {"base_dim": 12, "z_dim": 16, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 1}


@dataclass(frozen=True)
class Phase:
    """Training phase on clips of one length."""

    frames: int
    batch: int
    steps: int
    seconds: float
    """Nominal duration of one step in seconds, to divide a time budget among phases."""
    wild: float
    """Share of wild clips; the others are scenes from the training split of `world`."""
    tame: float = 0.0
    """Share of wild clips that use the backgrounds of `world`."""


PHASES = (Phase(1, 8, 1500, 0.25, 0.6), Phase(9, 3, 622, 0.72, 0.6), Phase(17, 2, 1328, 0.9, 0.4))

DECODER = (Phase(17, 2, 601, 0.75, 0.5, tame=0.7), Phase(17, 2, 1899, 0.75, 0.3, tame=0.9))

FOREGROUND = 4.0
"""Additional loss weight of pixels covered by an object."""

KL = 1e-4
"""Weight of the KL term. At the optimum, posterior noise adds half of this value to the mean squared error of
pixels in [-1, 1]."""


def to_model(frames: np.ndarray) -> Tensor:
    """Convert `uint8 (b, t, h, w, 3)` to `float32 (b, 3, t, h, w)` in [-1, 1]."""
    return torch.from_numpy(frames).permute(0, 4, 1, 2, 3).float() / 127.5 - 1


def decode(vae: AutoencoderKLWan, latents: Tensor) -> Tensor:
    """Decode like `vae.decode`, but without the clamp, which has zero gradient outside of [-1, 1].

    Latents `(b, 16, t', h', w')` become videos `(b, 3, t, h, w)`.
    """
    vae.clear_cache()
    z = vae.post_quant_conv(latents)
    chunks = []
    for k in range(z.shape[2]):
        vae._conv_idx = [0]
        chunk = z[:, :, k : k + 1]
        chunks.append(
            vae.decoder(chunk, feat_cache=vae._feat_map, feat_idx=vae._conv_idx, first_chunk=k == 0)
        )
    vae.clear_cache()
    return torch.cat(chunks, dim=2)


@contextlib.contextmanager
def fast_norm() -> Iterator[None]:
    """Replace the forward method of `WanRMS_norm` with a faster one for CPUs, equal up to rounding."""

    def forward(self: Any, x: Tensor) -> Tensor:
        length = x.square().sum(dim=1, keepdim=True).clamp_min(1e-24)
        return x * length.rsqrt() * self.scale * self.gamma + self.bias

    stock = WanRMS_norm.forward
    WanRMS_norm.forward = forward
    try:
        yield
    finally:
        WanRMS_norm.forward = stock


def batch(phase: Phase, key: int) -> tuple[Tensor, Tensor]:
    """Return batch `key`: videos `(b, 3, t, 64, 64)` in [-1, 1] and loss weights `(b, 1, t, 64, 64)`."""
    frames = phase.frames
    rng = np.random.default_rng([frames, key, 53])
    videos, covers = [], []
    for _ in range(phase.batch):
        seed = int(rng.integers(1 << 40))
        if rng.random() < phase.wild:
            tame = phase.tame > 0 and rng.random() < phase.tame
            video, cover = world.wild(seed, frames, tame=tame)
        else:
            video, cover = world.render_with_mask(world.scenes(seed, 1)[0], seed)
            start = rng.integers(FRAMES - frames + 1)
            video, cover = video[start : start + frames], cover[start : start + frames]
        videos.append(video)
        covers.append(cover)
    return to_model(np.stack(videos)), 1 + FOREGROUND * torch.from_numpy(np.stack(covers))[:, None]


def loss(vae: Any, video: Tensor, weight: Tensor, noise: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Return the total loss, the unweighted mean squared error in [-1, 1], and the KL per latent element."""
    mean, logvar = vae._encode(video).chunk(2, dim=1)
    logvar = logvar.clamp(-20, 10)
    z = mean + (0.5 * logvar).exp() * torch.randn(mean.shape, generator=noise)
    error = (decode(vae, z) - video).square()
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    total = (error * weight).sum() / (weight.sum() * 3) + KL * kl
    return total, error.mean().detach(), kl.detach()


@fast_norm()
def train(work: Path, minutes: float | None = None) -> Path:
    """Train in `work`, resuming from a checkpoint. Return the path of the weights.

    Args:
        work: Folder for checkpoints.
        minutes: Target duration. The step counts of all phases are scaled to it after 20 steps, and saved.
    """
    torch.manual_seed(0)
    vae = AutoencoderKLWan(**CONFIG)
    optimizer = MuonAdamW(vae.named_parameters(), muon=0.02, adamw=2e-3)
    state, facts = work / "vae.safetensors", {"done": 0, "seconds": 0.0, "counts": [p.steps for p in PHASES]}
    if state.exists():
        facts, groups = load_state(state)
        vae.load_state_dict(groups["model"])
        optimizer.load(groups["optimizer"])
    step = first = facts["done"]
    saved = began = time.monotonic()
    progress = Progress("vae", sum(facts["counts"]), step)
    while step < (total := sum(facts["counts"])):
        phase = bisect.bisect_right(list(itertools.accumulate(facts["counts"])), step)
        video, weight = batch(PHASES[phase], step)
        video = video.contiguous(memory_format=torch.channels_last_3d)
        value, mse, kl = loss(vae, video, weight, torch.Generator().manual_seed(step))
        value.backward()
        optimizer.step(_rate(step, facts["counts"]))
        step += 1
        if minutes and step == 20 and first == 0:
            pace = (time.monotonic() - began) / 20 / PHASES[0].seconds
            scale = minutes * 60 / (pace * sum(p.steps * p.seconds for p in PHASES))
            facts["counts"] = [max(20, round(p.steps * scale)) for p in PHASES]
            progress.total = total = sum(facts["counts"])
        progress(step, loss=value.detach(), psnr=10 * torch.log10(4 / mse), kl=kl)
        if time.monotonic() - saved > 60 or step == total:
            facts["seconds"] += time.monotonic() - saved
            facts["done"], saved = step, time.monotonic()
            save_state(state, facts, model=vae.state_dict(), optimizer=optimizer.tensors())
    return state


def _rate(step: int, counts: list[int]) -> float:
    """Return the learning rate factor: warmup, constant, linear to zero over the last 80 % of clip steps."""
    total = sum(counts)
    return min(1.0, (step + 1) / 20, (total - step) / (0.8 * (total - counts[0])))


@fast_norm()
def train_decoder(work: Path, vae: AutoencoderKLWan, minutes: float | None = None) -> Path:
    """Continue training only the decoder; the encoder, and therefore all cached latents, do not change.

    Noise is added to the latents, so that the decoder is robust to small errors of the transformer. Learning
    rates decay to zero at the end of each phase and restart once, for the second phase.

    Args:
        work: Folder for checkpoints.
        vae: Result of `train`, with the encoder in its exported precision.
        minutes: Target duration, see `train`.
    """
    vae.requires_grad_(False)
    encode: Any = vae._encode
    modules = torch.nn.ModuleDict({"post_quant_conv": vae.post_quant_conv, "decoder": vae.decoder})
    optimizer = MuonAdamW(modules.requires_grad_(True).named_parameters(), muon=0.01, adamw=1e-3)
    state, facts = (
        work / "decoder.safetensors",
        {"done": 0, "seconds": 0.0, "counts": [p.steps for p in DECODER]},
    )
    if state.exists():
        facts, groups = load_state(state)
        modules.load_state_dict(groups["model"])
        optimizer.load(groups["optimizer"])
    step = first = facts["done"]
    saved = began = time.monotonic()
    progress = Progress("decoder", sum(facts["counts"]), step)
    while step < (total := sum(facts["counts"])):
        ends = list(itertools.accumulate(facts["counts"]))
        phase = bisect.bisect_right(ends, step)
        video, weight = batch(DECODER[phase], step + (1 << 32))
        generator = torch.Generator().manual_seed(step)
        with torch.no_grad():
            z = encode(video.contiguous(memory_format=torch.channels_last_3d)).chunk(2, dim=1)[0]
            amount = 0.12 * torch.rand(len(z), 1, 1, 1, 1, generator=generator)
            z += amount * torch.randn(z.shape, generator=generator)
        error = (decode(vae, z) - video).square()
        loss = (error * weight).sum() / (weight.sum() * 3)
        loss.backward()
        optimizer.step(min(1.0, (step + 1) / 20, (ends[phase] - step) / (0.8 * ends[phase])))
        step += 1
        if minutes and step == 20 and first == 0:
            scale = minutes * 60 / ((time.monotonic() - began) / 20) / total
            facts["counts"] = [round(p.steps * scale) for p in DECODER]
            progress.total = total = sum(facts["counts"])
        progress(step, loss=loss.detach(), psnr=10 * torch.log10(4 / error.mean()).detach())
        if time.monotonic() - saved > 60 or step == total:
            facts["seconds"] += time.monotonic() - saved
            facts["done"], saved = step, time.monotonic()
            save_state(state, facts, model=modules.state_dict(), optimizer=optimizer.tensors())
    return state


@torch.no_grad()
def reconstruct(vae: Any, clips: np.ndarray) -> np.ndarray:
    """Encode (mode) and decode `uint8 (n, 17, 64, 64, 3)` with the stock methods."""
    out = []
    for start in range(0, len(clips), 4):
        latents = vae.encode(to_model(clips[start : start + 4])).latent_dist.mode()
        pixels = vae.decode(latents).sample.permute(0, 2, 3, 4, 1)
        out.append(((pixels + 1) * 127.5).round().clamp(0, 255).byte().numpy())
    return np.concatenate(out)


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Return the peak signal-to-noise ratio in dB, averaged over clips; both `uint8 (n, ...)`."""
    error = ((a.astype(np.float64) - b) ** 2).reshape(len(a), -1).mean(axis=1)
    return float((10 * np.log10(255**2 / error)).mean())
