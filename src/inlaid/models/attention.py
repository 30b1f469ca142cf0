"""Two clips in one sequence, colour and alpha: attention and positions, for networks that know one clip.

Where text shares the sequence it does not see alpha, while everything else sees everything (arXiv 2501.03006,
section 3). A mask for that has a place for each pair of tokens, 1.9 GiB for the 44,776 of Mochi, and keeps
fused kernels away. Two calls, one for the queries of the video and one for those of the text without the keys
of alpha, give the same numbers. Both clips have the positions that the first would have alone.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Rule = Literal["open", "block", "bias"]
"""Whether text looks at the second half of the video: as at the first, not at all, or e times less."""


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    text: int,
    first: bool,
    rule: Rule = "open",
    mask: Tensor | None = None,
) -> Tensor:
    """Attention among all tokens, but for what text sees of the second half of the video.

    Args:
        query: (n, heads, tokens, d), as `key` and `value`.
        key: see there.
        value: see there.
        text: number of its tokens.
        first: whether they stand before those of the video, or after them.
        rule: what they see of its second half; `bias` takes 1 from their logits, exp(-1) = 0.37.
        mask: (n, 1, 1, tokens), true for keys that are there.
    """
    if rule == "open":
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    tokens = query.shape[2]
    half, end = (tokens - text) // 2, tokens if first else tokens - text
    asking, moving = query.split([text, tokens - text], 2) if first else query.split([end, text], 2)[::-1]
    seen = F.scaled_dot_product_attention(moving, key, value, attn_mask=mask)
    if rule == "bias":
        bias = F.pad(query.new_full((1, 1, text, half), -1), (end - half, tokens - end))
        if mask is not None:
            bias = bias.masked_fill(~mask, float("-inf"))
        read = F.scaled_dot_product_attention(asking, key, value, attn_mask=bias)
    else:
        key, value = (_without(x, end - half, half, 2) for x in (key, value))
        mask = None if mask is None else _without(mask, end - half, half, 3)
        read = F.scaled_dot_product_attention(asking, key, value, attn_mask=mask)
    return torch.cat([read, seen] if first else [seen, read], 2)


def _without(x: Tensor, start: int, length: int, dim: int) -> Tensor:
    """All but `length` places from `start`; a view where these are the last."""
    before = x.narrow(dim, 0, start)
    rest = x.shape[dim] - start - length
    return torch.cat([before, x.narrow(dim, start + length, rest)], dim) if rest else before


def halve(positions: nn.Module, ask: Callable[..., tuple[Any, ...]], dim: int) -> None:
    """Makes a module of positions give those of one clip twice, where it is asked for two in a row.

    Args:
        positions: gives tensors with a place for each token.
        ask: from what it is called with to what it would be called with for the first clip alone.
        dim: of the tokens.
    """
    positions.register_forward_pre_hook(lambda _, given: ask(*given))
    positions.register_forward_hook(lambda _, given, out: tuple(torch.cat([x, x], dim) for x in out))


class Mochi:
    """`mochi` with a rule for what text sees."""

    def __init__(self, rule: Rule) -> None:
        self.rule: Rule = rule

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """As `mochi`."""
        return mochi(*args, **kwargs, rule=self.rule)


def mochi(
    attn: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    attention_mask: Tensor | None,
    image_rotary_emb: tuple[Tensor, Tensor],
    rule: Rule = "open",
) -> tuple[Tensor, Tensor]:
    """Mochi's attention over video (n, v, d) and text (n, m, e); without a mask (n, m) all text is real.

    The stock processor looks for real tokens by `nonzero`, sample by sample, which breaks compiled graphs and
    needs data. Here padding is left out before, in `collate`, and masked where a batch cannot do without.
    What is computed for padded text is of no use, and nobody attends to it.
    """
    parts = hidden_states, encoder_hidden_states
    layers = (attn.to_q, attn.to_k, attn.to_v), (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
    each = zip(parts, layers, strict=True)
    video, text = ([layer(x).unflatten(2, (attn.heads, -1)) for layer in to] for x, to in each)
    query = rotate(attn.norm_q(video[0]), *image_rotary_emb), attn.norm_added_q(text[0])
    key = rotate(attn.norm_k(video[1]), *image_rotary_emb), attn.norm_added_k(text[1])
    joint = [torch.cat(pair, 1).transpose(1, 2) for pair in (query, key, (video[2], text[2]))]
    if attention_mask is not None:
        before = (hidden_states.shape[1], 0)
        attention_mask = F.pad(attention_mask.bool(), before, value=True)[:, None, None]
    out = attention(*joint, text=parts[1].shape[1], first=False, rule=rule, mask=attention_mask)
    seen, read = out.transpose(1, 2).flatten(2).split([x.shape[1] for x in parts], 1)
    seen = attn.to_out[1](attn.to_out[0](seen))
    return seen, attn.to_add_out(read) if hasattr(attn, "to_add_out") else read


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates neighbouring pairs of x (n, v, heads, d) by angles (v, heads, d / 2), in float32."""
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2).to(x.dtype)


class CogVideoX:
    """CogVideoX's attention over text (n, m, d), then video (n, v, d), with a rule for the two."""

    def __init__(self, rule: Rule) -> None:
        self.rule: Rule = rule

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Named arguments are those that the stock layer looks for; it drops others with a warning only."""
        from diffusers.models.embeddings import apply_rotary_emb

        assert attention_mask is None, "text is attended to with its padding"
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
        out = attention(query, key, value, text=m, first=True, rule=self.rule)
        out = attn.to_out[1](attn.to_out[0](out.transpose(1, 2).flatten(2)))
        return out[:, m:], out[:, :m]


def halve_cogvideox(network: Any) -> None:
    """As `halve`: rotations come with each call, and the table of 2B is made for a size.

    That table is otherwise the one that the network was built with, wherever a clip is as long as that.
    """

    def first(_: nn.Module, args: Any, given: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        found = given.get("image_rotary_emb")
        if found is not None:
            given["image_rotary_emb"] = tuple(x[: len(x) // 2].repeat(2, 1) for x in found)
        return args, given

    network.register_forward_pre_hook(first, with_kwargs=True)
    embed = network.patch_embed
    make, text, stride = (
        embed._get_positional_embeddings,
        embed.max_text_seq_length,
        embed.temporal_compression_ratio,
    )

    @lru_cache(16)
    def table(height: int, width: int, frames: int, device: Any = None) -> Tensor:
        latent = ((frames - 1) // stride + 1) // 2
        one = make(height, width, (latent - 1) * stride + 1, device=device)
        return torch.cat([one, one[:, text:]], 1)

    embed._get_positional_embeddings, embed.sample_frames = table, None
