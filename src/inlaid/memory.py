"""Memory savings and compilation: gradient checkpointing, quantized base, optimizer state offload.

All functions work on any network, independent of family. They use the network's lists of repeated blocks,
which hold nearly all of its weights and time. Only linear layers in these blocks are quantized: norms,
embeddings and the last projection are small and sensitive.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recomputed

from inlaid import config as recipe

CASTS = {"float8": torch.float8_e4m3fn, "bfloat16": torch.bfloat16}
"""Storage types of `memory.layerwise_casting`."""

COMPILED_SHAPES = 64
"""Maximum number of compiled graphs per block; torch's limit of 8 would stop a run with many buckets."""

GROUP = 64
"""Number of adjacent weights that share a scale in `int4`."""


def blocks(denoiser: nn.Module) -> dict[str, nn.Module]:
    """Return the repeated blocks by name, in order: entries of module lists at the root of the network."""
    return {
        f"{name}.{i}": block
        for name, child in denoiser.named_children()
        if isinstance(child, nn.ModuleList)
        for i, block in enumerate(child)
        if any(True for _ in block.children())
    }


def linears(denoiser: nn.Module) -> dict[str, nn.Linear]:
    """Return the linear layers of the blocks by name, except those that compute the scale of a norm."""
    return {
        f"{name}.{inner}": layer
        for name, block in blocks(denoiser).items()
        for inner, layer in block.named_modules()
        if isinstance(layer, nn.Linear) and "norm" not in inner
    }


def problems(config: recipe.Config, device: torch.device, precision: torch.dtype) -> list[str]:
    """Return messages about settings that this device does not support; empty if all are supported."""
    memory, out = config.memory, []
    if memory.offload_optimizer and device.type != "cuda":
        out.append(
            f"memory.offload_optimizer: has no effect on {device.type}, it needs a CUDA device; remove it"
        )
    if memory.quantize in ("int8", "float8", "nf4") and device.type not in ("cpu", "cuda"):
        out.append(f"memory.quantize: {memory.quantize} has no kernels for {device.type}; use int4")
    if memory.layerwise_casting == "float8" and device.type not in ("cpu", "cuda"):
        out.append(f"memory.layerwise_casting: {device.type} has no float8; use bfloat16")
    if memory.layerwise_casting == "bfloat16" and precision is torch.bfloat16:
        out.append("memory.layerwise_casting: the base model is already bfloat16; use float8, or remove it")
    if config.runtime.compile and device.type not in ("cpu", "cuda"):
        out.append(f"runtime.compile: torch cannot compile a training step for {device.type}; remove it")
    return out


# --- activations --------------------------------------------------------------------------------------------


def checkpoint(denoiser: nn.Module, every: bool | int) -> None:
    """Enable gradient checkpointing for all blocks (True), or for every n-th block.

    Checkpointed blocks store only their input. The others store all activations and need no extra time.
    Gradients are the same.
    """
    known = {id(block): i for i, block in enumerate(blocks(denoiser).values())}

    def run(block: nn.Module, *args: Any) -> Any:
        if known.get(id(block), 0) % int(every):
            return block(*args)
        return recomputed(block, *args, use_reentrant=False)

    denoiser.enable_gradient_checkpointing(run)  # type: ignore[operator]


# --- frozen weights -----------------------------------------------------------------------------------------


def shrink(section: recipe.Memory, denoiser: nn.Module, device: torch.device, compute: torch.dtype) -> None:
    """Quantize or cast a frozen network and move it to its device; attach adapters afterwards.

    Args:
        section: `memory` section of the recipe.
        denoiser: frozen network, changed in place block by block, so that a network that fits only when
            quantized never has to fit unquantized.
        device: target device.
        compute: dtype of the activations.
    """
    denoiser.requires_grad_(False)
    if section.layerwise_casting is not None:
        denoiser.enable_layerwise_casting(CASTS[section.layerwise_casting], compute)  # type: ignore[operator]
    if section.quantize is not None:
        chosen = linears(denoiser)
        assert chosen, "a network without blocks of linear layers"
        make = {"nf4": _nf4, "int4": _int4}.get(section.quantize)
        for name, layer in chosen.items():
            if make is None:
                _torchao(section.quantize, layer.to(device))
            else:
                denoiser.set_submodule(name, make(layer.to(device)))
    denoiser.to(device)


def dense(layer: nn.Module) -> Tensor:
    """Return the weight of a linear layer dequantized; without a copy if it is not quantized."""
    weight: Any = layer.weight
    if isinstance(layer, Int4Linear):
        return layer.dequantize()
    if type(weight) is nn.Parameter or type(weight) is Tensor:
        return weight
    if getattr(weight, "quant_state", None) is not None:
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(weight.data, weight.quant_state)
    return weight.dequantize()


def _torchao(scheme: str, layer: nn.Linear) -> None:
    """Quantize weights only, one scale per row; matrix products use the dtype of the activations."""
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_

    quantize_(layer, {"int8": Int8WeightOnlyConfig, "float8": Float8WeightOnlyConfig}[scheme]())


def _nf4(layer: nn.Linear) -> nn.Module:
    """Return the layer in 4-bit NormalFloat (QLoRA, Dettmers et al. 2023), one scale per 64 weights."""
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
    """Frozen linear layer with 4 bits per weight, and scale and offset per group of up to 64 weights.

    torchao's packed int4 has no gradient, and its unpacked int4 uses as much memory as int8. This layer
    consists of plain tensors: it runs on every device, compiles, and saves nothing dense for the backward
    pass.
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
        """Packed weight; peft calls `dequantize()` of layers with this attribute."""
        return self.weight

    def dequantize(self) -> Tensor:
        """Return the weight (out, in) in the dtype of its scales."""
        return _unpack(self.weight, self.scale, self.low)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer: (..., in) to (..., out)."""
        out = _Int4Product.apply(x, self.weight, self.scale.to(x.dtype), self.low.to(x.dtype))
        return out if self.bias is None else out + self.bias.to(x.dtype)


def _unpack(codes: Tensor, scale: Tensor, low: Tensor) -> Tensor:
    values = torch.stack((codes >> 4, codes & 15), -1).view(scale.shape[0], scale.shape[1], -1)
    return (values * scale + low).flatten(1)


class _Int4Product(torch.autograd.Function):
    """Product x W^T that saves the packed weight for the backward pass and unpacks it again there."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, codes: Tensor, scale: Tensor, low: Tensor) -> Tensor:
        ctx.save_for_backward(codes, scale, low)
        return F.linear(x, _unpack(codes, scale, low))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return grads[0] @ _unpack(*ctx.saved_tensors), None, None, None


def _int4(layer: nn.Linear) -> nn.Module:
    return Int4Linear(layer)


# --- optimizer ----------------------------------------------------------------------------------------------


class Offloaded(torch.optim.Optimizer):
    """Wrapper of any optimizer that steps on copies in CPU memory and keeps the optimizer state there.

    torchao's `CPUOffloadOptimizer` copies gradients during the backward pass, before they are averaged over
    processes and clipped. This class does in `step` what the optimizer would do on the device, and its state
    is that of the wrapped optimizer.
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], make: Callable[[list[nn.Parameter]], torch.optim.Optimizer]
    ) -> None:
        self.there = list(parameters)
        pin = torch.cuda.is_available()
        self.here = [nn.Parameter(torch.empty_like(p, device="cpu", pin_memory=pin)) for p in self.there]
        self.inner = make(self.here)
        self._fetch()

    @torch.no_grad()
    def _fetch(self) -> None:
        for here, there in zip(self.here, self.there, strict=True):
            here.copy_(there)

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """Parameter groups of the inner optimizer, so that learning rates can be set."""
        return self.inner.param_groups

    @property
    def state(self) -> Mapping[Any, Any]:  # type: ignore[override]
        """State of the inner optimizer."""
        return self.inner.state

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Copy gradients to the CPU, step, and copy the weights back."""
        for here, there in zip(self.here, self.there, strict=True):
            if there.grad is None:
                here.grad = None
                continue
            here.grad = (
                torch.empty_like(here, pin_memory=here.is_pinned()) if here.grad is None else here.grad
            )
            here.grad.copy_(there.grad, non_blocking=True)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.inner.step()
        for here, there in zip(self.here, self.there, strict=True):
            there.copy_(here, non_blocking=True)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Free the gradients on the device; the CPU copies are overwritten in the next step."""
        for there in self.there:
            there.grad = None

    def state_dict(self) -> dict[str, Any]:
        """Return the state dict of the inner optimizer."""
        return self.inner.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state of the inner optimizer; call it after the parameters are restored."""
        self.inner.load_state_dict(state_dict)
        self._fetch()


# --- compilation --------------------------------------------------------------------------------------------


def compile_blocks(denoiser: nn.Module, backend: str = "inductor") -> None:
    """Compile each repeated block as one full graph; a graph break is an error.

    The first shape is compiled statically, the second with dynamic sizes, which then serve all others: a run
    with buckets compiles twice, and once more each for the validation loss and for samples.
    """
    import torch._dynamo.config as dynamo

    dynamo.capture_dynamic_output_shape_ops = True  # Mochi picks real text tokens by `nonzero`
    dynamo.recompile_limit = max(dynamo.recompile_limit, COMPILED_SHAPES)
    dynamo.accumulated_recompile_limit = max(dynamo.accumulated_recompile_limit, 4 * COMPILED_SHAPES)
    for block in blocks(denoiser).values():
        block.compile(fullgraph=True, backend=backend)
