"""Random checkpoints of real classes, as small as a test or as large as a benchmark wants; untrained."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any, Literal

from inlay import console

Variant = Literal["2.1", "a14b", "5b"]


def wan(
    folder: Path, *, variant: Variant = "2.1", heads: int = 2, head: int = 12, layers: int = 2, ffn: int = 32
) -> Path:
    """Writes a random Wan checkpoint.

    Args:
        folder: where to.
        variant: `2.1`, `a14b` (two experts) or `5b` (per-token time, 48 channels).
        heads: of the transformer's attention.
        head: width of a head, even.
        layers: blocks of the transformer.
        ffn: width of its feed-forward layers.
    """
    import torch
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
    from transformers import T5Tokenizer, UMT5Config, UMT5EncoderModel

    console.quiet_bars()
    symbols = [(c, -3.0) for c in string.ascii_letters + string.digits + ".,'-!?"]
    tokenizer: Any = T5Tokenizer(
        vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *symbols],
        extra_ids=0,
        model_max_length=512,
    )
    torch.manual_seed(0)
    text = UMT5Config(
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        vocab_size=128,
        feed_forward_proj="gated-gelu",
        relative_attention_num_buckets=8,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
    )
    channels = 48 if variant == "5b" else 16

    def transformer() -> WanTransformer3DModel:
        return WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=heads,
            attention_head_dim=head,
            in_channels=channels,
            out_channels=channels,
            text_dim=32,
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
    if variant == "5b":
        extra |= {"in_channels": 12, "out_channels": 12, "is_residual": True, "patch_size": 2}
        extra |= {"scale_factor_spatial": 16, "scale_factor_temporal": 4}
        extra |= {"latents_mean": [0.0] * 48, "latents_std": [1.0] * 48}
    vae = AutoencoderKLWan(z_dim=channels, **extra)
    options: dict[str, Any] = {}
    if variant == "a14b":
        options = {"transformer_2": transformer(), "boundary_ratio": 0.875}
    if variant == "5b":
        options = {"expand_timesteps": True}
    scheduler: Any = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    WanPipeline(
        tokenizer=tokenizer,
        text_encoder=UMT5EncoderModel(text).eval(),
        vae=vae,
        scheduler=scheduler,
        transformer=transformer(),
        **options,
    ).save_pretrained(folder)
    return folder
