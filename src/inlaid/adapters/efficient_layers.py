"""LoRA and DoRA layers that save fewer tensors for the backward pass than the layers of peft."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from inlaid.networks import quantize

ADAPTER = "default"
"""Name of the trained adapter in peft."""

HALF = (torch.bfloat16, torch.float16)
"""Half-precision dtypes. Layers with activations of other dtypes use peft's computation."""

WIDENING = frozenset({"cuda", "meta"} if "out_dtype" in (torch.mm.__doc__ or "") else ())
"""Device types on which `torch.mm` of half-precision matrices can return float32 (torch 2.8 or newer)."""


def use_factor_norms(denoiser: nn.Module) -> None:
    """Make every DoRA linear layer compute its weight norms without the product B A.

    In each layer and forward pass, peft applies both factors to an identity matrix (in, in) to get B A, and
    adds the result to a copy of W. Here, the squared row norms of W + s B A are computed as ||W||^2 + 2 s <W
    A^T, B> + s^2 <B (A A^T), B>. <X, Y> is the dot product of each row of X with the same row of Y. The
    result is equal up to rounding. The norm needs no gradient, because DoRA treats it as a constant (Liu et
    al. 2024, section 4.3).
    """
    from peft.tuners.lora.dora import DoraLinearLayer

    class FactoredDora(DoraLinearLayer):
        def forward(self, x, *, lora_A, lora_B, scaling, base_layer, base_result=None, **_):  # noqa: N803
            with torch.no_grad():
                weight = quantize.dense(base_layer).to(lora_A.weight.dtype)
                norm = row_norm(weight, lora_A.weight, lora_B.weight, scaling)
            scale = (self.weight / norm).to(lora_A.weight.dtype)
            if base_result is None:
                base = nn.functional.linear(x, weight)
            else:
                base = base_result if base_layer.bias is None else base_result - base_layer.bias
            return _Rescaled.apply(base, lora_A(x), lora_B.weight, scale, scaling)

    for module in denoiser.modules():
        if type(module) is DoraLinearLayer:
            module.__class__ = FactoredDora


def keep_inputs(denoiser: nn.Module) -> None:
    """Make every LoRA linear layer save its original input for the backward pass, not a float32 copy.

    peft casts the input to the dtype of the factors, which is float32, and saves the copy. If the query, key
    and value layers share a bfloat16 input, their three copies take six times the memory of the input. Here,
    each layer saves the shared input and repeats the cast in the backward pass. The gradients are
    bit-identical.
    """
    from peft.tuners.lora import LoraLayer

    class FirstFactor(nn.Linear):
        def forward(self, x):
            return _Product.apply(x, self.weight)

    for layer in denoiser.modules():
        if isinstance(layer, LoraLayer) and type(layer.lora_A[ADAPTER]) is nn.Linear:
            layer.lora_A[ADAPTER].__class__ = FirstFactor
            layer.cast_input_dtype_enabled = False


class _Product(torch.autograd.Function):
    """Product x W^T in the dtype of W, for x of any dtype; saves only x and W for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return nn.functional.linear(x.to(weight.dtype), weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        grad = grads[0].flatten(0, -2)
        return (grads[0] @ weight).to(x.dtype), grad.T @ x.flatten(0, -2).to(weight.dtype)


class _Rescaled(torch.autograd.Function):
    """DoRA update (m - 1) y + s m B h; the backward pass computes B h again to save memory.

    y (..., out) is the base layer's output without bias, and h (..., r) is A x. m (out,) is the DoRA
    magnitude divided by the weight norm, and s is the LoRA scale.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, h: Tensor, b: Tensor, m: Tensor, s: float) -> Tensor:
        ctx.save_for_backward(y, h, b, m)
        ctx.s = s
        return (m - 1) * y + m * nn.functional.linear(h, b) * s

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (y, h, b, m), (grad,) = ctx.saved_tensors, grads
        scaled = grad * ctx.s
        rows = (grad * y).flatten(0, -2).sum(0) + (scaled * nn.functional.linear(h, b)).flatten(0, -2).sum(0)
        inner = (scaled * m).flatten(0, -2)
        return (
            ((m - 1) * grad).to(y.dtype),
            (inner @ b).view_as(h),
            inner.T @ h.flatten(0, -2),
            rows,
            None,
        )


class LowPrecision:
    """Mixin that makes a peft LoRA layer compute its update in the dtype of the activations.

    peft casts the input to float32, the dtype of the factors. It computes, scales and adds the update in
    float32. For LoRA, this takes 28 bytes of memory traffic per output element. The mixin adds the update to
    the output of the base layer in one matrix product, which takes 4 bytes per output element. This product
    sums in float32. The gradients of the factors are also summed in float32.

    For the backward pass, a LoRA layer saves its input and A x (..., r). A DoRA layer also saves the output
    of the base layer.
    """

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Apply the base layer and the adapter to x (..., in); the result (..., out) has the dtype of x."""
        if self.disable_adapters or self.merged or x.dtype not in HALF:
            return super().forward(x, *args, **kwargs)  # type: ignore[misc]
        return self.add_update(x, self.base_layer(x, *args, **kwargs))

    def add_update(self: Any, x: Tensor, out: Tensor) -> Tensor:
        """Return the output of the base layer plus the update, in half precision.

        Args:
            x: input of the layer, in half precision.
            out: output of the base layer for `x`.
        """
        a, b, s = self.lora_A[ADAPTER].weight, self.lora_B[ADAPTER].weight, self.scaling[ADAPTER]
        if ADAPTER not in self.lora_variant:
            return _Sum.apply(out, x, a, b, s)
        base = self.base_layer
        with torch.no_grad():
            norm = row_norm(quantize.dense(base).float(), a, b, s)
        ratio = self.lora_magnitude_vector[ADAPTER].weight / norm
        return _RescaledSum.apply(out, x, a, b, ratio, base.bias, s)


@lru_cache
def _low_precision_class(kind: type) -> type:
    return type(f"LowPrecision{kind.__name__}", (LowPrecision, kind), {})


def use_low_precision(denoiser: nn.Module) -> None:
    """Make every LoRA and DoRA linear layer compute its update in the dtype of the activations."""
    from peft.tuners.lora import LoraLayer

    for layer in denoiser.modules():
        if isinstance(layer, LoraLayer) and type(layer.lora_A[ADAPTER]) is nn.Linear:
            layer.__class__ = _low_precision_class(type(layer))


def _float32_product(x: Tensor, y: Tensor) -> Tensor:
    """Return the matrix product x y. It is accumulated and returned in float32, even for half precision."""
    if x.device.type in WIDENING and x.dtype in HALF:
        return torch.mm(x, y, out_dtype=torch.float32)
    wide = torch.promote_types(x.dtype, torch.float32)
    return x.to(wide) @ y.to(wide)


class _Sum(torch.autograd.Function):
    """Autograd function for the LoRA output y + s B A x. A and B are float32.

    Matrix products are computed in the dtype of y and x. The gradients of A and B are summed in float32.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, a: Tensor, b: Tensor, s: float) -> Tensor:
        h = nn.functional.linear(x, a.to(x.dtype))
        ctx.save_for_backward(x, h, a, b)
        ctx.s = s
        rows = (s * b).to(y.dtype)
        return torch.addmm(y.flatten(0, -2), h.flatten(0, -2), rows.T).view_as(y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x, h, a, b), grad = ctx.saved_tensors, grads[0].flatten(0, -2)
        inner = grad @ (ctx.s * b).to(grad.dtype)
        return (
            grads[0],
            (inner @ a.to(grad.dtype)).view_as(x),
            _float32_product(inner.T, x.flatten(0, -2)),
            ctx.s * _float32_product(grad.T, h.flatten(0, -2)),
            None,
        )


class _RescaledSum(torch.autograd.Function):
    """DoRA output m (y - bias + s B A x) + bias in the dtype of y and x.

    The term m y + (1 - m) bias is rounded to this dtype before the term s m B A x is added.

    y (..., out) is the base layer's output, which includes the bias. m (out,) is the DoRA magnitude divided
    by the weight norm, and s is the LoRA scale. A, B and m are float32.
    """

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, x: Tensor, a: Tensor, b: Tensor, m: Tensor, bias: Tensor | None, s: float
    ) -> Tensor:
        h = nn.functional.linear(x, a.to(x.dtype))
        ctx.save_for_backward(y, x, h, a, b, m, bias)
        ctx.s = s
        rows = (s * m[:, None] * b).to(y.dtype)
        scaled = y * m.to(y.dtype) if bias is None else torch.addcmul(bias * (1 - m), y, m).to(y.dtype)
        return torch.addmm(scaled.flatten(0, -2), h.flatten(0, -2), rows.T).view_as(y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (y, x, h, a, b, m, bias), grad = ctx.saved_tensors, grads[0].flatten(0, -2)
        inner = grad @ (ctx.s * m[:, None] * b).to(grad.dtype)
        outer = ctx.s * _float32_product(grad.T, h.flatten(0, -2))
        sums = (grad * y.flatten(0, -2)).sum(0, dtype=m.dtype) + (outer * b).sum(1)
        if bias is not None:
            sums -= bias * grad.sum(0, dtype=m.dtype)
        return (
            grads[0] * m.to(grad.dtype),
            (inner @ a.to(grad.dtype)).view_as(x),
            _float32_product(inner.T, x.flatten(0, -2)),
            m[:, None] * outer,
            sums,
            None,
            None,
        )


def row_norm(weight: Tensor, a: Tensor, b: Tensor, s: float) -> Tensor:
    """Return the L2 norms (out,) of the rows of W + s B A in float32, without computing B A.

    The arguments are W (out, in), A (r, in), B (out, r) and the scale s.
    """
    w, a, b = weight, a.float(), b.float()
    squared = torch.linalg.vector_norm(w, dim=1, dtype=torch.float32) ** 2
    cross = ((w @ a.T.to(w.dtype)).float() * b).sum(1)
    return (squared + 2 * s * cross + s * s * ((b @ (a @ a.T)) * b).sum(1)).clamp(min=0).sqrt()
