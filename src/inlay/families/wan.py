"""Wan 2.1 and 2.2 text-to-video (Wan Team, 2025): https://arxiv.org/abs/2503.20314.

Covers Wan 2.1 T2V 1.3B and 14B, both experts of Wan 2.2 T2V-A14B, and Wan 2.2 TI2V-5B in text-to-video mode. What surprises:
the VAE has no scaling factor but a mean and a deviation per channel; text is 512 tokens, zero (not encoded padding) past its
end; the model's clock is 1000 t as float, never rounded; and the VAE silently truncates lengths other than 4n+1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from inlay import config as recipe
from inlay.families.base import Family, Grid
from inlay.objectives import FlowMatching

TEXT_LENGTH = 512
"""Tokens that the published models were trained and are sampled with; `encode_prompt`'s own default of 226 is wrong."""

LARGE = 480 * 832 * 1.5
"""Area above which a checkpoint's 720p shift is meant."""


class Wan(Family):
    """Wan 2.1 / 2.2: flow matching on normalised VAE latents, text by cross-attention."""

    defaults: ClassVar[Mapping[str, Any]] = {"data": {"size": [480, 832], "frames": [81]}}
    targets: ClassVar[Sequence[str]] = (
        r"blocks\.\d+\.(attn1|attn2)\.(to_q|to_k|to_v|to_out\.0)",
        r"blocks\.\d+\.ffn\.net\.(0\.proj|2)",
    )
    block_prefix: ClassVar[str] = "blocks"
    original_names: ClassVar[Sequence[tuple[str, str]]] = (
        ("self_attn.q", "attn1.to_q"),
        ("self_attn.k", "attn1.to_k"),
        ("self_attn.v", "attn1.to_v"),
        ("self_attn.o", "attn1.to_out.0"),
        ("cross_attn.q", "attn2.to_q"),
        ("cross_attn.k", "attn2.to_k"),
        ("cross_attn.v", "attn2.to_v"),
        ("cross_attn.o", "attn2.to_out.0"),
        ("cross_attn.k_img", "attn2.add_k_proj"),
        ("cross_attn.v_img", "attn2.add_v_proj"),
        ("ffn.0", "ffn.net.0.proj"),
        ("ffn.2", "ffn.net.2"),
        ("time_embedding.0", "condition_embedder.time_embedder.linear_1"),
        ("time_embedding.2", "condition_embedder.time_embedder.linear_2"),
        ("time_projection.1", "condition_embedder.time_proj"),
        ("text_embedding.0", "condition_embedder.text_embedder.linear_1"),
        ("text_embedding.2", "condition_embedder.text_embedder.linear_2"),
        ("img_emb.proj.1", "condition_embedder.image_embedder.ff.net.0.proj"),
        ("img_emb.proj.3", "condition_embedder.image_embedder.ff.net.2"),
        ("head.head", "proj_out"),
    )
