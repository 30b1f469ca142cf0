"""Random Wan checkpoints, for tests and benchmarks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from inlaid.tiny import random
from inlaid.tiny.random import TEXT_WIDTH

VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "t2v": {},
    "a14b": {"expert": "high"},
    "ti2v": {},
    "i2v": {},
    "flf2v": {},
    "i2v-a14b": {"expert": "high"},
    "ti2v-i2v": {"task": "i2v"},
}
"""Architecture variants:

- `t2v`: Wan 2.1 text-to-video;
- `a14b`: Wan 2.2 with two experts;
- `ti2v`: Wan 2.2 5B, with one timestep per token and 48 latent channels;
- `i2v`, `i2v-a14b`, `ti2v-i2v`: image-to-video versions of these variants, conditioned on the first frame;
- `flf2v`: Wan 2.1 conditioned on the first and the last frame."""

STANDS_FOR: Mapping[str, str] = {
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": "t2v",
    "Wan-AI/Wan2.1-T2V-14B-Diffusers": "t2v",
    "Wan-AI/Wan2.2-T2V-A14B-Diffusers": "a14b",
    "Wan-AI/Wan2.2-TI2V-5B-Diffusers": "ti2v",
    "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers": "i2v",
    "Wan-AI/Wan2.1-I2V-14B-720P-Diffusers": "i2v",
    "Wan-AI/Wan2.1-FLF2V-14B-720P-diffusers": "flf2v",
    "Wan-AI/Wan2.2-I2V-A14B-Diffusers": "i2v-a14b",
    "tiny:wan": "t2v",
}
"""Mapping from each published checkpoint, and the tiny model, to the variant with the same architecture."""


def build(
    folder: Path, variant: str, *, heads: int = 2, head: int = 12, layers: int = 2, ffn: int = 32
) -> None:
    """Write a Wan checkpoint with random weights. The width `head` of an attention head must be even."""
    import diffusers
    import transformers

    text = random.text_encoder("UMT5")
    small = variant.startswith("ti2v")  # its VAE has higher compression
    channels = 48 if small else 16
    shown = variant in ("i2v", "flf2v", "i2v-a14b")
    condition: dict[str, Any] = {}
    options: dict[str, Any] = {}
    if variant in ("i2v", "flf2v"):
        condition = {"image_dim": 4, "added_kv_proj_dim": heads * head}
        if variant == "flf2v":
            condition["pos_embed_seq_len"] = 2 * 5
        seen = transformers.CLIPVisionConfig(
            hidden_size=4,
            intermediate_size=8,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=32,
            patch_size=16,
        )
        options = {
            "image_encoder": transformers.CLIPVisionModel(seen).eval(),
            "image_processor": transformers.CLIPImageProcessor(size=32, crop_size=32),
        }

    def transformer() -> Any:
        network: Any = diffusers.WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=heads,
            attention_head_dim=head,
            in_channels=channels + (4 + channels) * shown,
            out_channels=channels,
            text_dim=TEXT_WIDTH,
            freq_dim=256,
            ffn_dim=ffn,
            num_layers=layers,
            cross_attn_norm=True,
            qk_norm="rms_norm_across_heads",
            rope_max_seq_len=64,
            **condition,
        )
        if variant == "flf2v":  # initial zeros would hide swapped images
            network.condition_embedder.image_embedder.pos_embed.data.normal_()
        return network

    extra = {
        "base_dim": 3,
        "dim_mult": [1, 1, 1, 1],
        "num_res_blocks": 1,
        "temperal_downsample": [False, True, True],
    }
    if small:
        extra |= {"in_channels": 12, "out_channels": 12, "is_residual": True, "patch_size": 2}
        extra |= {"scale_factor_spatial": 16, "scale_factor_temporal": 4}
        extra |= {"latents_mean": [0.0] * 48, "latents_std": [1.0] * 48}
    vae = diffusers.AutoencoderKLWan(z_dim=channels, **extra)
    if variant.endswith("a14b"):
        options = {"transformer_2": transformer(), "boundary_ratio": 0.9 if shown else 0.875}
    if small:
        options = {"expand_timesteps": True}
    scheduler: Any = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    kind = diffusers.WanImageToVideoPipeline if shown else diffusers.WanPipeline
    kind(
        tokenizer=random.tokenizer(),
        text_encoder=text,
        vae=vae,
        scheduler=scheduler,
        transformer=transformer(),
        **options,
    ).save_pretrained(folder)
