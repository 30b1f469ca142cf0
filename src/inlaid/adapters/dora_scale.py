"""Conversion of DoRA magnitudes to peft's format. Other programs store them as `dora_scale`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from inlaid.adapters.factors import full_rank
from inlaid.adapters.layers import base_layer, low_rank_product, row_norms
from inlaid.adapters.names import Target
from inlaid.adapters.parse import Layer

DoraRule = Literal["comfyui", "merged"]

DORA_RULE_KEY = "inlaid_dora_scale"
"""Header key under which inlaid stores the definition of `dora_scale`: `comfyui` or `merged`."""


def fused_weight(base: nn.Module | None, layer: Layer, path: Path) -> Tensor:
    """Return the base model's weight (out, in, ...) of an adapted module, in float32.

    If the module fuses several layers, their weights are concatenated.

    Raises:
        ValueError: if there is no base model, or it lacks the layer.
    """
    if base is None:
        raise ValueError(
            f"{path}: dora_scale is relative to the weights of the base model: pass the base model "
            "(inlaid import --checkpoint)"
        )
    weights = []
    for target in layer.targets:
        try:
            weight = base_layer(base, target.module).weight.detach().float()
        except AttributeError:
            raise ValueError(f"{path}: the base model has no layer {target.module}") from None
        weights.append(Target(target.module, swapped=target.swapped).rows(weight))
    return torch.cat(weights)


def from_dora_scale(
    parts: Mapping[str, Tensor], scale: float, weight: Tensor, rule: str | None, path: Path
) -> tuple[dict[str, Tensor], bool]:
    """Replace `dora_scale` by tensors that peft supports.

    A `dora_scale` per output row becomes a magnitude. A `dora_scale` per input column becomes part of
    full-rank factors.

    Args:
        parts: tensors of a layer: `A`, `B` and `dora_scale`.
        scale: factor of the product B A.
        weight: base weight (out, in, ...) in float32.
        rule: definition of a `dora_scale` per output row: `comfyui` or `merged`.
        path: adapter file, for messages.

    Returns:
        The new tensors, and whether `dora_scale` is per input column. If so, the scale of the factors is 1.

    Raises:
        ValueError: if the definition or shape of `dora_scale` is unknown, or the factors do not fit.
    """
    dora_scale = parts["dora_scale"].float()
    rest = {k: v for k, v in parts.items() if k not in ("dora_scale", "alpha")}
    update = low_rank_product(parts["A"], parts["B"], scale)
    if update.numel() != weight.numel() or update.shape[0] != weight.shape[0]:
        raise ValueError(
            f"{path}: trained on a network of another size: a layer is {tuple(update.shape)} in the adapter "
            f"and {tuple(weight.shape)} in the base model"
        )
    merged = weight + update.reshape(weight.shape)
    if dora_scale.ndim > 1 and dora_scale.shape[0] == 1 and dora_scale.shape[1] == merged.shape[1]:
        columns = torch.linalg.vector_norm(merged.transpose(0, 1).flatten(1), dim=1)
        shape = (1, -1, *[1] * (merged.ndim - 2))
        factor = dora_scale.reshape(shape) / columns.clamp_min(1e-8).reshape(shape)
        a, b = full_rank(merged * factor - weight)
        return {**rest, "A": a, "B": b}, True
    if dora_scale.numel() != weight.shape[0]:
        raise ValueError(
            f"{path}: dora_scale of shape {tuple(dora_scale.shape)} for a layer of shape "
            f"{tuple(weight.shape)}"
        )
    if rule not in ("comfyui", "merged"):
        raise ValueError(
            f"{path}: the norm that dora_scale refers to is ambiguous: pass --dora-scale comfyui (||W||, as "
            "ComfyUI applies it) or merged (||W + BA||, as LyCORIS trains it)"
        )
    dora_scale = dora_scale.reshape(-1)
    if rule == "comfyui":
        dora_scale = dora_scale * row_norms(merged) / row_norms(weight)
    return {**rest, "magnitude": dora_scale}, False
