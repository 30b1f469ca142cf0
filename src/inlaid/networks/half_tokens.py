"""LoRA and DoRA layers for joint alpha. They change only the tokens of the alpha clip.

These tokens are the second half of the video tokens.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor


class HalfTokens:
    """Mixin that limits the adapter of a peft layer to the second half of the video tokens.

    It replaces `forward`, because the `forward` of peft has no hook between the base layer and the adapter.
    Disabled and inactive adapters, dropout, and variants such as DoRA are supported.
    """

    text = 0
    """Number of text tokens that precede the video tokens in the sequence."""

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Apply the base layer to all tokens, and the adapter to the second half of the video tokens.

        The shape changes from (n, text + 2 * v, in) to (n, text + 2 * v, out).
        """
        out = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return out
        head = (x.shape[1] + self.text) // 2
        tail, last = x[:, head:], out[:, head:]
        if hasattr(self, "add_update") and tail.dtype in (torch.bfloat16, torch.float16):
            return torch.cat([out[:, :head], self.add_update(tail, last)], 1)
        for name in self.active_adapters:
            if name not in self.lora_A:
                continue
            tail = self._cast_input_dtype(tail, self.lora_A[name].weight.dtype)
            if name in self.lora_variant:
                last = self.lora_variant[name].forward(self, active_adapter=name, x=tail, result=last)
            else:
                update = self.lora_B[name](self.lora_A[name](self.lora_dropout[name](tail)))
                last = last + update * self.scaling[name]
        return torch.cat([out[:, :head], last.to(out.dtype)], 1)

    def merge(self, *_: Any, **__: Any) -> None:
        """Raise an error: an adapter that applies to some tokens only cannot be merged into the weights.

        Raises:
            ValueError: always.
        """
        raise ValueError(NOT_MERGEABLE)


NOT_MERGEABLE = (
    "the adapter changes the alpha tokens only, which no change of weights can do: it cannot be merged"
)


@lru_cache
def half_tokens_class(kind: type, text: int) -> type:
    """Return a subclass of a peft layer whose adapter changes only the second half of the video tokens.

    Args:
        kind: class of the peft layer.
        text: number of text tokens that precede the video tokens.
    """
    return type(f"HalfTokens{kind.__name__}", (HalfTokens, kind), {"text": text})
