"""Cross-attention of Wan to fewer than 512 text tokens, with the same result as with zero padding to 512."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from torch import Tensor


class ShortText(WanAttnProcessor):
    """Cross-attention processor that gives a few zero tokens the weight of all zero padding.

    Wan pads text to 512 tokens with zeros and attends to the padding. All zero tokens are equal, so `m` zero
    tokens have the weight of `n` if `log(n / m)` is added to their logits. The output is the same up to
    rounding.
    """

    bias: Tensor | None = None
    """Logit bias (b, 1, 1, tokens) of the text in the current forward pass; None if text has full length."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: Any = None,
    ) -> Tensor:
        """Compute cross-attention with `WanAttnProcessor`, with `bias` as attention mask."""
        return super().__call__(attn, hidden_states, encoder_hidden_states, self.bias, rotary_emb)


def allow_short_text(transformer: Any, length: int = 512) -> None:
    """Modify a Wan transformer to accept text padded to fewer than `length` tokens.

    Text that is shorter than `length` must end with at least one zero token. Text of the full length is
    processed as in the stock network.
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
