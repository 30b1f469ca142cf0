"""The diffusion transformer of the MIDI twin: building and training, the image encoders along with it."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from inlay.models.triposg import TripoSGTransformer

from . import midi_images, midi_vae
from .midi_data import Batch, Scenes
from .training import MuonAdamW, Progress, load_state, save_state

TRANSFORMER: dict[str, Any] = {
    "num_attention_heads": 4,
    "width": 128,
    "in_channels": midi_vae.CONFIG["latent_channels"],
    "num_layers": 5,
    "cross_attention_dim": midi_images.CLIP["projection_dim"],
    "cross_attention_2_dim": midi_images.DINO["hidden_size"],
    "multi_instance": (1, 2, 3),
}
SAVE_EVERY = 60.0
"""Seconds between checkpoints."""


@dataclass(frozen=True)
class Settings:
    """How the transformer is trained."""

    scenes: int = 3000
    batch: int = 16
    """Scenes; each is shown with `repeats` noises, for which the encoders run once."""
    repeats: int = 1
    steps: int = 3000
    decay: float = 0.4
    """Share of the steps, at the end, over which the rates fall to zero."""
    muon: float = 0.02
    adamw: float = 2e-3
    dropped: float = 0.1
    """Share of scenes that are shown without their images."""
    ema: float = 0.99


def build() -> nn.ModuleDict:
    """All that is trained, fresh: `clip`, `dino`, `dit`."""
    model = midi_images.build()
    model["dit"] = TripoSGTransformer(**TRANSFORMER)
    return model


def loss(model: Any, batch: Batch) -> Tensor:
    """Mean square of what is missing to data - noise."""
    s, kept = batch.sigma[:, None, None], batch.kept[:, None, None]
    repeats = len(s) // len(kept)
    contexts = midi_images.contexts(model["clip"], model["dino"], batch.shown)
    x = (1 - s) * batch.x0 + s * batch.noise
    shown = [(c * kept).repeat(repeats, 1, 1) for c in contexts]
    flow = model["dit"](x, 1000 * batch.sigma, *shown, groups=batch.groups)
    return (flow.float() - (batch.x0 - batch.noise)).square().mean()


def _by_adamw(name: str) -> bool:
    return bool(midi_images.BY_ADAMW.search(name)) or name in ("dit.proj_in.weight", "dit.proj_out.weight")


def train(work: Path, data: Scenes, settings: Settings) -> Path:
    """Train in `work`, continuing what is there; the encoders start from what they were taught.

    Returns:
        The file of the weights; `average` in it is what ships.
    """
    state, facts, groups = work / "dit.safetensors", {"done": 0, "seconds": 0.0}, {}
    model = build()
    taught = work / "encoders.safetensors"
    if taught.exists():
        weights = load_state(taught)[1]["model"]
        model.load_state_dict({k: t for k, t in weights.items() if not k.startswith("says")}, strict=False)
    optimizer = MuonAdamW(model.named_parameters(), settings.muon, settings.adamw, _by_adamw)
    average = {name: p.detach().clone() for name, p in model.named_parameters()}
    if state.exists():
        facts, groups = load_state(state)
        model.load_state_dict(groups["model"])
        optimizer.load(groups["optimizer"])
        average = {name: groups["average"][name] for name in average}
    step, saved = facts["done"], time.monotonic()
    progress = Progress("dit", settings.steps, step)
    while step < settings.steps:
        batch = data.batch(step, settings.batch, settings.repeats, settings.dropped)
        with sdpa_kernel(SDPBackend.MATH), torch.autocast("cpu", torch.bfloat16):
            value = loss(model, batch)
        value.backward()
        left = (settings.steps - step) / (settings.decay * settings.steps)
        optimizer.step(min(1.0, (step + 1) / 50, left))
        keep = min(settings.ema, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(average.values()), [p.detach() for p in model.parameters()], 1 - keep)
        step += 1
        progress(step, loss=value.detach())
        if time.monotonic() - saved > SAVE_EVERY or step == settings.steps:
            facts |= {"done": step, "seconds": facts["seconds"] + time.monotonic() - saved}
            saved = time.monotonic()
            save_state(state, facts, model=model.state_dict(), optimizer=optimizer.tensors(), average=average)
    return state
