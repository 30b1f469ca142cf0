"""Random Wan checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from inlay.twins import tiny

VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "t2v": {},
    "a14b": {"expert": "high"},
    "ti2v": {},
}
"""`t2v` is 2.1, `a14b` 2.2 with two experts, `ti2v` 2.2 5B with per-token time and 48 channels."""


STANDS_FOR: Mapping[str, str] = {
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": "t2v",
    "Wan-AI/Wan2.1-T2V-14B-Diffusers": "t2v",
    "Wan-AI/Wan2.2-T2V-A14B-Diffusers": "a14b",
    "Wan-AI/Wan2.2-TI2V-5B-Diffusers": "ti2v",
    "twin:wan": "t2v",
}
"""The variant that is a published checkpoint's tiny sibling."""


def build(
    folder: Path, variant: str, *, heads: int = 2, head: int = 12, layers: int = 2, ffn: int = 32
) -> None:
    """Writes a random Wan checkpoint; `head` is even."""
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel

    text = tiny.text_encoder("UMT5")
    channels = 48 if variant == "ti2v" else 16

    def transformer() -> WanTransformer3DModel:
        return WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=heads,
            attention_head_dim=head,
            in_channels=channels,
            out_channels=channels,
            text_dim=tiny.TEXT_WIDTH,
            freq_dim=256,
            ffn_dim=ffn,
            num_layers=layers,
            cross_attn_norm=True,
            qk_norm="rms_norm_across_heads",
            rope_max_seq_len=64,
        )

    extra = {
        "base_dim": 3,
        "dim_mult": [1, 1, 1, 1],
        "num_res_blocks": 1,
        "temperal_downsample": [False, True, True],
    }
    if variant == "ti2v":
        extra |= {"in_channels": 12, "out_channels": 12, "is_residual": True, "patch_size": 2}
        extra |= {"scale_factor_spatial": 16, "scale_factor_temporal": 4}
        extra |= {"latents_mean": [0.0] * 48, "latents_std": [1.0] * 48}
    vae = AutoencoderKLWan(z_dim=channels, **extra)
    options: dict[str, Any] = {}
    if variant == "a14b":
        options = {"transformer_2": transformer(), "boundary_ratio": 0.875}
    if variant == "ti2v":
        options = {"expand_timesteps": True}
    scheduler: Any = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    WanPipeline(
        tokenizer=tiny.tokenizer(),
        text_encoder=text,
        vae=vae,
        scheduler=scheduler,
        transformer=transformer(),
        **options,
    ).save_pretrained(folder)
