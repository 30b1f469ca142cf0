"""Quantization and layerwise casting of a frozen base model."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Sequence
from copy import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from inlaid import config as recipe

CASTS = {"float8": torch.float8_e4m3fn, "bfloat16": torch.bfloat16}
"""Storage dtype for each value of `memory.layerwise_casting`."""

GROUP = 64
"""Largest number of adjacent weights that share a scale and an offset in `int4` quantization."""


QUANTIZED_BYTES = {"int8": 1.0, "float8": 1.0, "int4": 0.5, "nf4": 0.5}
"""Bytes per weight of a quantized layer, without scales."""


def blocks(denoiser: nn.Module) -> dict[str, nn.Module]:
    """Return the repeated transformer blocks of a network by name, in order.

    They are the entries of all module lists that are direct children of the network. Entries without
    submodules are omitted.
    """
    return {
        f"{name}.{i}": block
        for name, child in denoiser.named_children()
        if isinstance(child, nn.ModuleList)
        for i, block in enumerate(child)
        if any(True for _ in block.children())
    }


def linears(denoiser: nn.Module) -> dict[str, nn.Linear]:
    """Return the linear layers in the repeated blocks of a network, by layer name.

    Layers with `norm` in the name are omitted, because they compute the modulation.
    """
    return {
        f"{name}.{inner}": layer
        for name, block in blocks(denoiser).items()
        for inner, layer in block.named_modules()
        if isinstance(layer, nn.Linear) and "norm" not in inner
    }


def shrink_weights(
    section: recipe.Memory,
    denoiser: nn.Module,
    device: torch.device,
    compute: torch.dtype,
    *,
    host: Collection[str] = (),
) -> None:
    """Quantize or cast a network, and move it to `device`. Adapters must be attached afterwards.

    Args:
        section: `memory` section of the recipe.
        denoiser: network, which is frozen and changed in place. Layers are moved and quantized one by one, so
            the unquantized network does not have to fit into device memory.
        device: target device.
        compute: dtype of the activations.
        host: names of the blocks that stay in host memory. Their layers are quantized on `device` too.
    """
    denoiser.requires_grad_(False)
    if section.layerwise_casting is not None:
        denoiser.enable_layerwise_casting(CASTS[section.layerwise_casting], compute)  # type: ignore[operator]
    if section.quantize is not None:
        chosen = linears(denoiser)
        assert chosen, "a network without blocks of linear layers"
        make = {"nf4": _nf4, "int4": _int4}.get(section.quantize)
        for name, layer in chosen.items():
            layer.to(device)
            if make is None:
                _torchao(section.quantize, layer)
            else:
                layer = make(layer)
                denoiser.set_submodule(name, layer)
            if any(name.startswith(f"{block}.") for block in host):
                layer.to("cpu")
    kept = {name: denoiser.get_submodule(name) for name in host}
    for name in kept:
        denoiser.set_submodule(name, nn.Identity())
    denoiser.to(device)
    for name, block in kept.items():
        denoiser.set_submodule(name, block)


def stored_bytes(section: recipe.Memory, denoiser: nn.Module, precision: torch.dtype) -> dict[str, float]:
    """Return the bytes of each parameter of a network by name, as stored after `shrink_weights`.

    Args:
        section: `memory` section of the recipe.
        denoiser: network with or without adapters, not quantized; may be on the meta device.
        precision: dtype of the weights that are neither quantized nor cast.
    """
    out = {name: float(p.numel() * precision.itemsize) for name, p in denoiser.named_parameters()}
    for layer in _small_layers(section, denoiser):
        name = next((n for n in (f"{layer}.weight", f"{layer}.base_layer.weight") if n in out), None)
        if name is None:
            continue
        count = out[name] / precision.itemsize
        if section.quantize:
            scales = {"int4": 2 * precision.itemsize / GROUP, "nf4": 4 / 64}.get(section.quantize, 0.0)
            out[name] = count * (QUANTIZED_BYTES[section.quantize] + scales)
        elif section.layerwise_casting:
            out[name] = float(count * CASTS[section.layerwise_casting].itemsize)
    return out


def _small_layers(section: recipe.Memory, denoiser: nn.Module) -> list[str]:
    """Return the names of the layers whose weights are quantized or are stored in a smaller dtype."""
    if section.quantize:
        return [n.removesuffix(".base_layer") for n in linears(denoiser) if "lora_" not in n]
    if not section.layerwise_casting:
        return []
    skipped = getattr(denoiser, "_skip_layerwise_casting_patterns", None) or ()
    layers = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding)
    found = [n for n, m in denoiser.named_modules() if isinstance(m, layers)]
    return [n.removesuffix(".base_layer") for n in found if not any(re.search(s, n) for s in skipped)]


def dense(layer: nn.Module) -> Tensor:
    """Return the weight of a linear layer, dequantized if the layer is quantized."""
    weight: Any = layer.weight
    if isinstance(layer, Int4Linear):
        return layer.dequantize()
    if type(weight) is nn.Parameter or type(weight) is Tensor:
        return weight
    if getattr(weight, "quant_state", None) is not None:
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(weight.data, weight.quant_state)
    return weight.dequantize()


def parts(weight: Tensor) -> tuple[list[Tensor], Callable[[Sequence[Tensor]], Tensor]]:
    """Return the plain tensors of which a weight consists, and a function that assembles the weight again.

    A quantized weight consists of codes and scales; an unquantized weight is a single tensor.

    Args:
        weight: frozen weight of a layer, quantized or not.

    Returns:
        The tensors, and a function of equally many tensors with the same shapes and dtypes. This function
        returns a weight that shares their memory; it is a frozen parameter if `weight` is a parameter.
    """
    state: Any = getattr(weight, "quant_state", None)
    if state is not None:  # bitsandbytes
        scales, rebuild_state = _state_parts(state)
        kind, attributes = type(weight), dict(vars(weight))

        def packed(tensors: Sequence[Tensor]) -> Tensor:
            out = torch.Tensor._make_subclass(kind, tensors[0], False)
            vars(out).update(attributes, quant_state=rebuild_state(tensors[1:]))
            return out

        return [weight.detach().as_subclass(Tensor), *scales], packed
    frozen = isinstance(weight, nn.Parameter)
    if is_traceable_wrapper_subclass(weight):  # torchao
        names, context = weight.__tensor_flatten__()
        inner = [parts(getattr(weight, name)) for name in names]
        cls: Any = type(weight)
        size, stride = weight.size(), weight.stride()

        def wrapped(tensors: Sequence[Tensor]) -> Tensor:
            rest, built = list(tensors), {}
            for name, (own, build) in zip(names, inner, strict=True):
                built[name], rest = build(rest[: len(own)]), rest[len(own) :]
            out = cls.__tensor_unflatten__(built, context, size, stride)
            return nn.Parameter(out, requires_grad=False) if frozen else out

        return [tensor for own, _ in inner for tensor in own], wrapped
    if frozen:
        return [weight.detach()], lambda tensors: nn.Parameter(tensors[0], requires_grad=False)
    return [weight], lambda tensors: tensors[0]


def _state_parts(state: Any) -> tuple[list[Tensor], Callable[[Sequence[Tensor]], Any]]:
    """Return the tensors of a bitsandbytes quantization state, and a function that assembles it again.

    The scales may be quantized too; then their state is part of the state.
    """
    names = [name for name in ("absmax", "code", "offset") if isinstance(getattr(state, name), Tensor)]
    nested, rebuild = _state_parts(state.state2) if state.nested else ([], None)

    def build(tensors: Sequence[Tensor]) -> Any:
        out = copy(state)
        for name, tensor in zip(names, tensors, strict=False):
            setattr(out, name, tensor)
        if rebuild:
            out.state2 = rebuild(tensors[len(names) :])
        return out

    return [*(getattr(state, name) for name in names), *nested], build


def _torchao(scheme: str, layer: nn.Linear) -> None:
    """Quantize the weight of a layer in place with torchao, to int8 or float8 with one scale per row.

    Matrix products are computed in the dtype of the activations.
    """
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_

    quantize_(layer, {"int8": Int8WeightOnlyConfig, "float8": Float8WeightOnlyConfig}[scheme]())


def _nf4(layer: nn.Linear) -> nn.Module:
    """Return the layer quantized by bitsandbytes to 4-bit NormalFloat, with one scale per 64 weights.

    The format is from QLoRA (Dettmers et al. 2023).
    """
    from bitsandbytes.nn import Linear4bit, Params4bit

    own: dict[str, Any] = {"compute_dtype": layer.weight.dtype, "quant_type": "nf4"}
    with torch.device("meta"):
        out = Linear4bit(layer.in_features, layer.out_features, bias=layer.bias is not None, **own)
    make: Any = Params4bit
    out.weight = make(layer.weight.data, requires_grad=False, quant_type="nf4")
    out.bias = layer.bias  # type: ignore[assignment]
    out.support_avx512bf16_for_cpu = False  # else validation repacks the weight, without a gradient
    return out.to(layer.weight.device)


class Int4Linear(nn.Linear):
    """Frozen linear layer with 4-bit weights; each group of up to 64 weights has a scale and an offset.

    torchao's packed int4 has no backward pass, and its unpacked int4 needs as much memory as int8. This layer
    consists of plain tensors, so it runs on every device and can be compiled. It saves no dequantized weight
    for the backward pass.
    """

    def __init__(self, layer: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        group = math.gcd(layer.in_features, GROUP)
        w = layer.weight.detach().float().view(layer.out_features, -1, group)
        low, high = w.amin(-1, keepdim=True), w.amax(-1, keepdim=True)
        scale = ((high - low) / 15).clamp_min(1e-12)
        codes = ((w - low) / scale).round().clamp(0, 15).to(torch.uint8).flatten()
        self.weight = nn.Parameter(codes[::2] << 4 | codes[1::2], requires_grad=False)
        dtype = layer.weight.dtype
        self.scale, self.low = (nn.Parameter(x.to(dtype), requires_grad=False) for x in (scale, low))
        self.bias = layer.bias

    @property
    def W_q(self) -> Tensor:  # noqa: N802
        """Packed 4-bit weight.

        peft calls `dequantize()` on layers that have this attribute, as HQQ layers do.
        """
        return self.weight

    def dequantize(self) -> Tensor:
        """Return the dequantized weight (out, in), in the dtype of the scales."""
        return _unpack(self.weight, self.scale, self.low)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to `x` (..., in); the result is (..., out)."""
        out = _Int4Product.apply(x, self.weight, self.scale.to(x.dtype), self.low.to(x.dtype))
        return out if self.bias is None else out + self.bias.to(x.dtype)


def _unpack(codes: Tensor, scale: Tensor, low: Tensor) -> Tensor:
    values = torch.stack((codes >> 4, codes & 15), -1).view(scale.shape[0], scale.shape[1], -1)
    return (values * scale + low).flatten(1)


class _Int4Product(torch.autograd.Function):
    """Matrix product x W^T with a packed 4-bit weight.

    Only the packed weight is saved for the backward pass, where it is unpacked again.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, codes: Tensor, scale: Tensor, low: Tensor) -> Tensor:
        ctx.save_for_backward(codes, scale, low)
        return F.linear(x, _unpack(codes, scale, low))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return grads[0] @ _unpack(*ctx.saved_tensors), None, None, None


def _int4(layer: nn.Linear) -> nn.Module:
    return Int4Linear(layer)
