"""Attention and positional embeddings for two clips, color and alpha, in one token sequence.

Color and alpha have the same positional embeddings, because video networks are trained on one clip per
sequence. If the sequence also contains text, the rule `block` prevents text tokens from attending to alpha
tokens (arXiv 2501.03006, section 3). For a sequence of 44,776 tokens (Mochi), an attention mask would need
1.9 GiB, and would prevent fused kernels. Instead, attention is computed in two calls. The first call has the
queries of the video and all keys. The second call has the queries of the text and no alpha keys. The result
is the same as with a mask.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inlaid.networks.sequence_parallel import SequenceParallel

Rule = Literal["open", "block", "bias"]
"""Attention of text tokens to alpha tokens: full (`open`), none (`block`) or reduced (`bias`). `bias`
subtracts 1 from the attention logits."""


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    text: int,
    first: bool,
    rule: Rule = "open",
    mask: Tensor | None = None,
    sequence: SequenceParallel | None = None,
) -> Tensor:
    """Compute attention over text tokens and the video tokens of color and alpha.

    Args:
        query: (n, heads, tokens, d).
        key: same shape as `query`.
        value: same shape as `query`.
        text: number of text tokens.
        first: True if text tokens precede the video tokens, False if they follow.
        rule: how text tokens attend to alpha tokens, the second half of the video tokens. `open`: without
            restriction. `block`: not at all. `bias`: 1 is subtracted from the logits, so the attention
            weights before normalization are multiplied by exp(-1) = 0.37.
        mask: (n, 1, 1, tokens), True for valid keys.
        sequence: sequence parallelism, or None for one process. If set, `query`, `key` and `value` contain
            only the video tokens of this process, and `mask` covers the tokens of all processes.

    Returns:
        (n, heads, tokens, d).
    """
    if sequence is not None:
        whole = partial(attention, text=text, first=first, rule=rule, mask=mask)
        return sequence.attention(whole, query, key, value, text=text, first=first)
    if rule == "open":
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    tokens = query.shape[2]
    half, end = (tokens - text) // 2, tokens if first else tokens - text
    text_query, video_query = (
        query.split([text, tokens - text], 2) if first else query.split([end, text], 2)[::-1]
    )
    video_out = F.scaled_dot_product_attention(video_query, key, value, attn_mask=mask)
    if rule == "bias":
        bias = F.pad(query.new_full((1, 1, text, half), -1), (end - half, tokens - end))
        if mask is not None:
            bias = bias.masked_fill(~mask, float("-inf"))
        text_out = F.scaled_dot_product_attention(text_query, key, value, attn_mask=bias)
    else:
        key, value = (_without(x, end - half, half, 2) for x in (key, value))
        mask = None if mask is None else _without(mask, end - half, half, 3)
        text_out = F.scaled_dot_product_attention(text_query, key, value, attn_mask=mask)
    return torch.cat([text_out, video_out] if first else [video_out, text_out], 2)


def _without(x: Tensor, start: int, length: int, dim: int) -> Tensor:
    """Remove the `length` entries that start at index `start` of dimension `dim`.

    The result is a view of `x` if these entries are the last.
    """
    before = x.narrow(dim, 0, start)
    rest = x.shape[dim] - start - length
    return torch.cat([before, x.narrow(dim, start + length, rest)], dim) if rest else before


def halve(positions: nn.Module, select: Callable[..., tuple[Any, ...]], dim: int) -> None:
    """Make a positional embedding module return the same positions for the color clip and the alpha clip.

    Args:
        positions: module that returns a tuple of tensors with one entry per token. Hooks reduce its input to
            the first clip, and repeat its output for the second clip.
        select: function that converts the arguments of a call for two clips to the arguments for the first
            clip.
        dim: dimension of the tokens in the returned tensors.
    """
    positions.register_forward_pre_hook(lambda _, args: select(*args))
    positions.register_forward_hook(lambda _, args, out: tuple(torch.cat([x, x], dim) for x in out))


class MochiJointAttention:
    """Attention processor of Mochi with a rule for the attention of text tokens to alpha tokens.

    Args:
        rule: attention of text to alpha: full (`open`), none (`block`) or reduced (`bias`).
        sequence: exchanges with other processes, if the video tokens are split over processes.
    """

    def __init__(self, rule: Rule, sequence: SequenceParallel | None = None) -> None:
        self.rule: Rule = rule
        self.sequence = sequence

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Compute joint attention over video and text; see the function `mochi`."""
        return mochi(*args, **kwargs, rule=self.rule, sequence=self.sequence)


def mochi(
    attn: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    attention_mask: Tensor | None,
    image_rotary_emb: tuple[Tensor, Tensor],
    rule: Rule = "open",
    sequence: SequenceParallel | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute Mochi's joint attention over video (n, v, d) and text (n, m, e).

    `attention_mask` (n, m) is True for valid text tokens and False for padding. None means that there is no
    padding. No token attends to padding. The outputs of padding tokens are meaningless.

    The attention processor of diffusers removes padding from each sample with `nonzero`. That operation
    causes graph breaks in compiled networks and fails on meta tensors. This function therefore uses a mask.
    """
    parts = hidden_states, encoder_hidden_states
    layers = (attn.to_q, attn.to_k, attn.to_v), (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
    each = zip(parts, layers, strict=True)
    video, text = ([layer(x).unflatten(2, (attn.heads, -1)) for layer in to] for x, to in each)
    query = rotate(attn.norm_q(video[0]), *image_rotary_emb), attn.norm_added_q(text[0])
    key = rotate(attn.norm_k(video[1]), *image_rotary_emb), attn.norm_added_k(text[1])
    joint = [torch.cat(pair, 1).transpose(1, 2) for pair in (query, key, (video[2], text[2]))]
    if attention_mask is not None:
        before = (hidden_states.shape[1] if sequence is None else sequence.tokens, 0)
        attention_mask = F.pad(attention_mask.bool(), before, value=True)[:, None, None]
    how: dict[str, Any] = {"rule": rule, "mask": attention_mask, "sequence": sequence}
    out = attention(*joint, text=parts[1].shape[1], first=False, **how)
    video_out, text_out = out.transpose(1, 2).flatten(2).split([x.shape[1] for x in parts], 1)
    video_out = attn.to_out[1](attn.to_out[0](video_out))
    return video_out, attn.to_add_out(text_out) if hasattr(attn, "to_add_out") else text_out


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary positional embedding to `x` (n, v, heads, d), computed in float32.

    Each pair of adjacent channels is rotated by one angle. `cos` and `sin` have shape (v, heads, d / 2).
    """
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2).to(x.dtype)


class CogVideoXJointAttention:
    """Attention processor of CogVideoX that can limit how much text tokens attend to alpha tokens.

    It can also split the video tokens over processes (`sequence`).
    """

    def __init__(self, rule: Rule, sequence: SequenceParallel | None = None) -> None:
        self.rule: Rule = rule
        self.sequence = sequence

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Compute joint attention over video (n, v, d) and text (n, m, d); return both outputs.

        The attention layer of diffusers passes only arguments that this signature names, and drops others
        with a warning.
        """
        from diffusers.models.embeddings import apply_rotary_emb

        assert attention_mask is None, "CogVideoX attends to padded text"
        m = encoder_hidden_states.shape[1]
        x = torch.cat([encoder_hidden_states, hidden_states], dim=1)
        query, key, value = (
            layer(x).unflatten(2, (attn.heads, -1)).transpose(1, 2)
            for layer in (attn.to_q, attn.to_k, attn.to_v)
        )
        query = query if attn.norm_q is None else attn.norm_q(query)
        key = key if attn.norm_k is None else attn.norm_k(key)
        if image_rotary_emb is not None:
            rotated: Any = apply_rotary_emb
            query, key = (
                torch.cat([y[:, :, :m], rotated(y[:, :, m:], image_rotary_emb)], 2) for y in (query, key)
            )
        out = attention(query, key, value, text=m, first=True, rule=self.rule, sequence=self.sequence)
        out = attn.to_out[1](attn.to_out[0](out.transpose(1, 2).flatten(2)))
        return out[:, m:], out[:, :m]


def halve_cogvideox(network: Any) -> None:
    """Make a CogVideoX network use the same positions for the color clip and the alpha clip.

    CogVideoX-2B adds sinusoidal positional embeddings. They are computed for one clip and repeated for the
    second clip. The precomputed embeddings of diffusers are disabled, because their positions are those of
    one long clip. All other versions get rotary embeddings as an argument. A pre-forward hook replaces these
    by two copies of the embeddings of the first clip.
    """

    def first_clip(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        found = kwargs.get("image_rotary_emb")
        if found is not None:
            kwargs["image_rotary_emb"] = tuple(x[: len(x) // 2].repeat(2, 1) for x in found)
        return args, kwargs

    network.register_forward_pre_hook(first_clip, with_kwargs=True)
    embed = network.patch_embed
    make, text, stride = (
        embed._get_positional_embeddings,
        embed.max_text_seq_length,
        embed.temporal_compression_ratio,
    )

    @lru_cache(16)
    def table(height: int, width: int, frames: int, device: Any = None) -> Tensor:
        latent = ((frames - 1) // stride + 1) // 2
        single = make(height, width, (latent - 1) * stride + 1, device=device)
        return torch.cat([single, single[:, text:]], 1)

    embed._get_positional_embeddings, embed.sample_frames = table, None
