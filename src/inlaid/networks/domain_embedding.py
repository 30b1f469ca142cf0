"""Domain embedding of joint alpha, a trained vector added to the alpha tokens, and its file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

EMBEDDING = "domain_embedding.safetensors"
"""File of the domain embedding, in the folder of the adapter."""

NAME = "domain_embedding"
"""Name of the domain embedding's module in the network and of its tensor in the file."""

TOKENS = "the second half of the video's"
"""Metadata value that names the tokens an adapter changes."""


class DomainEmbedding(nn.Module):
    """Domain embedding of the alpha tokens; a module, so that FSDP gathers its weight in `forward`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))
        self.adapter_layers: list[Any] = []
        """Adapter layers, not registered as child modules; if any is disabled, the embedding is not added."""

    def forward(self, x: Tensor) -> Tensor:
        """Add the embedding to the second half of the tokens (n, 2 * v, d)."""
        color, alpha = x.chunk(2, 1)
        return torch.cat([color, alpha + self.weight.to(x.dtype)], 1)

    def before(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        """Pre-forward hook of the first block, which receives the video tokens by position or by keyword."""
        if any(layer.disable_adapters for layer in self.adapter_layers):
            return args, kwargs
        if args:
            return (self(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": self(kwargs["hidden_states"])}


def read_domain_embedding(folder: Path, header: Mapping[str, str]) -> Tensor | None:
    """Return the domain embedding of an adapter folder, float32 (d,); None if it was trained without one.

    Raises:
        ValueError: if the adapter was trained with a domain embedding but its file is missing.
    """
    path = folder / EMBEDDING
    if header.get(f"inlaid_{NAME}") != "yes":
        return None
    if not path.is_file():
        raise ValueError(f"{folder}: {EMBEDDING} of this adapter is missing: copy it into the folder")
    with safe_open(path, "pt") as file:
        return file.get_tensor(NAME).float().flatten()
