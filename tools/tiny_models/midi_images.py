"""Image encoders of the tiny MIDI: construction, inputs and pretraining.

The diffusion loss gives the encoders little gradient signal. They are therefore pretrained to predict the
position, size, kind and rotation of an object, with additional output layers that are discarded, and then
trained together with the transformer.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import (
    BitImageProcessor,
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    Dinov2Config,
    Dinov2Model,
)

from inlaid.tiny.midi_solids import Thing, bounds
from inlaid.tiny.midi_world import KINDS
from tiny_models.training import MuonAdamW, run

CLIP: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 192,
    "projection_dim": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}

DINO: dict[str, Any] = {
    "hidden_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "mlp_ratio": 3,
    "image_size": 64,
    "patch_size": 8,
    "num_channels": 7,
}

BY_ADAMW = re.compile(r"patch_embedding|position_embedding|cls_token|mask_token|visual_projection|heads")
"""Names of encoder matrices that are not hidden layers; AdamW trains them."""

STEPS, BATCH = 900, 64

RATES = 0.02, 2e-3

FACTS = 8 + len(KINDS)
"""Length of an object's description, see `describe`."""


def processors() -> tuple[Any, Any]:
    """Return the image processors of the two encoders."""
    clip, dino = CLIP["image_size"], DINO["image_size"]
    return (
        CLIPImageProcessor(size={"shortest_edge": clip}, crop_size={"height": clip, "width": clip}),
        BitImageProcessor(
            size={"shortest_edge": dino},
            crop_size={"height": dino, "width": dino},
            resample=3,
            image_mean=[0.485, 0.456, 0.406],
            image_std=[0.229, 0.224, 0.225],
        ),
    )


def build() -> nn.ModuleDict:
    """Return both encoders with initial weights: `clip`, `dino`."""
    torch.manual_seed(1)
    clip, dino = CLIPVisionModelWithProjection(CLIPVisionConfig(**CLIP)), Dinov2Model(Dinov2Config(**DINO))
    return nn.ModuleDict({"clip": clip, "dino": dino})


def encoder_inputs(image: np.ndarray, ids: np.ndarray) -> dict[str, np.ndarray]:
    """Return the encoder inputs of a scene, resized like the image processors do.

    Args:
        image: uint8 (h, h, 3).
        ids: object ids (h, h), 0 for none.

    Returns:
        uint8, not normalized: `clip` (rows, 3, 32, 32) and `own` (rows, 3, 64, 64), the object on
        white; `whole` (rows, 3, 64, 64), the scene; `mask` (rows, 1, 64, 64), 0 or 1.
    """

    def smaller(pixels: np.ndarray, size: int) -> np.ndarray:
        small = Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC)
        return np.asarray(small).transpose(2, 0, 1)

    masks = [ids == n for n in np.unique(ids) if n]
    masked = [np.where(m[..., None], image, np.uint8(255)) for m in masks]
    small = DINO["image_size"]
    nearest = (np.arange(small) * len(ids)) // small
    return {
        "clip": np.stack([smaller(a, CLIP["image_size"]) for a in masked]),
        "own": np.stack([smaller(a, small) for a in masked]),
        "whole": np.stack([smaller(image, small)] * len(masks)),
        "mask": np.stack([m[nearest][:, nearest][None].astype(np.uint8) for m in masks]),
    }


def contexts(clip: Any, dino: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return both contexts of the transformer, (rows, 1, 64) and (rows, 65, 96), from `encoder_inputs`."""

    def normal(x: Tensor, processor: Any) -> Tensor:
        known = processor.image_mean, processor.image_std
        mean, std = (torch.tensor(v, device=x.device).view(3, 1, 1) for v in known)
        return (x / 255 - mean) / std

    first, second = processors()
    seven = [normal(inputs["own"], second), normal(inputs["whole"], second), inputs["mask"].float()]
    token = clip(normal(inputs["clip"], first)).image_embeds[:, None]
    return token, dino(torch.cat(seven, 1)).last_hidden_state


def describe(thing: Thing) -> np.ndarray:
    """Return the description (FACTS,) of an object: box center, half box sides, rotation, one-hot kind.

    The rotation is 0 for kinds on which it is not visible.
    """
    box = bounds(thing)
    turned = float(thing.kind in ("box", "capsule"))
    turn = [turned * np.cos(2 * thing.yaw), turned * np.sin(2 * thing.yaw)]
    kind = [float(thing.kind == k) for k in KINDS]
    return np.array([*box.mean(0), *np.ptp(box, axis=0) / 2, *turn, *kind], np.float32)


def train(work: Path, data: Any, device: torch.device, workers: int, steps: int = STEPS) -> Path:
    """Pretrain both encoders to describe objects, in `work`, resuming from a checkpoint.

    Args:
        work: Folder for checkpoints.
        data: `midi_data.Scenes`.
        device: Device for training.
        workers: Processes that prefetch batches.
        steps: Number of steps.

    Returns:
        Path of the weights.
    """
    model = build()
    model["heads"] = nn.ModuleList(
        [nn.Linear(c, FACTS) for c in (CLIP["projection_dim"], DINO["hidden_size"])]
    )
    model.to(device)

    def make(step: int) -> dict[str, Tensor]:
        chosen = np.random.default_rng([step, 72]).integers(len(data.rows), size=BATCH)
        return data.inputs(chosen.tolist(), step)[0]

    def losses(batch: dict[str, Tensor]) -> dict[str, Tensor]:
        inputs = {name: t.to(device) for name, t in batch.items()}
        with sdpa_kernel(SDPBackend.MATH), torch.autocast(device.type, torch.bfloat16):
            features = [c[:, 0] for c in contexts(model["clip"], model["dino"], inputs)]
            predicted = [layer(c).float() for layer, c in zip(model["heads"], features, strict=True)]  # type: ignore[arg-type]
        true = inputs["facts"]
        error = [(s - true)[:, :8].abs().mean() for s in predicted]
        kinds = [nn.functional.cross_entropy(s[:, 8:], true[:, 8:]) for s in predicted]
        loss = error[1] + 0.2 * error[0] + 0.1 * (kinds[0] + kinds[1])
        place = (predicted[1] - true)[:, :3].norm(dim=-1).mean()
        return {"loss": loss, "error": error[1], "kind": kinds[1], "place": place}

    optimizer = MuonAdamW(model.named_parameters(), *RATES, lambda name: bool(BY_ADAMW.search(name)))
    state = work / "encoders.safetensors"
    return run("encoders", state, model, optimizer, steps, make, losses, workers=workers)
