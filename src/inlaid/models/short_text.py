"""Wan's 512 text tokens at the price of those that say something."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from torch import Tensor


class ShortText(WanAttnProcessor):
    """Cross-attention in which each zero token of the text counts as many.

    Wan pads its text to 512 tokens with zeros and attends to all of them. They are equal, so `m` of them
    weigh as much as `n` once `log(n / m)` is added to their logit: the same output, up to rounding, from a
    few tokens.
    """

    bias: Tensor | None = None
    """`(b, 1, 1, tokens)`, of the text that the network was given last; None where all of it was."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: Any = None,
    ) -> Tensor:
        """As `WanAttnProcessor`, with `bias` for a mask."""
        return super().__call__(attn, hidden_states, encoder_hidden_states, self.bias, rotary_emb)


def allow(transformer: Any, length: int = 512) -> None:
    """Lets a Wan transformer take text with fewer zeros at its end than `length` tokens have: at least one.

    Text of the full length is attended to as ever.
    """
    processor = ShortText()

    def weigh(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        text = kwargs["encoder_hidden_states"] if "encoder_hidden_states" in kwargs else args[2]
        tokens = text.shape[1]
        processor.bias = None
        if tokens < length:
            said = text.any(dim=-1)
            real = said.sum(dim=1, keepdim=True)
            weight = torch.log((length - real) / (tokens - real))
            processor.bias = torch.where(said, 0.0, weight)[:, None, None, :].to(text.dtype)

    for block in transformer.blocks:
        block.attn2.set_processor(processor)
    transformer.register_forward_pre_hook(weigh, with_kwargs=True)
