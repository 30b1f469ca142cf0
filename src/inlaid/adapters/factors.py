"""Factors of LoRA, LoKr and LoHa layers: exact conversion to LoRA, and conversion to peft's tensors.

The update of a layer is the scale s times a product of factors. It is s B A for LoRA and s kron(w1, w2) for
LoKr, where w2 may be a product a b. It is s (w1_a w1_b) * (w2_a w2_b) for LoHa, where * is the elementwise
product (Yeh et al. 2023, https://arxiv.org/abs/2309.14859).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from inlaid import limits
from inlaid.adapters.names import Target
from inlaid.adapters.parse import Kind, Layer


@dataclass(frozen=True)
class Factors:
    """LoRA, LoKr or LoHa factors of one diffusers layer."""

    kind: Kind
    parts: Mapping[str, Tensor]
    """LoRA: `A` (r, in, ...), `B` (out, r, ...). LoKr: `w1` (o1, i1), and `w2` (o2, i2) or `a` (o2, r) and
    `b` (r, i2). LoHa: `w1_a` and `w2_a` (out, r), `w1_b` and `w2_b` (r, in)."""
    scale: float
    """Scale s of the update."""

    @property
    def shape(self) -> tuple[int, int]:
        """Shape (out, in) of the update; `in` includes the kernel size."""
        p = self.parts
        if self.kind == "lora":
            return p["B"].shape[0], math.prod(p["A"].shape[1:])
        if self.kind == "loha":
            return p["w1_a"].shape[0], p["w1_b"].shape[1]
        o2, i2 = p["w2"].shape if "w2" in p else (p["a"].shape[0], p["b"].shape[1])
        return p["w1"].shape[0] * o2, p["w1"].shape[1] * i2


def factors_of(layer: Layer, scale: float) -> dict[str, Factors]:
    """Return the factors of each diffusers layer to which an adapter layer applies.

    An adapter layer can apply to several diffusers layers, such as query, key and value. Their factors then
    have the same kind as the adapter layer (LoRA, LoKr or LoHa). There is one exception: if the rows of the
    first LoKr factor cannot be divided among the layers, each layer gets LoRA factors with the same update.
    """
    whole = _read(layer, scale)
    return {target.module: _select(whole, target) for target in layer.targets}


def _read(layer: Layer, scale: float) -> Factors:
    p = {n: t.flatten(1) if n.startswith(("lokr_", "hada_")) else t for n, t in layer.parts.items()}
    if layer.kind == "lora":
        return Factors("lora", {"A": p["A"], "B": p["B"]}, scale)
    if layer.kind == "loha":
        return Factors("loha", {f"w{i}_{x}": p[f"hada_w{i}_{x}"] for i in (1, 2) for x in "ab"}, scale)
    w1 = p["lokr_w1"] if "lokr_w1" in p else p["lokr_w1_a"].float() @ p["lokr_w1_b"].float()
    if "lokr_w2" in p:
        return Factors("lokr", {"w1": w1, "w2": p["lokr_w2"]}, scale)
    return Factors("lokr", {"w1": w1, "a": p["lokr_w2_a"], "b": p["lokr_w2_b"]}, scale)


def _select(whole: Factors, target: Target) -> Factors:
    """Return the factors of one diffusers layer.

    `whole` contains the factors of a module in the file. This module may fuse several layers, such as q, k
    and v.
    """
    if target.parts == 1 and not target.swapped:
        return whole
    rows = {"lora": ("B",), "loha": ("w1_a", "w2_a"), "lokr": ("w1",)}[whole.kind]
    if whole.kind == "lokr" and whole.parts["w1"].shape[0] % (target.parts * (1 + target.swapped)):
        a, b = low_rank(whole)
        return Factors("lora", {"A": a, "B": target.rows(b)}, 1.0)
    return Factors(
        whole.kind, {n: target.rows(t) if n in rows else t for n, t in whole.parts.items()}, whole.scale
    )


def update_of(factors: Factors) -> Tensor:
    """Return the update (out, in) of a layer in float32.

    For a convolution, `in` is the number of input channels times the number of kernel elements.
    """
    p = {n: t.float() for n, t in factors.parts.items()}
    if factors.kind == "lora":
        return factors.scale * (p["B"].flatten(1) @ p["A"].flatten(1))
    if factors.kind == "loha":
        return factors.scale * ((p["w1_a"] @ p["w1_b"]) * (p["w2_a"] @ p["w2_b"]))
    return factors.scale * torch.kron(p["w1"], p["w2"] if "w2" in p else p["a"] @ p["b"])


def _rank(factors: Factors) -> int:
    """Return a LoRA rank that suffices to represent the update exactly."""
    p = factors.parts
    rank = min(factors.shape)
    if factors.kind == "loha":
        rank = min(rank, p["w1_b"].shape[0] * p["w2_b"].shape[0])
    elif "a" in p:
        rank = min(rank, p["w1"].shape[1] * p["b"].shape[0])
    return rank


def low_rank(factors: Factors) -> tuple[Tensor, Tensor]:
    """Convert factors to LoRA factors A (r, in) and B (out, r) with scale 1 and the same update, in float32.

    Factors of a LoRA keep their rank. For LoHa of rank k, r is k^2. For LoKr with w2 = a b of rank k, r is k
    times the number of columns of w1. If r would be larger than min(out, in) or w2 is not factored, r is
    min(out, in).
    """
    p = {n: t.float() for n, t in factors.parts.items()}
    s = factors.scale
    if factors.kind == "lora":
        return p["A"], s * p["B"]
    if _rank(factors) == min(factors.shape):
        return full_rank(update_of(factors))
    if factors.kind == "loha":
        a = (p["w1_b"][:, None] * p["w2_b"][None]).flatten(0, 1)
        return a, s * (p["w1_a"][:, :, None] * p["w2_a"][:, None]).flatten(1)
    return torch.kron(torch.eye(p["w1"].shape[1]), p["b"]), s * torch.kron(p["w1"], p["a"])


def full_rank(delta: Tensor) -> tuple[Tensor, Tensor]:
    """Return factors A and B with the product B A = `delta`; one factor is the identity."""
    flat = delta.flatten(1)
    n_out, n_in = flat.shape
    a, b = (torch.eye(n_in), flat) if n_in <= n_out else (flat, torch.eye(n_out))
    return a.reshape(-1, *delta.shape[1:]), b.reshape(n_out, -1, *[1] * (delta.ndim - 2))


def as_lora(layers: Mapping[str, Factors]) -> dict[str, tuple[Tensor, Tensor, float]]:
    """Return A, B and LoRA alpha of each layer. LoKr and LoHa layers are converted exactly.

    Raises:
        ValueError: if the converted factors exceed the memory limit `limits.ARRAY`.
    """
    size = sum(4 * _rank(f) * sum(f.shape) for f in layers.values() if f.kind != "lora")
    if large := limits.ARRAY.exceeded(size, f"as an exact LoRA, the adapter has {limits.as_size(size)}"):
        raise ValueError(large)
    out = {}
    for module, factors in layers.items():
        if factors.kind == "lora":
            a, b = factors.parts["A"], factors.parts["B"]
            out[module] = a, b, factors.scale * a.shape[0]
        else:
            a, b = low_rank(factors)
            out[module] = a, b, float(a.shape[0])
    return out


# --- peft's form of LoKr and LoHa ---------------------------------------------------------------------------


def for_peft(layers: Mapping[str, Factors], kind: Kind) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Convert LoKr or LoHa layers to tensors and a configuration that peft can load.

    peft has one rank, alpha and `decompose_factor` for all layers, and derives the shapes of factors from
    these. Factors of lower rank are therefore padded with zeros. A low-rank product is multiplied out where
    peft expects a full matrix. If the layers have different scales, each scale is multiplied into the first
    factor of its layer.

    Returns:
        Tensors by peft's names, and the configuration. None if no `decompose_factor` gives the shapes of all
        Kronecker factors.
    """
    scales = {f.scale for f in layers.values()}
    scale = scales.pop() if len(scales) == 1 else None
    made = _loha(layers) if kind == "loha" else _lokr(layers)
    if made is None:
        return None
    tensors, rank, factor = made
    if scale is None:
        for module, factors in layers.items():
            first = f"{module}.{'hada_w1_a' if kind == 'loha' else 'lokr_w1'}"
            tensors[first] = factors.scale * tensors[first].float()
    alpha = float(rank) if scale is None else scale * rank
    config: dict[str, Any] = {
        "peft_type": kind.upper(),
        "r": rank,
        "alpha": int(alpha) if alpha.is_integer() else alpha,
    }
    config |= {"use_effective_conv2d": False}
    config |= {} if kind == "loha" else {"decompose_both": False, "decompose_factor": factor}
    return tensors, config


def _loha(layers: Mapping[str, Factors]) -> tuple[dict[str, Tensor], int, int]:
    rank = max(f.parts[f"w{i}_b"].shape[0] for f in layers.values() for i in (1, 2))
    tensors = {}
    for module, factors in layers.items():
        for i in (1, 2):
            a, b = factors.parts[f"w{i}_a"], factors.parts[f"w{i}_b"]
            tensors[f"{module}.hada_w{i}_a"], tensors[f"{module}.hada_w{i}_b"] = _padded(a, b, rank)
    return tensors, rank, 0


def _padded(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Pad factors (out, r) and (r, in) with zeros to a higher rank."""
    missing = rank - b.shape[0]
    if not missing:
        return a, b
    return torch.nn.functional.pad(a, (0, missing)), torch.nn.functional.pad(b, (0, 0, 0, missing))


def _lokr(layers: Mapping[str, Factors]) -> tuple[dict[str, Tensor], int, int] | None:
    sizes = {}
    for module, factors in layers.items():
        p, (n_out, n_in) = factors.parts, factors.shape
        o1, i1 = p["w1"].shape
        sizes[module] = (n_out, o1, n_out // o1), (n_in, i1, n_in // i1)
    pairs = {pair for two in sizes.values() for pair in two}
    candidates = [-1, *sorted({first for _, first, _ in pairs})]
    fits = (
        f for f in candidates if all(_factorization(n, f) == (first, second) for n, first, second in pairs)
    )
    factor = next(fits, None)
    if factor is None:
        return None
    longest = {m: max(out[2], in_[2]) for m, (out, in_) in sizes.items()}
    needs = [f.parts["b"].shape[0] if "b" in f.parts else -(-longest[m] // 2) for m, f in layers.items()]
    rank, tensors = max(needs), {}
    for module, factors in layers.items():
        p = factors.parts
        tensors[f"{module}.lokr_w1"] = p["w1"]
        if rank >= longest[module] / 2:
            w2 = p["w2"] if "w2" in p else p["a"].float() @ p["b"].float()
            tensors[f"{module}.lokr_w2"] = w2
        else:
            a, b = _padded(p["a"], p["b"], rank)
            tensors[f"{module}.lokr_w2_a"], tensors[f"{module}.lokr_w2_b"] = a, b
    return tensors, rank, factor


def _factorization(n: int, factor: int) -> tuple[int, int]:
    """Split a dimension into the sizes of two Kronecker factors, as peft and LyCORIS do."""
    from peft.tuners.lokr.layer import factorization

    return factorization(n, factor)
