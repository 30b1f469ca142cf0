"""What is traded for memory and speed: recomputed blocks, a small base, offloaded state, compiled blocks.

Functions on a network that know no family. What they share is the network's lists of repeated blocks, where
nearly all of its weights and time are. Only linear layers in there are made small: norms, embeddings and the
last projection are few, and sensitive.
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
"""Types of `memory.layerwise_casting`."""

COMPILED_SHAPES = 64
"""Graphs that one block may be compiled to; torch's own limit of 8 would stop a run with many buckets."""

GROUP = 64
"""Neighbouring weights that share a scale in `int4`."""


def blocks(denoiser: nn.Module) -> dict[str, nn.Module]:
    """The repeated blocks by name, in order: all that is in a list of modules at the network's root."""
    return {
        f"{name}.{i}": block
        for name, child in denoiser.named_children()
        if isinstance(child, nn.ModuleList)
        for i, block in enumerate(child)
        if any(True for _ in block.children())
    }


def linears(denoiser: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers of the blocks by name, without those that make a norm's scale."""
    return {
        f"{name}.{inner}": layer
        for name, block in blocks(denoiser).items()
        for inner, layer in block.named_modules()
        if isinstance(layer, nn.Linear) and "norm" not in inner
    }


def problems(config: recipe.Config, device: torch.device, precision: torch.dtype) -> list[str]:
    """Sentences about what a recipe asks that this device does not do; empty when all is well."""
    memory, out = config.memory, []
    if memory.offload_optimizer and device.type != "cuda":
        out.append(
            f"memory.offload_optimizer: on {device.type} the state is in the computer's memory already"
        )
    if memory.quantize in ("int8", "float8", "nf4") and device.type not in ("cpu", "cuda"):
        out.append(f"memory.quantize: {memory.quantize} has no kernels for {device.type}; int4 needs none")
    if memory.layerwise_casting == "float8" and device.type not in ("cpu", "cuda"):
        out.append(f"memory.layerwise_casting: {device.type} has no float8; use bfloat16")
    if memory.layerwise_casting == "bfloat16" and precision is torch.bfloat16:
        out.append("memory.layerwise_casting: the base is bfloat16 already; use float8, or leave it out")
    if config.runtime.compile and device.type not in ("cpu", "cuda"):
        out.append(f"runtime.compile: torch does not compile a training step for {device.type}; leave it out")
    return out


# --- activations --------------------------------------------------------------------------------------------


def checkpoint(denoiser: nn.Module, every: bool | int) -> None:
    """Recomputes activations of all blocks (True), or of every n-th one, in the backward pass.

    The blocks that are recomputed keep only their input; the others keep everything, and cost no time.
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
    """Makes a frozen network small and moves it to its device; adapters are attached afterwards.

    Args:
        section: of the recipe.
        denoiser: all of it frozen; changed in place, block by block, so that a network that fits only when it
            is small never has to fit before.
        device: where it is going.
        compute: type of the activations.
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
    """The weight of a linear layer as numbers, whatever it is stored in; free where it is plain already."""
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
    """Weight-only, one scale per row: products in the type of the activations, and right gradients."""
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_

    quantize_(layer, {"int8": Int8WeightOnlyConfig, "float8": Float8WeightOnlyConfig}[scheme]())


def _nf4(layer: nn.Linear) -> nn.Module:
    """QLoRA's 4-bit normal float (Dettmers et al. 2023) with one scale per 64 weights."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    own: dict[str, Any] = {"compute_dtype": layer.weight.dtype, "quant_type": "nf4"}
    with torch.device("meta"):
        out = Linear4bit(layer.in_features, layer.out_features, bias=layer.bias is not None, **own)
    make: Any = Params4bit
    out.weight = make(layer.weight.data, requires_grad=False, quant_type="nf4")
    out.bias = layer.bias  # type: ignore[assignment]
    out.support_avx512bf16_for_cpu = False  # or the held-out loss repacks it for good, without a gradient
    return out.to(layer.weight.device)


class Int4Linear(nn.Linear):
    """A frozen linear layer in 4 bits a weight, with a scale and an offset for each group of up to 64.

    torchao's packed int4 has no gradient, and its unpacked one takes as much as int8. This one is plain
    tensors: it runs on every device, compiles, and keeps nothing dense for the backward pass.
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
        """The packed weight; peft asks layers that have this for their `dequantize()`."""
        return self.weight

    def dequantize(self) -> Tensor:
        """The weight (out, in), in the type of its scales."""
        return _unpack(self.weight, self.scale, self.low)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        out = _Int4Product.apply(x, self.weight, self.scale.to(x.dtype), self.low.to(x.dtype))
        return out if self.bias is None else out + self.bias.to(x.dtype)


def _unpack(codes: Tensor, scale: Tensor, low: Tensor) -> Tensor:
    values = torch.stack((codes >> 4, codes & 15), -1).view(scale.shape[0], scale.shape[1], -1)
    return (values * scale + low).flatten(1)


class _Int4Product(torch.autograd.Function):
    """x W^T that saves the packed weight for the backward pass, and unpacks it again there."""

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
    """Any optimizer, stepping on copies in the computer's memory, where its state then is.

    torchao has one too (`CPUOffloadOptimizer`), but it copies gradients while the backward pass runs, before
    they are averaged over processes and clipped. This one does at `step` what the optimizer would have done
    on the device, and its state is that optimizer's own.
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
        """The inner optimizer's, so that their rates can be set."""
        return self.inner.param_groups

    @property
    def state(self) -> Mapping[Any, Any]:  # type: ignore[override]
        """The inner optimizer's."""
        return self.inner.state

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Gradients down, a step, weights up."""
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
        """Frees the device's gradients; the copies are overwritten."""
        for there in self.there:
            there.grad = None

    def state_dict(self) -> dict[str, Any]:
        """As the inner optimizer alone would have it."""
        return self.inner.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """After the parameters themselves are restored."""
        self.inner.load_state_dict(state_dict)
        self._fetch()


# --- compilation --------------------------------------------------------------------------------------------


def compile_blocks(denoiser: nn.Module, backend: str = "inductor") -> None:
    """Compiles each repeated block whole; a block that would not be one graph stops.

    The first shape is compiled for itself and the second with its sizes left open, which then serves all
    others: a run with buckets compiles twice, and once more for the held-out loss and for samples.
    """
    import torch._dynamo.config as dynamo

    dynamo.capture_dynamic_output_shape_ops = True  # Mochi picks real text tokens by `nonzero`
    dynamo.recompile_limit = max(dynamo.recompile_limit, COMPILED_SHAPES)
    dynamo.accumulated_recompile_limit = max(dynamo.accumulated_recompile_limit, 4 * COMPILED_SHAPES)
    for block in blocks(denoiser).values():
        block.compile(fullgraph=True, backend=backend)
