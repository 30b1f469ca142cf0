"""Helper functions for the layers that an adapter changes: names, shapes, norms and low-rank products."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from inlaid.adapters.adapter import Adapter
from inlaid.text import printable


def layer_shapes(denoiser: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the weight shapes of all linear and convolution layers, by layer name.

    Shapes are (out, in) or, for convolutions, (out, in, kernel sizes). The network may be on the meta device.
    """
    return {
        name.removesuffix(".base_layer"): tuple(m.weight.shape)
        for name, m in denoiser.named_modules()
        if isinstance(m, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)) and ".lora_" not in name
    }


def some_of(names: Iterable[object], most: int = 4) -> str:
    """Join names for a message; replace all names after the first `most` by a count: `a, b and 3 more`."""
    names = [n if len(n := printable(name, lines=False)) <= 120 else f"{n[:117]}..." for name in names]
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def check_fit(
    adapter: Adapter | Mapping[str, tuple[int, ...]],
    layers: Mapping[str, tuple[int, ...]],
    where: object = "adapter",
    widths: Mapping[int, str] = MappingProxyType({}),
) -> None:
    """Check that an adapter fits the layers of a network.

    Args:
        adapter: the adapter, or the shapes of its updates by layer.
        layers: weight shapes of the network's layers, from `layer_shapes`.
        where: file of the adapter, for messages.
        widths: name of the model size, such as `Wan 14B`, for each hidden width. Used in messages.

    Raises:
        ValueError: if the network lacks a layer of the adapter, or if a layer has another shape.
    """
    shapes = adapter.shapes if isinstance(adapter, Adapter) else adapter
    missing = [m for m in shapes if m not in layers]
    wrong: dict[tuple, str] = {}
    for module, own in shapes.items():
        if module in layers and own != layers[module]:
            wrong.setdefault((own, layers[module]), module)
    problems = []
    if wrong:
        (own, theirs), module = next(iter(wrong.items()))
        of, other = (f" ({widths[w]})" if w in widths else "" for w in (own[1], theirs[1]))
        size, needed = (" x ".join(map(str, shape)) for shape in (own, theirs))
        problems.append(
            f"trained on a network of another size: {module} is {size}{of} in the adapter and "
            f"{needed}{other} in the network"
        )
    if missing:
        count = f"{len(missing)} of the adapter's {len(shapes)} layers"
        problems.append(f"the network lacks {count} ({some_of(missing)})")
    if problems:
        raise ValueError(f"{where}: " + "; ".join(problems))


def companions(denoiser: nn.Module) -> dict[str, nn.Module]:
    """Return the image encoders inside a denoiser by name.

    They are models of the transformers library and are trained together with the denoiser. The adapter of
    each encoder is stored in a subfolder with the encoder's name.
    """
    from transformers import PreTrainedModel

    return {name: child for name, child in denoiser.named_children() if isinstance(child, PreTrainedModel)}


def low_rank_product(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Return the low-rank update `scale` * B A as a float32 matrix (out, in).

    For a convolution, `in` is the number of input channels times the kernel size.
    """
    return scale * (b.float().flatten(1) @ a.float().flatten(1))


def row_norms(weight: Tensor) -> Tensor:
    """Return the L2 norms (out,) of the rows of a weight (out, in, ...), clamped to at least 1e-8."""
    return torch.linalg.vector_norm(weight.flatten(1), dim=1).clamp_min(1e-8)


def base_layer(denoiser: nn.Module, module: str) -> Any:
    """Return a layer by name; if an adapter layer wraps it, return the wrapped layer."""
    layer = denoiser.get_submodule(module)
    return getattr(layer, "base_layer", layer)
