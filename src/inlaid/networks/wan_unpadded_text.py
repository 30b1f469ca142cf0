"""Cross-attention of Wan for text not padded to 512 tokens. The result is the same as for padded text."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from torch import Tensor


class ShortText(WanAttnProcessor):
    """Cross-attention processor of Wan for text that is padded to fewer than 512 tokens.

    Wan pads text to 512 tokens with zeros, and attends to the padding. All zero tokens have the same key and
    value. Therefore `m` zero tokens have the effect of `n` zero tokens if `log(n / m)` is added to their
    attention logits. The output is the same up to rounding.
    """

    bias: Tensor | None = None
    """Attention bias (b, 1, 1, tokens) for the text of the current forward pass; None if the text has the
    full length."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: Any = None,
    ) -> Tensor:
        """Compute cross-attention like `WanAttnProcessor`, but with the mask `bias`.

        `attention_mask` is ignored.
        """
        return super().__call__(attn, hidden_states, encoder_hidden_states, self.bias, rotary_emb)


def allow_short_text(transformer: Any, length: int = 512) -> None:
    """Modify a Wan transformer to accept text with fewer than `length` tokens.

    Shorter text must end with at least one zero token. Attention weights the zero tokens as if the text were
    padded with zeros to `length` tokens. Text with `length` tokens is processed as usual.
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
