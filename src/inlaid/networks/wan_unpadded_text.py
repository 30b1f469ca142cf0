"""Cross-attention of Wan to its 512 text tokens at the cost of the non-padding tokens."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from torch import Tensor


class ShortText(WanAttnProcessor):
    """Cross-attention in which each zero token of the text stands for several.

    Wan pads text to 512 tokens with zeros and attends to all of them. The zero tokens are equal, so `m` of
    them have the weight of `n` if `log(n / m)` is added to their logits: the same output up to rounding, from
    fewer tokens.
    """

    bias: Tensor | None = None
    """Logit bias (b, 1, 1, tokens) of the text in the current forward pass; None for text of full length."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: Any = None,
    ) -> Tensor:
        """Call `WanAttnProcessor` with `bias` as attention mask."""
        return super().__call__(attn, hidden_states, encoder_hidden_states, self.bias, rotary_emb)


def allow_short_text(transformer: Any, length: int = 512) -> None:
    """Let a Wan transformer accept text padded to fewer than `length` tokens.

    Such text must have at least one zero token. Text of the full length is processed as in the stock network.
    """
    processor = ShortText()

    def weigh(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        text = kwargs["encoder_hidden_states"] if "encoder_hidden_states" in kwargs else args[2]
        tokens = text.shape[1]
        processor.bias = None
        if tokens < length:
            is_text = text.any(dim=-1)
            count = is_text.sum(dim=1, keepdim=True)
            weight = torch.log((length - count) / (tokens - count))
            processor.bias = torch.where(is_text, 0.0, weight)[:, None, None, :].to(text.dtype)

    for block in transformer.blocks:
        block.attn2.set_processor(processor)
    transformer.register_forward_pre_hook(weigh, with_kwargs=True)
