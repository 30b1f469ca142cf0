"""Random CogVideoX checkpoints, for tests and benchmarks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from inlaid.tiny import random
from inlaid.tiny.random import TEXT_WIDTH

VARIANTS: Mapping[str, Mapping[str, Any]] = {"5b": {}, "2b": {}, "1.5": {}, "i2v": {}, "1.5-i2v": {}}
"""Architecture variants:

- `5b`: rotary positional embedding;
- `2b`: sinusoidal positional embedding;
- `1.5`: temporal patch size 2;
- `i2v`: image-to-video, with learned positional embedding for 9 frames of 32 x 32;
- `1.5-i2v`: image-to-video, with `ofs` embedding and image latents divided by the scaling factor."""

STANDS_FOR: Mapping[str, str] = {
    "THUDM/CogVideoX-5b": "5b",
    "THUDM/CogVideoX-2b": "2b",
    "THUDM/CogVideoX-5b-I2V": "i2v",
    "THUDM/CogVideoX1.5-5B": "1.5",
    "THUDM/CogVideoX1.5-5B-I2V": "1.5-i2v",
}
"""Mapping from each published checkpoint to the variant with the same architecture."""


def build(
    folder: Path,
    variant: str,
    *,
    heads: int = 2,
    head: int = 16,
    layers: int = 2,
    ffn: int = 0,
    text: int = 226,
) -> None:
    """Write a random CogVideoX checkpoint.

    `head` must be a multiple of 16. `ffn` is ignored, because the feed-forward width is 4 times the network's
    width. `text` is the number of text tokens.
    """
    import diffusers
    import torch

    pairs, image = variant.startswith("1.5"), variant.endswith("i2v")
    transformer = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=heads,
        attention_head_dim=head,
        in_channels=32 if image else 16,
        out_channels=16,
        time_embed_dim=16,
        ofs_embed_dim=16 if variant == "1.5-i2v" else None,
        text_embed_dim=TEXT_WIDTH,
        max_text_seq_length=text,
        num_layers=layers,
        sample_width=300 if pairs else 4 if image else 6,
        sample_height=300 if pairs else 4,
        sample_frames=81 if pairs else 9,
        patch_size_t=2 if pairs else None,
        patch_bias=not pairs,
        use_rotary_positional_embeddings=variant != "2b",
        use_learned_positional_embeddings=variant == "i2v",
    )
    if variant == "i2v":
        learned: Any = transformer.patch_embed.pos_embedding
        torch.nn.init.normal_(learned, std=0.02)
    small: dict[str, Any] = {"block_out_channels": (4, 4, 4, 4), "layers_per_block": 1, "norm_num_groups": 2}
    vae = diffusers.AutoencoderKLCogVideoX(
        latent_channels=16,
        scaling_factor=1.15258426 if variant == "2b" else 0.7,
        invert_scale_latents=variant == "1.5-i2v",
        **small,
    )
    schedule = diffusers.CogVideoXDDIMScheduler if variant == "2b" else diffusers.CogVideoXDPMScheduler
    pipeline = diffusers.CogVideoXImageToVideoPipeline if image else diffusers.CogVideoXPipeline
    pipeline(
        tokenizer=random.tokenizer(),
        text_encoder=random.text_encoder(),
        vae=vae,
        scheduler=schedule(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            prediction_type="v_prediction",
            rescale_betas_zero_snr=True,
            snr_shift_scale=3.0 if variant == "2b" else 1.0,
            timestep_spacing="trailing",
        ),
        transformer=transformer,
    ).save_pretrained(folder)
