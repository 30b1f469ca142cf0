"""Networks of TripoSG and MIDI: the diffusion transformer for shape latents, and the shape VAE.

Li et al. 2025 (https://arxiv.org/abs/2502.06608) and Huang et al. 2025 (https://arxiv.org/abs/2412.03558).
The code is a reimplementation from a description. Its state dicts match the published files.

The networks differ from usual transformers in these points:

- In self-attention, the outputs of `to_q`, `to_k` and `to_v` are concatenated. Each head is a slice of the
  result (see `Attention`).
- The timestep is a token before the latent tokens.
- A skip connection concatenates earlier and current hidden states. A linear layer then halves the width.
- The network predicts data - noise.
- The VAE decodes latents to an implicit field, which is negative inside the object.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import FeedForward
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.normalization import FP32LayerNorm, RMSNorm
from safetensors import safe_open
from torch import Tensor, nn

MULTI_INSTANCE_BLOCKS = (8, 9, 10, 11, 12)
"""Indices of the blocks whose self-attention spans all objects of a scene, as in every published script."""

TOKENS = 2048
"""Default number of latent tokens per object."""


class Attention(nn.Module):
    """Attention with TripoSG's assignment of channels to heads.

    In self-attention, the outputs of `to_q`, `to_k` and `to_v` are concatenated and then split into one slice
    per head. Each slice contains the query, key and value of its head. An adapter on `to_q` alone therefore
    changes queries, keys and values of some heads, not the queries of all heads. In cross-attention, only the
    outputs of `to_k` and `to_v` are concatenated and split in this way.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        context: int | None = None,
        *,
        qk_norm: bool = False,
        norm_cross: bool = False,
    ) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(context or width, width, bias=False)
        self.to_v = nn.Linear(context or width, width, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(width, width), nn.Dropout(0.0)])
        if qk_norm:
            self.norm_q = RMSNorm(width // heads, eps=1e-6)
            self.norm_k = RMSNorm(width // heads, eps=1e-6)
        else:
            self.norm_q = self.norm_k = None
        self.norm_cross = FP32LayerNorm(context or width) if norm_cross else None

    def forward(
        self, x: Tensor, context: Tensor | None = None, groups: Sequence[int] | None = None
    ) -> Tensor:
        """Compute self-attention, or cross-attention to `context`.

        Args:
            x: input, (rows, n, width).
            context: (rows, m, context width). None for self-attention.
            groups: sizes of groups of consecutive rows. Self-attention treats all tokens of a group as one
                sequence. If None, each row is a separate sequence.
        """
        rows, n, _ = x.shape
        if context is None:
            stacked = torch.cat([self.to_q(x), self.to_k(x), self.to_v(x)], -1)
            q, k, v = stacked.view(rows, n, self.heads, -1).transpose(1, 2).chunk(3, -1)
        else:
            if self.norm_cross is not None:
                context = self.norm_cross(context)
            q = self.to_q(x).view(rows, n, self.heads, -1).transpose(1, 2)
            stacked = torch.cat([self.to_k(context), self.to_v(context)], -1)
            k, v = stacked.view(rows, stacked.shape[1], self.heads, -1).transpose(1, 2).chunk(2, -1)
        if self.norm_q is not None and self.norm_k is not None:
            q, k = self.norm_q(q), self.norm_k(k)
        if k.shape[2] == 1:
            # A softmax over one key is 1. This form gives q and k gradients of exactly zero.
            out = v + 0 * (q + k)
        elif groups:
            out = _grouped(q, k, v, groups)
        else:
            out = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.to_out[0](out.transpose(1, 2).flatten(2))


def _grouped(q: Tensor, k: Tensor, v: Tensor, groups: Sequence[int]) -> Tensor:
    """Compute self-attention within groups of consecutive rows.

    Args:
        q: (rows, heads, n, d).
        k: same shape as `q`.
        v: same shape as `q`.
        groups: number of rows of each group. The rows of a group form one sequence.

    Returns:
        (rows, heads, n, d).
    """
    assert sum(groups) == len(q), f"groups {list(groups)} do not make {len(q)} rows in total"

    def attend(start: int, scenes: int, size: int) -> Tensor:
        _, heads, n, d = q.shape

        def merge(t: Tensor) -> Tensor:
            part = t[start : start + scenes * size].view(scenes, size, heads, n, d)
            return part.transpose(1, 2).reshape(scenes, heads, size * n, d)

        out = nn.functional.scaled_dot_product_attention(merge(q), merge(k), merge(v))
        return out.view(scenes, heads, size, n, d).transpose(1, 2).reshape(scenes * size, heads, n, d)

    out, start = [], 0
    while start < len(q):
        size = groups[0]
        scenes = next((i for i, g in enumerate(groups) if g != size), len(groups))
        out.append(attend(start, scenes, size))
        start, groups = start + scenes * size, groups[scenes:]
    return torch.cat(out)


class Block(nn.Module):
    """Transformer block with self-attention, up to two cross-attentions and a feed-forward network.

    A block may begin with a skip connection. Two cross-attentions are parallel: their outputs are added.
    """

    def __init__(
        self, width: int, heads: int, contexts: Sequence[int], *, skip: bool = False, qk_norm: bool = True
    ) -> None:
        super().__init__()
        self.norm1 = FP32LayerNorm(width, eps=1e-5)
        self.attn1 = Attention(width, heads, qk_norm=qk_norm)
        if contexts:
            self.norm2 = FP32LayerNorm(width, eps=1e-5)
            self.attn2 = Attention(width, heads, contexts[0], qk_norm=qk_norm)
        if len(contexts) > 1:
            self.norm2_2 = FP32LayerNorm(width, eps=1e-5)
            self.attn2_2 = Attention(width, heads, contexts[1], qk_norm=qk_norm)
        self.norm3 = FP32LayerNorm(width, eps=1e-5)
        self.ff = FeedForward(width, activation_fn="gelu")
        self.contexts = len(contexts)
        if skip:
            self.skip_linear = nn.Linear(2 * width, width)
            self.skip_norm = FP32LayerNorm(width, eps=1e-5)

    def forward(
        self,
        x: Tensor,
        contexts: Sequence[Tensor] = (),
        groups: Sequence[int] | None = None,
        skip: Tensor | None = None,
        scales: Sequence[float] = (1.0, 1.0),
    ) -> Tensor:
        """Run the block on hidden states (rows, n, width). In the denoiser, each row is one object.

        Args:
            x: hidden states.
            contexts: one tensor (rows, m, context width) per cross-attention.
            groups: number of rows of each scene; rows of the same scene attend to each other. None for no
                attention across rows.
            skip: hidden states of an earlier block, for blocks with a skip connection.
            scales: factors of the outputs of the two cross-attentions.
        """
        if skip is not None:
            x = self.skip_norm(self.skip_linear(torch.cat([skip, x], -1)))
        x = x + self.attn1(self.norm1(x), groups=groups)
        if self.contexts:
            crossed = scales[0] * self.attn2(self.norm2(x), contexts[0])
            if self.contexts > 1:
                crossed = crossed + scales[1] * self.attn2_2(self.norm2_2(x), contexts[1])
            x = x + crossed
        return x + self.ff(self.norm3(x))


class _Time(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.linear_1 = nn.Linear(width, 4 * width)
        self.linear_2 = nn.Linear(4 * width, width)

    def forward(self, t: Tensor) -> Tensor:
        half = self.width // 2
        steps = torch.arange(half, device=t.device, dtype=torch.float32) / half
        angles = t.float()[:, None] * torch.exp(-math.log(10000) * steps)
        waves = torch.cat([angles.sin(), angles.cos()], -1).to(self.linear_1.weight.dtype)
        return self.linear_2(nn.functional.gelu(self.linear_1(waves)))


class TripoSGTransformer(ModelMixin, ConfigMixin, PeftAdapterMixin):
    """Denoiser of TripoSG (one cross-attention context) and MIDI (two contexts).

    Each row of the batch is one object. Rows of the same scene attend to each other in the blocks listed in
    `multi_instance`. `num_tokens` is the number of latent tokens per object in training; the network accepts
    any number.
    """

    _supports_gradient_checkpointing = True
    _repeated_blocks = ("Block",)
    _no_split_modules = ("Block",)
    # The time embedding is computed in the storage dtype of its weights, so they must not be cast to fp8.
    _skip_layerwise_casting_patterns: list[str] = ["time_proj", "norm"]  # noqa: RUF012

    @register_to_config
    def __init__(
        self,
        num_attention_heads: int = 16,
        width: int = 2048,
        in_channels: int = 64,
        num_layers: int = 21,
        cross_attention_dim: int = 768,
        cross_attention_2_dim: int | None = 1024,
        multi_instance: Sequence[int] = MULTI_INSTANCE_BLOCKS,
        num_tokens: int = TOKENS,
    ) -> None:
        super().__init__()
        contexts = [cross_attention_dim] + ([cross_attention_2_dim] if cross_attention_2_dim else [])
        self.time_proj = _Time(width)
        self.proj_in = nn.Linear(in_channels, width)
        self.blocks = nn.ModuleList(
            Block(width, num_attention_heads, contexts, skip=i > num_layers // 2) for i in range(num_layers)
        )
        self.norm_out = nn.LayerNorm(width)
        self.proj_out = nn.Linear(width, in_channels)
        self.multi_instance = frozenset(multi_instance)
        self.gradient_checkpointing = False

    def load_lora_adapter(self, pretrained_model_name_or_path_or_dict: Any, **options: Any) -> None:
        """Load an adapter as in diffusers, and set `multi_instance` to the blocks that it was trained with.

        In these blocks, the objects of a scene attend to each other. The metadata of a local adapter file
        lists the blocks. Without this list, `multi_instance` is unchanged.
        """
        path = pretrained_model_name_or_path_or_dict
        if not isinstance(path, Mapping) and Path(path).exists():
            options.setdefault("use_safetensors", True)
            blocks = stored_blocks(Path(path))
            if blocks is not None:
                self.multi_instance = frozenset(blocks)
        super().load_lora_adapter(path, **options)

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        encoder_hidden_states_2: Tensor | None = None,
        groups: Sequence[int] | None = None,
        scales: Sequence[float] = (1.0, 1.0),
    ) -> Tensor:
        """Predict data - noise.

        Args:
            hidden_states: noisy latents (rows, n, channels), one object per row.
            timestep: (rows,), 0 to 1000, not rounded.
            encoder_hidden_states: (rows, m, cross_attention_dim).
            encoder_hidden_states_2: (rows, m2, cross_attention_2_dim), for a network with two contexts.
            groups: number of rows of each scene, in order; the sum is `rows`. None for no attention across
                rows.
            scales: factors of the outputs of the two cross-attentions.
        """
        contexts = [encoder_hidden_states]
        if encoder_hidden_states_2 is not None:
            contexts.append(encoder_hidden_states_2)
        x = torch.cat([self.time_proj(timestep)[:, None], self.proj_in(hidden_states)], 1)
        middle, skips = len(self.blocks) // 2, []
        for i, block in enumerate(self.blocks):
            args = (
                x,
                contexts,
                groups if i in self.multi_instance else None,
                skips.pop() if i > middle else None,
                scales,
            )
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = self._gradient_checkpointing_func(block, *args)  # type: ignore[misc]
            else:
                x = block(*args)
            if i < middle:
                skips.append(x)
        return self.proj_out(self.norm_out(x)[:, 1:])


def partial_heads(targets: Sequence[str]) -> list[str]:
    """Return a list with one warning if adapter targets match only some projections of attention layers.

    Otherwise the list is empty.
    """
    layers = {
        attention: [f"blocks.0.{attention}.{p}" for p in ("to_q", "to_k", "to_v", "to_out.0")]
        for attention in ("attn1", "attn2", "attn2_2")
    }
    hits = {a: sum(any(re.fullmatch(t, n) for t in targets) for n in names) for a, names in layers.items()}
    partial = [a for a, n in hits.items() if 0 < n < 4]
    if not partial:
        return []
    why = "a head spans to_q, to_k and to_v, so this changes some heads, not queries or values"
    cure = "target all three and to_out.0"
    return [f"tuner.targets: match only some projections of {', '.join(partial)}: {why}; {cure}"]


def stored_blocks(path: Path) -> list[int] | None:
    """Read the indices of the multi-instance blocks from an adapter's metadata.

    Multi-instance blocks have self-attention over all objects of a scene. The result is None if the metadata
    does not contain the indices.
    """
    for file in sorted(path.glob("*.safetensors")) if path.is_dir() else [path]:
        with safe_open(file, "pt") as opened:
            blocks = (opened.metadata() or {}).get("inlaid_multi_instance_blocks")
        if blocks is not None:
            return [int(n) for n in blocks.split(",") if n]
    return None


def infer_config(shapes: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """Infer the configuration of a transformer from its tensor shapes.

    This is needed if `config.json` is missing or wrong.

    Raises:
        ValueError: if the tensors are not those of a TripoSG or MIDI transformer.
    """
    try:
        width, channels = shapes["proj_in.weight"]
        head = shapes["blocks.0.attn1.norm_q.weight"][0]
        second = shapes.get("blocks.0.attn2_2.to_k.weight")
        layers = 1 + max(int(k.split(".")[1]) for k in shapes if k.startswith("blocks."))
        return {
            "num_attention_heads": width // head,
            "width": width,
            "in_channels": channels,
            "num_layers": layers,
            "cross_attention_dim": shapes["blocks.0.attn2.to_k.weight"][1],
            "cross_attention_2_dim": second[1] if second else None,
        }
    except (KeyError, ValueError) as error:
        raise ValueError(f"not a TripoSG or MIDI transformer: {error} is missing") from None


# --- shape VAE ----------------------------------------------------------------------------------------------


class _Frequencies(nn.Module):
    """Frequency embedding of points (..., 3), float32 (..., 3 + 6 * n).

    For a point p, it contains p, sin(2^k p) and cos(2^k p) for k = 0 to n - 1.
    """

    def __init__(self, n: int) -> None:
        super().__init__()
        self.n = n

    def forward(self, points: Tensor) -> Tensor:
        points = points.float()
        steps = 2.0 ** torch.arange(self.n, device=points.device, dtype=torch.float32)
        angles = (points[..., None] * steps).flatten(-2)
        return torch.cat([points, angles.sin(), angles.cos()], -1)


class _CrossBlock(nn.Module):
    """Block of the shape VAE: cross-attention and a feed-forward network, without self-attention.

    The context of the cross-attention is normalized.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm2 = FP32LayerNorm(width, eps=1e-5)
        self.attn2 = Attention(width, heads, width, norm_cross=True)
        self.norm3 = FP32LayerNorm(width, eps=1e-5)
        self.ff = FeedForward(width, activation_fn="gelu")

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class _Encoder(nn.Module):
    def __init__(self, features: int, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.proj_in = nn.Linear(features, width)
        own = (Block(width, heads, (), qk_norm=False) for _ in range(layers))
        self.blocks = nn.ModuleList([_CrossBlock(width, heads), *own])
        self.norm_out = FP32LayerNorm(width, eps=1e-5)

    def forward(self, queries: Tensor, points: Tensor) -> Tensor:
        x = self.blocks[0](self.proj_in(queries), self.proj_in(points))
        for block in list(self.blocks)[1:]:
            x = block(x)
        return self.norm_out(x)


class _Decoder(nn.Module):
    def __init__(self, features: int, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.proj_query = nn.Linear(features, width)
        own = [Block(width, heads, (), qk_norm=False) for _ in range(layers)]
        self.blocks = nn.ModuleList([*own, _CrossBlock(width, heads)])
        self.norm_out = FP32LayerNorm(width, eps=1e-5)
        self.proj_out = nn.Linear(width, 1)


class TripoSGVAE(ModelMixin, ConfigMixin):
    """Shape VAE: encodes surface points with normals to latent tokens, and decodes an implicit field.

    The field is negative inside the object. Latents are neither scaled nor shifted. Use float32: bfloat16 is
    not precise enough for the frequency embedding, which multiplies coordinates by up to 128.
    """

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        latent_channels: int = 64,
        num_attention_heads: int = 8,
        width_encoder: int = 512,
        width_decoder: int = 1024,
        num_layers_encoder: int = 8,
        num_layers_decoder: int = 16,
        embedding_type: str = "frequency",
        embed_frequency: int = 8,
        embed_include_pi: bool = False,
    ) -> None:
        super().__init__()
        if embedding_type != "frequency" or embed_include_pi:
            raise ValueError("only the published embedding is supported: type `frequency`, without pi")
        self.embedder = _Frequencies(embed_frequency)
        features = 3 + 6 * embed_frequency
        self.encoder = _Encoder(
            features + in_channels, width_encoder, num_layers_encoder, num_attention_heads
        )
        self.quant = nn.Linear(width_encoder, 2 * latent_channels)
        self.post_quant = nn.Linear(latent_channels, width_decoder)
        self.decoder = _Decoder(features, width_decoder, num_layers_decoder, num_attention_heads)

    def encode(self, surface: Tensor, queries: Tensor) -> Tensor:
        """Encode a surface to the posterior's means and log-variances, concatenated: (b, m, 2 * channels).

        Args:
            surface: (b, p, 6), positions and outward unit normals.
            queries: (b, m, 6), a subset of `surface` (see `choose_points`).
        """
        dtype = self.quant.weight.dtype
        h, c = (
            torch.cat([self.embedder(s[..., :3]), s[..., 3:].float()], -1).to(dtype)
            for s in (queries, surface)
        )
        mean, logvar = self.quant(self.encoder(h, c)).chunk(2, -1)
        return torch.cat([mean, logvar.clamp(-30, 20)], -1)

    def tokens(self, latents: Tensor) -> Tensor:
        """Convert latents (b, m, channels) to decoder tokens, the input of `field`.

        The tokens are the same for all points, so they are computed once.
        """
        x = self.post_quant(latents.to(self.post_quant.weight.dtype))
        for block in list(self.decoder.blocks)[:-1]:
            x = block(x)
        return x

    def field(self, tokens: Tensor, points: Tensor, chunk: int = 50_000) -> Tensor:
        """Return the implicit field of an object, (b, q), at points (b, q, 3).

        The field is negative inside the object. Its scale is arbitrary.

        Args:
            tokens: result of the method `tokens`.
            points: coordinates of the points.
            chunk: number of points that are evaluated at a time.
        """
        out = []
        for part in points.split(chunk, 1):
            y = self.decoder.proj_query(self.embedder(part).to(tokens.dtype))
            y = self.decoder.blocks[-1](y, tokens)
            out.append(-self.decoder.proj_out(self.decoder.norm_out(y))[..., 0])
        return torch.cat(out, 1)


class Field:
    """Implicit field of one object, as a function of points.

    `media.isosurface.extract` converts it to a mesh. Points (n, 3) give values (n,), which are
    negative inside the object.
    """

    def __init__(self, vae: TripoSGVAE, latents: Tensor) -> None:
        self.vae = vae
        with torch.no_grad():
            self.tokens = vae.tokens(latents[None])

    @torch.no_grad()
    def __call__(self, points: np.ndarray) -> np.ndarray:
        """Return the values (n,) of the field at points (n, 3), evaluated in chunks."""
        batch = torch.from_numpy(points.astype(np.float32))[None].to(self.tokens.device)
        return self.vae.field(self.tokens, batch)[0].float().cpu().numpy()


def sample_posterior(moments: Tensor, noise: Tensor) -> Tensor:
    """Sample latents from the posterior: mean + exp(logvar / 2) * noise.

    `moments` contains means, then log-variances, in the last dimension. `noise` has the shape of the means.
    """
    mean, logvar = moments.chunk(2, -1)
    return mean + (0.5 * logvar).exp() * noise


def choose_points(points: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Choose evenly spread points by farthest point sampling, and return their indices.

    The candidates are 4 * count random points.

    Args:
        points: (p, c) with c >= 3; the first three columns are positions.
        count: number of indices.
        seed: seed of the random candidates.
    """
    import fpsample

    candidates = np.random.default_rng(seed).choice(len(points), 4 * count, replace=4 * count > len(points))
    picked = fpsample.fps_sampling(
        np.ascontiguousarray(points[candidates, :3], np.float32), count, start_idx=0
    )
    return candidates[picked.astype(np.int64)]
