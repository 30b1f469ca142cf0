"""LoRA and DoRA layers that apply to the second half of the video tokens only."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor


class HalfTokens:
    """Mixin for peft layers that applies the adapter to the second half of the video tokens only.

    It replaces `forward`, because peft's has no hook between the base layer and the update. Disabled and
    inactive adapters, dropout, and variants such as DoRA are supported.
    """

    text = 0
    """Number of text tokens before the video tokens."""

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Apply the layer: (n, text + 2 * v, in) to (n, text + 2 * v, out)."""
        out = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return out
        head = (x.shape[1] + self.text) // 2
        tail, last = x[:, head:], out[:, head:]
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
        """Raise an error, because the update cannot be merged.

        Raises:
            ValueError: always.
        """
        raise ValueError(NOT_MERGEABLE)


NOT_MERGEABLE = (
    "the adapter changes the alpha tokens only, which no change of weights can do: it cannot be merged"
)


@lru_cache
def half_tokens_class(kind: type, text: int) -> type:
    """Return a subclass of the peft layer `kind` that applies to the second half of the video tokens only."""
    return type(f"HalfTokens{kind.__name__}", (HalfTokens, kind), {"text": text})
