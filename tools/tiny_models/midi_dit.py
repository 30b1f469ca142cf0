"""Diffusion transformer of the tiny MIDI: construction, and training together with the image encoders."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from inlaid.networks.triposg import TripoSGTransformer
from tiny_models import midi_images
from tiny_models.midi_data import Batch, Scenes
from tiny_models.midi_images import CLIP, DINO
from tiny_models.midi_vae import CONFIG
from tiny_models.training import MuonAdamW, load_state, run

TRANSFORMER: dict[str, Any] = {
    "num_attention_heads": 4,
    "width": 128,
    "in_channels": CONFIG["latent_channels"],
    "num_layers": 5,
    "cross_attention_dim": CLIP["projection_dim"],
    "cross_attention_2_dim": DINO["hidden_size"],
    "multi_instance": (1, 2, 3),
}


@dataclass(frozen=True)
class Settings:
    """Training settings of the transformer."""

    scenes: int = 8000
    batch: int = 32
    """Scenes per batch. Images are encoded once per scene and used with `repeats` noise samples."""
    repeats: int = 4
    steps: int = 600
    decay: float = 0.4
    """Share of the steps, at the end, over which the learning rates decay to zero."""
    muon: float = 0.02
    adamw: float = 1e-3
    """Learning rate of AdamW, also for the pretrained encoders."""
    dropped: float = 0.1
    """Share of scenes without image conditioning."""
    ema: float = 0.99


def build() -> nn.ModuleDict:
    """Return all trained modules with initial weights: `clip`, `dino`, `dit`."""
    model = midi_images.build()
    model["dit"] = TripoSGTransformer(**TRANSFORMER)
    return model


def loss(model: Any, batch: Batch) -> Tensor:
    """Return the mean squared error of the prediction against data - noise."""
    s, kept = batch.sigma[:, None, None], batch.kept[:, None, None]
    repeats = len(s) // len(kept)
    contexts = midi_images.contexts(model["clip"], model["dino"], batch.inputs)
    x = (1 - s) * batch.x0 + s * batch.noise
    conditions = [(c * kept).repeat(repeats, 1, 1) for c in contexts]
    flow = model["dit"](x, 1000 * batch.sigma, *conditions, groups=batch.groups)
    return (flow.float() - (batch.x0 - batch.noise)).square().mean()


def _by_adamw(name: str) -> bool:
    return not name.startswith("dit.blocks") and not name.startswith("dit.time_proj")


def train(work: Path, data: Scenes, settings: Settings, device: torch.device, workers: int) -> Path:
    """Train in `work`, resuming from a checkpoint; the encoders start from their pretrained weights.

    Returns:
        Path of the weights; their EMA, `average`, is exported.
    """
    model, pretrained = build(), load_state(work / "encoders.safetensors")[1]["average"]
    pretrained = {name: t for name, t in pretrained.items() if not name.startswith("heads")}
    assert not model.load_state_dict(pretrained, strict=False).unexpected_keys
    model.to(device)

    def make(step: int) -> Batch:
        return data.batch(step, settings.batch, settings.repeats, settings.dropped)

    def losses(batch: Batch) -> dict[str, Tensor]:
        with sdpa_kernel(SDPBackend.MATH), torch.autocast(device.type, torch.bfloat16):
            return {"loss": loss(model, batch.to(device))}

    optimizer = MuonAdamW(model.named_parameters(), settings.muon, settings.adamw, _by_adamw)
    kept = {"decay": settings.decay, "ema": settings.ema, "workers": workers}
    return run("dit", work / "dit.safetensors", model, optimizer, settings.steps, make, losses, **kept)
