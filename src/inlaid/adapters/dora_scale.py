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
    """Return the base model's weight of an adapted module: float32 (out, in, ...).

    If the module fuses several layers of the base model, their weights are concatenated.

    Raises:
        ValueError: if `base` is None or lacks a layer.
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
    """Convert the `dora_scale` of a layer to tensors that peft supports.

    `dora_scale` has one value per output row or per input column of the weight. Values per output row become
    a DoRA magnitude. peft does not support values per input column. In this case, the update of the layer is
    computed and stored as full-rank factors.

    Args:
        parts: tensors of a layer: `A`, `B` and `dora_scale`.
        scale: scale s of the low-rank update s B A.
        weight: base weight W (out, in, ...) in float32.
        rule: norm by which each weight row is divided before it is multiplied by `dora_scale`; used for
            values per output row. `comfyui`: ||W||. `merged`: ||W + s B A||.
        path: adapter file, for messages.

    Returns:
        The new tensors, and True if `dora_scale` is per input column. The new factors then have scale 1.

    Raises:
        ValueError: if `dora_scale` is per output row and `rule` is unknown, if `dora_scale` has an unknown
            shape, or if the factors do not fit the weight.
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
