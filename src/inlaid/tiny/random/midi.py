"""Random MIDI and TripoSG checkpoints, for tests and benchmarks."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

VARIANTS: Mapping[str, Mapping[str, Any]] = {"scene": {}, "triposg": {}}
"""Architecture variants: `scene` is MIDI, with two inputs for cross-attention; `triposg` is TripoSG, with one
input."""

STANDS_FOR: Mapping[str, str] = {
    "VAST-AI/MIDI-3D": "scene",
    "VAST-AI/TripoSG": "triposg",
    "tiny:midi": "scene",
}
"""Mapping from each published checkpoint, and the tiny model, to the variant with the same architecture."""


def build(
    folder: Path,
    variant: str,
    *,
    heads: int = 2,
    head: int = 16,
    layers: int = 5,
    ffn: int = 0,
    tokens: int = 16,
    sight: int = 0,
) -> None:
    """Write a random MIDI or TripoSG checkpoint in the published file layout.

    Args:
        folder: output folder.
        variant: `scene` (MIDI) or `triposg`.
        heads: number of attention heads.
        head: width of a head.
        layers: number of transformer blocks.
        ffn: ignored, because the feed-forward width depends on the network's width.
        tokens: number of latent tokens of an object.
        sight: if above 0, width of the image encoders. They then have 12 layers, and take images of 224 x 224
            pixels. 0: small encoders for small images.
    """
    from transformers import (
        CLIPVisionConfig,
        CLIPVisionModelWithProjection,
        Dinov2Config,
        Dinov2Model,
    )

    from inlaid.networks.triposg import TripoSGTransformer, TripoSGVAE

    alone = variant == "triposg"
    seen, shown = sight or 24, 12
    deep: dict[str, Any] = {
        "num_hidden_layers": 12,
        "num_attention_heads": 6,
        "image_size": 224,
        "patch_size": 14,
    }
    at: dict[str, Any] = {"num_attention_heads": 2, "patch_size": 8}
    size, small = (224, 224) if sight else (32, 16)
    TripoSGTransformer(
        num_attention_heads=heads,
        width=heads * head,
        in_channels=8,
        num_layers=layers,
        cross_attention_dim=seen if alone else shown,
        cross_attention_2_dim=None if alone else seen,
        multi_instance=(layers // 2 - 1, layers // 2),
        num_tokens=tokens,
    ).save_pretrained(folder / "transformer")
    TripoSGVAE(
        latent_channels=8,
        num_attention_heads=2,
        width_encoder=16,
        width_decoder=16,
        num_layers_encoder=1,
        num_layers_decoder=1,
    ).save_pretrained(folder / "vae")
    dino = Dinov2Config(
        hidden_size=seen,
        num_channels=3 if alone else 7,
        **(deep if sight else {**at, "num_hidden_layers": 2, "image_size": size}),
    )
    eyes = (
        ("image_encoder_dinov2", "feature_extractor_dinov2")
        if alone
        else ("image_encoder_2", "feature_extractor_2")
    )
    Dinov2Model(dino).save_pretrained(folder / eyes[0])
    _write(folder / eyes[1] / "preprocessor_config.json", _extractor(size))
    if not alone:
        clip = CLIPVisionConfig(
            hidden_size=sight or 16,
            intermediate_size=4 * sight or 32,
            projection_dim=shown,
            **(deep if sight else {**at, "num_hidden_layers": 1, "image_size": small}),
        )
        CLIPVisionModelWithProjection(clip).save_pretrained(folder / "image_encoder_1")
        _write(folder / "feature_extractor_1" / "preprocessor_config.json", _extractor(small))
    scheduler = {"num_train_timesteps": 1000, "shift": 1.0 if alone else 2.0, "use_dynamic_shifting": False}
    _write(folder / "scheduler" / "scheduler_config.json", scheduler)
    _write(folder / "model_index.json", {"_class_name": "MIDIPipeline" if not alone else "TripoSGPipeline"})


def _extractor(size: int) -> dict[str, Any]:
    return {"size": {"shortest_edge": size}, "crop_size": {"height": size, "width": size}}


def _write(path: Path, values: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values, indent=2), "utf-8")
