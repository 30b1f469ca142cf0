"""What a run will cost, before anything is downloaded or loaded: parameters, memory, disk and time.

No rules of thumb: the network is built on the meta device, the tuner is attached, and one forward pass runs
on shapes alone. What autograd would keep for the backward pass is counted, and so are the operations. The
speed of the device is measured, with matrix products.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from inlay import config as recipe
from inlay import tuners
from inlay.families import Family

STATE_BYTES = {"adamw": 8.0, "adamw8bit": 2.06, "prodigy": 16.0}
"""Bytes of optimizer state per trained weight: two moments, in 8 bits with their scales; Prodigy has four."""

USED = (0.25, 0.7)
"""Share of the speed of large matrix products that training reaches: much overhead, or very good kernels."""

SMALL = 0.05
"""Seconds per step below which overhead decides and an estimate would mislead."""

WORDS_TO_TOKENS = 1.5
TEXT_WIDTHS = ("text_dim", "text_embed_dim", "cross_attention_dim", "joint_attention_dim")
"""Keys of a network's configuration that hold the width of its text input."""


@dataclass(frozen=True)
class Counts:
    """Of one forward pass: bytes kept for the backward pass, and floating-point operations."""

    kept: int
    largest: int
    """Bytes of the largest single tensor among them."""
    linear: float
    attention: float
    """Between all pairs of tokens: quadratic in their number."""
    across: float
    """From tokens to a text of fixed length."""


class _Attention(torch.autograd.Function):
    """Stands in for fused attention: keeps queries, keys, values and result, never the matrix of weights."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, out)
        return out


class _Counter(TorchFunctionMode):
    """Counts what a forward pass keeps; of a `segment` its inputs, and once the most that one holds."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        super().__init__()
        self.known = {p.untyped_storage()._cdata for p in parameters}
        self.kept: dict[int, tuple[int, Any]] = {}
        self.inside = 0
        self.largest = 0
        self.attention = self.across = 0.0

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            named = dict(zip(("query", "key", "value"), args, strict=False)) | dict(kwargs or {})
            query, key, value = (named[n] for n in ("query", "key", "value"))
            products = 4.0 * query.numel() * key.shape[-2]
            if query.shape[-2] == key.shape[-2]:
                self.attention += products
            else:
                self.across += products
            return _Attention.apply(query, key, value)
        return func(*args, **(kwargs or {}))

    def keep(self, tensor: Tensor) -> Tensor:
        """Notes a tensor's storage, once."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self.known:
            self.kept[storage._cdata] = (storage.nbytes(), storage)
            self.largest = max(self.largest, storage.nbytes())
        return tensor

    def segment(self, module: Callable[..., Any], *args: Any) -> Any:
        """Runs a checkpointed segment."""
        outside, self.kept = self.kept, {}
        out = module(*args)
        self.inside = max(self.inside, sum(size for size, _ in self.kept.values()))
        self.kept = outside
        for arg in args:
            if isinstance(arg, Tensor):
                self.keep(arg)
        return out


def count(
    family: Family, denoiser: nn.Module, shape: tuple[int, int, int], batch: int, *, checkpointing: bool
) -> Counts:
    """Runs one forward pass of a network on the meta device and counts.

    Args:
        family: of the network.
        denoiser: on the meta device, with its tuner attached.
        shape: frames, height, width.
        batch: samples.
        checkpointing: recompute blocks in the backward pass.
    """
    counter = _Counter(list(denoiser.parameters()))
    if checkpointing:
        denoiser.enable_gradient_checkpointing(counter.segment)  # type: ignore[operator]
    denoiser.train()
    with torch.device("meta"):
        clip = {name: torch.empty(batch, *each) for name, each in family.shapes(*shape).items()}
        text = family.collate([{"text": torch.empty(family.text_length, text_width(denoiser))}] * batch)
        times = torch.empty(batch)
    flops = FlopCounterMode(display=False)
    with torch.autograd.graph.saved_tensors_hooks(counter.keep, lambda t: t), counter, flops:
        family.predict(denoiser, clip.pop("latents"), times, {**text, **clip})
    kept = sum(size for size, _ in counter.kept.values()) + counter.inside
    return Counts(kept, counter.largest, float(flops.get_total_flops()), counter.attention, counter.across)


def text_width(denoiser: nn.Module) -> int:
    """Width of the text that a network takes, by its configuration; 4096 (T5-XXL) where it does not say."""
    config: Any = getattr(denoiser, "config", {})
    return next((int(config[k]) for k in TEXT_WIDTHS if config.get(k)), 4096)


@dataclass(frozen=True)
class Estimate:
    """What a run will cost on this machine, per process."""

    parameters: int
    trained: int
    memory: dict[str, int]
    """Bytes by purpose, while training."""
    cache: dict[str, int]
    """Bytes on disk: clips and captions."""
    flops: float
    """Floating-point operations of one optimizer step."""
    seconds: tuple[float, float] | None
    """Shortest and longest time of one optimizer step."""
    device: str
    capacity: int
    """Bytes of memory that the device has."""
    precision: str
    how: tuple[str, ...]
    """Sentences that say how the numbers came about, and why one is missing."""

    @property
    def peak(self) -> int:
        """Bytes of memory at the worst moment of a step."""
        return sum(self.memory.values())


def estimate(
    family: Family,
    config: recipe.Config,
    shapes: Mapping[tuple[int, int, int], int],
    windows: Mapping[tuple[int, int, int], int],
    captions: Sequence[str],
    *,
    device: torch.device,
    precision: torch.dtype,
    optimizer: str,
) -> Estimate:
    """Estimates a run.

    Args:
        family: built, nothing loaded.
        config: the recipe.
        shapes: batches per epoch of each (frames, height, width).
        windows: items to cache of each.
        captions: those that are cached.
        device: where it will run.
        precision: of the frozen base.
        optimizer: its name, after what the device allows.

    Raises:
        ValueError: when the tuner's targets match nothing.
    """
    full = isinstance(config.tuner, recipe.Full)
    denoiser, trained = _network(family, config, precision)
    parameters = sum(p.numel() for p in denoiser.parameters()) - (0 if full else trained)
    largest = max(shapes, key=lambda s: family.tokens(*s))
    checkpointing = config.memory.gradient_checkpointing
    counts = count(family, denoiser, largest, config.train.batch, checkpointing=checkpointing)
    size = precision.itemsize
    memory = {
        "frozen weights": (parameters - trained if full else parameters) * size,
        # Full fine-tuning keeps float32 weights and computes under autocast, on copies of them.
        "trained weights": trained * (4 + (size if full and size < 4 else 0)),
        "gradients": trained * 4,
        f"{optimizer} state": round(trained * STATE_BYTES[optimizer]),
        "moving average": trained * 4 if config.optim.ema else 0,
        "activations": counts.kept + 2 * counts.largest,
    }
    passes = (3 if full else 2) + checkpointing, 3 + checkpointing
    ratios = [family.tokens(*s) / family.tokens(*largest) for s in shapes]
    each = [
        passes[0] * counts.linear * r + passes[1] * (counts.across * r + counts.attention * r**2)
        for r in ratios
    ]
    mean = sum(f * n for f, n in zip(each, shapes.values(), strict=True)) / sum(shapes.values())
    flops = mean * config.train.accumulate
    seconds, why = _time(flops, device, precision)
    width = text_width(denoiser)
    tokens = sum(math.ceil(len(c.split()) * WORDS_TO_TOKENS) + 1 for c in captions)
    cache = {
        "clips": sum(2 * sum(map(math.prod, family.stored(*s).values())) * n for s, n in windows.items()),
        "captions": tokens * width * (size if device.type == "cuda" else 4),
    }
    weights = f"weights: {parameters / 1e6:,.1f} M in all, {trained / 1e6:,.2f} M trained, in float32"
    how = (
        weights if full else f"{weights}; the others in {_name(precision)}",
        (
            f"activations: a forward pass of {'x'.join(map(str, largest))} at batch {config.train.batch}, "
            f"gradient checkpointing {'on' if checkpointing else 'off'}, was run on shapes alone; what it "
            "keeps was counted, with fused attention, plus twice its largest tensor for the backward pass"
        ),
        "not counted: what CUDA takes for itself (about 1 GB), fragmentation, the encoders while caching",
        f"cache: latents in float16; captions of {WORDS_TO_TOKENS:g} tokens per word, {width} wide",
        f"time: {why}",
    )
    name, capacity = describe(device)
    return Estimate(parameters, trained, memory, cache, flops, seconds, name, capacity, _name(precision), how)


def _network(family: Family, config: recipe.Config, precision: torch.dtype) -> tuple[nn.Module, int]:
    """The network with its tuner on the meta device, as it computes, and the number of trained weights."""
    denoiser = family.load_denoiser(precision, meta=True)
    for parameter in denoiser.parameters():
        parameter.data = parameter.data.to(precision)
    with torch.device("meta"):
        trained = tuners.attach(config.tuner, family.targets, denoiser, seed=0)
    if isinstance(config.tuner, recipe.Full):
        for parameter in trained.values():
            parameter.data = parameter.data.to(precision)
    return denoiser, sum(p.numel() for p in trained.values())


def _time(
    flops: float, device: torch.device, precision: torch.dtype
) -> tuple[tuple[float, float] | None, str]:
    """Shortest and longest seconds for a step, and how they came about or why there are none."""
    if device.type == "meta":
        return None, "unknown, the device of the recipe is not on this machine"
    rate = speed(device, precision)
    bounds = (flops / rate / USED[1], flops / rate / USED[0])
    if bounds[0] < SMALL:
        return None, f"{flops / 1e9:,.1f} GFLOP per step are so few that overhead decides"
    return bounds, (
        f"{flops / 1e12:,.1f} TFLOP per step at {USED[0]:.0%} to {USED[1]:.0%} of the {rate / 1e12:,.2f} "
        f"TFLOP/s that matrix products in {_name(precision)} reach here, just measured"
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def speed(device: torch.device, precision: torch.dtype, *, seconds: float = 0.2) -> float:
    """Floating-point operations per second of large matrix products, measured now."""
    n = 4096 if device.type == "cuda" else 768
    a, b = (torch.randn(n, n, device=device).to(precision) for _ in range(2))

    def wait() -> None:
        (a @ b)[0, 0].item()

    wait()
    wait()
    start, done = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        for _ in range(4):
            torch.mm(a, b)
        wait()
        done += 5
    return done * 2.0 * n**3 / (time.perf_counter() - start)


def describe(device: torch.device) -> tuple[str, int]:
    """Name of a device and its memory in bytes; 0 where unknown."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return properties.name, properties.total_memory
    if device.type == "meta":
        return "unknown", 0
    pages = os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    names = {"cpu": "the CPU", "mps": "Apple MPS"}
    return names.get(device.type, device.type), pages * os.sysconf("SC_PAGE_SIZE") if pages else 0
