"""The video autoencoder of the Wan twin: training, measuring, export."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders import autoencoder_kl_wan
from torch import Tensor

from . import world
from .training import MuonAdamW, Progress, load_state, save_state

CONFIG = {"base_dim": 12, "z_dim": 16, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 1}


@dataclass(frozen=True)
class Phase:
    """A stretch of training on clips of one length."""

    frames: int
    batch: int
    steps: int
    seconds: float
    """Nominal cost of one step, to share out a time budget."""
    wild: float
    """Share of wild clips; the rest is the world, training side."""


PHASES = (Phase(1, 8, 1500, 0.25, 0.6), Phase(9, 3, 622, 0.72, 0.6), Phase(17, 2, 1328, 0.9, 0.4))
DECODER = Phase(17, 2, 2000, 0.8, 0.35)
FOREGROUND = 4.0
"""Extra weight of pixels that an object covers."""
KL = 1e-4
"""Times half of this is what posterior noise may add to the mean squared error in [-1, 1]."""


def to_model(frames: np.ndarray) -> Tensor:
    """`uint8 (b, t, h, w, 3)` to `float32 (b, 3, t, h, w)` in [-1, 1]."""
    return torch.from_numpy(frames).permute(0, 4, 1, 2, 3).float() / 127.5 - 1


def decode(vae: AutoencoderKLWan, latents: Tensor) -> Tensor:
    """`vae.decode` without the clamp, which cuts the gradient: `(b, 16, t', h', w')` to `(b, 3, t, h, w)`."""
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


def _fast_norm(self: torch.nn.Module, x: Tensor) -> Tensor:
    """`WanRMS_norm.forward` with a quicker norm over channels on CPU; equal up to rounding."""
    length = x.square().sum(dim=1, keepdim=True).clamp_min(1e-24)
    return x * length.rsqrt() * self.scale * self.gamma + self.bias


def batch(phase: Phase, key: int) -> tuple[Tensor, Tensor]:
    """Training batch `key`: videos `(b, 3, t, 64, 64)` in [-1, 1] and loss weights `(b, 1, t, 64, 64)`."""
    frames = phase.frames
    rng = np.random.default_rng([frames, key, 53])
    videos, covers = [], []
    for _ in range(phase.batch):
        seed = int(rng.integers(1 << 40))
        if rng.random() < phase.wild:
            video, cover = world.wild(seed, frames)
        else:
            video, cover = world.render_with_mask(world.scenes(seed, 1)[0], seed)
            start = rng.integers(world.FRAMES - frames + 1)
            video, cover = video[start : start + frames], cover[start : start + frames]
        videos.append(video)
        covers.append(cover)
    return to_model(np.stack(videos)), 1 + FOREGROUND * torch.from_numpy(np.stack(covers))[:, None]


def loss(
    vae: AutoencoderKLWan, video: Tensor, weight: Tensor, noise: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Total loss, plain mean squared error in [-1, 1], KL per latent element."""
    mean, logvar = vae._encode(video).chunk(2, dim=1)
    logvar = logvar.clamp(-20, 10)
    z = mean + (0.5 * logvar).exp() * torch.randn(mean.shape, generator=noise)
    error = (decode(vae, z) - video).square()
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    total = (error * weight).sum() / (weight.sum() * 3) + KL * kl
    return total, error.mean().detach(), kl.detach()


def train(work: Path, minutes: float | None = None) -> Path:
    """Train in `work`, continuing what is there. Returns the file with the finished weights.

    Args:
        work: Folder for checkpoints.
        minutes: Scale all phases to this time by the cost of the first steps; the counts are recorded.
    """
    autoencoder_kl_wan.WanRMS_norm.forward = _fast_norm
    torch.manual_seed(0)
    vae = AutoencoderKLWan(**CONFIG)
    optimizer = MuonAdamW(vae.named_parameters(), muon=0.02, adamw=2e-3)
    state, facts = work / "vae.safetensors", {"done": 0, "seconds": 0.0, "counts": [p.steps for p in PHASES]}
    if state.exists():
        facts, groups = load_state(state)
        vae.load_state_dict(groups["model"])
        optimizer.load(groups["optimizer"])
    saved = began = time.monotonic()
    total = sum(facts["counts"])
    progress = Progress("vae", total, facts["done"])
    for step in range(facts["done"], total):
        phase, left = 0, step
        while left >= facts["counts"][phase]:
            left -= facts["counts"][phase]
            phase += 1
        noise = torch.Generator().manual_seed(step)
        video, weight = batch(PHASES[phase], step)
        value, mse, kl = loss(vae, video.contiguous(memory_format=torch.channels_last_3d), weight, noise)
        value.backward()
        optimizer.step(_rate(step, facts["counts"]))
        if minutes and step == 19 and "scale" not in facts:
            facts["scale"] = _fit(minutes, (time.monotonic() - began) / 20)
            facts["counts"] = [max(20, round(p.steps * facts["scale"])) for p in PHASES]
            total = sum(facts["counts"])
            return_to = facts | {"done": step + 1, "seconds": time.monotonic() - began}
            save_state(state, return_to, model=vae.state_dict(), optimizer=optimizer.tensors())
            return train(work, minutes)
        progress(step + 1, loss=value.detach(), psnr=10 * torch.log10(4 / mse), kl=kl)
        if time.monotonic() - saved > 60 or step + 1 == total:
            facts["seconds"] += time.monotonic() - saved
            facts["done"], saved = step + 1, time.monotonic()
            save_state(state, facts, model=vae.state_dict(), optimizer=optimizer.tensors())
    return state


def train_decoder(work: Path, vae: AutoencoderKLWan, minutes: float | None = None) -> Path:
    """Continue with the decoder alone: the encoder, and so every cached latent, stays as it is.

    Latents come with noise, so that the decoder forgives what a transformer gets slightly wrong.

    Args:
        work: Folder for checkpoints.
        vae: What `train` made, in the precision in which the encoder ships.
        minutes: Replace the number of steps by what fits this time; the number is recorded.
    """
    autoencoder_kl_wan.WanRMS_norm.forward = _fast_norm
    vae.requires_grad_(False)
    modules = torch.nn.ModuleDict(
        {"post_quant_conv": vae.post_quant_conv, "decoder": vae.decoder}
    ).requires_grad_(True)
    optimizer = MuonAdamW(modules.named_parameters(), muon=0.01, adamw=1e-3)
    state, facts = work / "decoder.safetensors", {"done": 0, "seconds": 0.0, "steps": DECODER.steps}
    if state.exists():
        facts, groups = load_state(state)
        modules.load_state_dict(groups["model"])
        optimizer.load(groups["optimizer"])
    saved = began = time.monotonic()
    progress, resumed = Progress("decoder", facts["steps"], facts["done"]), facts["done"]
    step = resumed
    while step < facts["steps"]:
        video, weight = batch(DECODER, step + (1 << 32))
        noise = torch.Generator().manual_seed(step)
        with torch.no_grad():
            z = vae._encode(video.contiguous(memory_format=torch.channels_last_3d)).chunk(2, dim=1)[0]
            z = z + 0.08 * torch.rand(len(z), 1, 1, 1, 1, generator=noise) * torch.randn(
                z.shape, generator=noise
            )
        error = (decode(vae, z) - video).square()
        total = (error * weight).sum() / (weight.sum() * 3)
        total.backward()
        optimizer.step(min(1.0, (step + 1) / 20, (facts["steps"] - step) / (0.6 * facts["steps"])))
        step += 1
        if minutes and step == 20 and resumed == 0:
            facts["steps"] = progress.total = int(minutes * 60 / ((time.monotonic() - began) / 20))
        progress(step, loss=total.detach(), psnr=10 * torch.log10(4 / error.mean()).detach())
        if time.monotonic() - saved > 60 or step == facts["steps"]:
            facts["seconds"] += time.monotonic() - saved
            facts["done"], saved = step, time.monotonic()
            save_state(state, facts, model=modules.state_dict(), optimizer=optimizer.tensors())
    return state


def _fit(minutes: float, seconds: float) -> float:
    """Factor on all step counts, from a first-phase step that took `seconds`."""
    nominal = sum(p.steps * p.seconds for p in PHASES)
    return minutes * 60 / (nominal * seconds / PHASES[0].seconds)


def _rate(step: int, counts: list[int]) -> float:
    """Warm-up, constant, then linear to zero over the last 80 % of the clips."""
    total = sum(counts)
    decay = 0.8 * (total - counts[0])
    return min(1.0, (step + 1) / 20, (total - step) / decay)


@torch.no_grad()
def reconstruct(vae: AutoencoderKLWan, clips: np.ndarray) -> np.ndarray:
    """Encode (mode) and decode `uint8 (n, 17, 64, 64, 3)` with the stock methods."""
    out = []
    for start in range(0, len(clips), 4):
        latents = vae.encode(to_model(clips[start : start + 4])).latent_dist.mode()
        pixels = vae.decode(latents).sample.permute(0, 2, 3, 4, 1)
        out.append(((pixels + 1) * 127.5).round().clamp(0, 255).byte().numpy())
    return np.concatenate(out)


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Mean over clips of the peak signal-to-noise ratio in dB; both `uint8 (n, ...)`."""
    error = ((a.astype(np.float64) - b) ** 2).reshape(len(a), -1).mean(axis=1)
    return float((10 * np.log10(255**2 / error)).mean())
