"""Self-attention of Wan for a sequence whose tokens are split over processes."""

from __future__ import annotations

from typing import Any

from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from torch import Tensor

from inlaid.networks.joint_attention import rotate
from inlaid.networks.sequence_parallel import SequenceParallel


class SplitSelfAttention(WanAttnProcessor):
    """Self-attention processor of Wan that attends to the tokens of all processes.

    Between the rotary embedding and attention, tokens must be exchanged with the other processes. The
    processor of diffusers does not allow this.
    """

    def __init__(self, sequence: SequenceParallel) -> None:
        super().__init__()
        self.sequence = sequence

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Compute attention from this process's tokens (n, own tokens, d) to the tokens of all processes.

        `rotary_emb` contains cosines and sines (1, own tokens, 1, head width) for this process's tokens.
        """
        assert encoder_hidden_states is None and attention_mask is None and rotary_emb is not None
        cos, sin = rotary_emb
        query, key, value = (
            norm(layer(hidden_states)).unflatten(2, (attn.heads, -1))
            for layer, norm in ((attn.to_q, attn.norm_q), (attn.to_k, attn.norm_k), (attn.to_v, _same))
        )
        query, key = (rotate(x, cos[..., 0::2], sin[..., 1::2]) for x in (query, key))
        out = self.sequence.attention(self._attend, *(x.transpose(1, 2) for x in (query, key, value)))
        return attn.to_out[1](attn.to_out[0](out.transpose(1, 2).flatten(2)))

    def _attend(self, *parts: Tensor) -> Tensor:
        query, key, value = (x.transpose(1, 2) for x in parts)
        return dispatch_attention_fn(query, key, value, backend=self._attention_backend).transpose(1, 2)


def _same(x: Tensor) -> Tensor:
    return x
