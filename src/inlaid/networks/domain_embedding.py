"""Domain embedding: a trained vector that is added to the alpha tokens, and the file that stores it.

A network with joint alpha (arXiv 2501.03006) processes a color clip and an alpha clip in one token sequence.
The alpha tokens are the second half of the video tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

EMBEDDING = "domain_embedding.safetensors"
"""Name of the file in an adapter's folder that stores the domain embedding."""

NAME = "domain_embedding"
"""Name of the `DomainEmbedding` submodule in the network, and of the tensor in the file `EMBEDDING`."""

TOKENS = "the second half of the video's"
"""Value of `inlaid_alpha_tokens` in an adapter's metadata: the adapter changes the alpha tokens only, which
are the second half of the video tokens."""


class DomainEmbedding(nn.Module):
    """Trained vector that is added to the tokens of the alpha clip; zero before training.

    It is a separate module so that FSDP gathers its weight in `forward`.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))
        self.adapter_layers: list[Any] = []
        """Adapter layers; if any is disabled, the embedding is not added. A plain list does not register the
        layers as child modules."""

    def forward(self, x: Tensor) -> Tensor:
        """Add the embedding to the alpha tokens, which are the second half of `x` (n, 2 * v, d)."""
        color, alpha = x.chunk(2, 1)
        return torch.cat([color, alpha + self.weight.to(x.dtype)], 1)

    def before(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        """Add the embedding to the input of the first transformer block (pre-forward hook).

        The block receives the video tokens as its first positional argument or as `hidden_states`. If an
        adapter layer is disabled, the input is unchanged.
        """
        if any(layer.disable_adapters for layer in self.adapter_layers):
            return args, kwargs
        if args:
            return (self(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": self(kwargs["hidden_states"])}


def read_domain_embedding(folder: Path, header: Mapping[str, str]) -> Tensor | None:
    """Read the domain embedding from an adapter's folder: float32 (d,), or None if the adapter has none.

    Args:
        folder: folder of the adapter.
        header: metadata of the adapter file.

    Raises:
        ValueError: if the adapter was trained with a domain embedding, but the file is missing.
    """
    path = folder / EMBEDDING
    if header.get(f"inlaid_{NAME}") != "yes":
        return None
    if not path.is_file():
        raise ValueError(f"{folder}: {EMBEDDING} of this adapter is missing: copy it into the folder")
    with safe_open(path, "pt") as file:
        return file.get_tensor(NAME).float().flatten()
