"""Random Mochi checkpoints, for tests and benchmarks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from inlaid.tiny import random
from inlaid.tiny.random import TEXT_WIDTH

VARIANTS: Mapping[str, Mapping[str, Any]] = {"t2v": {}, "raw": {"options": {"latent_space": "raw"}}}
"""Variants with the same architecture: `t2v` is trained on normalized latents, and `raw` on latents that are
not normalized."""

STANDS_FOR: Mapping[str, str] = {"genmo/mochi-1-preview": "t2v"}
"""Mapping from each published checkpoint to the variant with the same architecture."""


def build(
    folder: Path, variant: str, *, heads: int = 2, head: int = 32, layers: int = 2, ffn: int = 0
) -> None:
    """Write a Mochi checkpoint with random weights.

    The head dimension `head` must be even. `ffn` is ignored, because the feed-forward width is not a setting
    of this network.
    """
    import torch
    from diffusers import (
        AutoencoderKLMochi,
        FlowMatchEulerDiscreteScheduler,
        MochiPipeline,
        MochiTransformer3DModel,
    )

    transformer = MochiTransformer3DModel(
        num_attention_heads=heads,
        attention_head_dim=head,
        num_layers=layers,
        pooled_projection_dim=16,
        text_embed_dim=TEXT_WIDTH,
        time_embed_dim=16,
    )
    torch.nn.init.normal_(transformer.pos_frequencies, std=0.5)  # default zeros hide position bugs
    with torch.no_grad():
        for block in transformer.transformer_blocks:  # default gates are near 0 and hide bugs in the block
            block.norm1.linear.weight *= 4  # type: ignore[union-attr, operator]
    channels: Any = {f"{part}_block_out_channels": (32, 32, 32, 32) for part in ("encoder", "decoder")}
    vae = AutoencoderKLMochi(layers_per_block=(1, 1, 1, 1, 1), **channels)
    with torch.no_grad():  # like a trained VAE: means of unit variance, low posterior noise
        means, variances = vae.encoder.proj_out.weight.chunk(2)
        means *= 3
        variances.fill_(-1)
    MochiPipeline(
        tokenizer=random.tokenizer(),
        text_encoder=random.text_encoder(),
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(invert_sigmas=True),
        transformer=transformer,
    ).save_pretrained(folder)
