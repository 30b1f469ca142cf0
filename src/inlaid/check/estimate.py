"""Estimation of a run's parameter count, memory, disk space and time, without loading weights.

The network is built on the meta device with its trainable weights or adapter. One forward and backward pass
is then simulated on shapes only, with gradient checkpointing as in the recipe. The lifetime of every tensor
is tracked and the operations are counted. The speed of the device is measured with matrix products.
"""

from __future__ import annotations

import hashlib
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

import torch
from torch import nn

from inlaid import __version__
from inlaid import config as recipe
from inlaid.check.counting import Counts, count_operations, text_width
from inlaid.families import Family
from inlaid.families.grid import Extent
from inlaid.networks import quantize
from inlaid.training import offload
from inlaid.training.trained import Trained, trained_by

STATE_BYTES = {"adamw": 8.0, "adamw8bit": 2.06, "adamw4bit": 1.06, "prodigy": 16.0}
"""Bytes of optimizer state per trained weight. AdamW stores two moments, plus scales if quantized; Prodigy
stores four float32 values."""

EFFICIENCY = (0.25, 0.7)
"""Assumed minimum and maximum training speed, as a fraction of the speed of large matrix products."""

OVERHEAD_SECONDS = 0.05
"""Minimum step time, in seconds, for which an estimate is given. Overhead dominates shorter steps."""

WORDS_TO_TOKENS = 1.5
"""Estimated number of text tokens per word of a caption."""


def _counted(
    family: Family, denoiser: nn.Module, extent: Extent, batch: int, memo: dict[str, Any], **how: Any
) -> Counts:
    """Return the result of `count_operations`, or its stored result for equal inputs.

    `memo` stores the results. Its keys are hashes of the inputs and of the library versions.

    Raises:
        ValueError: if the network does not accept clips of this size.
    """
    tensors = [(n, type(p), p.shape, p.dtype, p.requires_grad) for n, p in denoiser.named_parameters()]
    about = [type(family), family.model, family.options, family.text_length, family.channels]
    about += [family.shapes(*extent), family.tokens(*extent), __version__]
    about += [version(name) for name in ("torch", "diffusers", "peft")]
    key = hashlib.sha256(repr([denoiser, tensors, about, extent, batch, how]).encode()).hexdigest()
    try:
        return Counts(**memo[key])
    except (LookupError, TypeError):
        try:
            found = count_operations(family, denoiser, extent, batch, **how)
        except (RuntimeError, IndexError) as error:
            raise ValueError(
                f"data.size, data.frames: the network does not accept clips of this size ({extent}): "
                f"{str(error).splitlines()[0]}"
            ) from error
        memo[key] = asdict(found)
        return found


RECOMPUTED = {0: "no block", 1: "all blocks", "attention": "all blocks, except for attention"}
"""Description of values of `memory.gradient_checkpointing`."""


@dataclass(frozen=True)
class Estimate:
    """Estimate of the resources that each process of a run needs on this machine."""

    parameters: int
    trained: int
    memory: dict[str, int]
    """Bytes of device memory during training, by purpose."""
    cache: dict[str, int]
    """Bytes of the cache on disk, for `clips` and for `captions`."""
    flops: float
    """Floating-point operations of one optimizer step."""
    seconds: tuple[float, float] | None
    """Minimum and maximum time of one optimizer step in seconds; None if unknown."""
    device: str
    capacity: int
    """Total device memory in bytes; 0 if unknown."""
    precision: str
    how: tuple[str, ...]
    """Sentences that explain how the values were estimated, or why a value is missing."""
    counts: Counts
    """Counts of one micro-batch of the largest extent."""
    copied: int
    """Bytes that each micro-batch copies from host memory to the device."""

    @property
    def peak(self) -> int:
        """Peak bytes of device memory during a step."""
        return sum(self.memory.values())


def estimate_recipe(
    family: Family,
    config: recipe.Config,
    batches: Mapping[Extent, int],
    windows: Mapping[Extent, int],
    captions: Sequence[str],
    *,
    device: torch.device,
    precision: torch.dtype,
    optimizer: str,
    memo: dict[str, Any] | None = None,
) -> Estimate:
    """Estimate the resources of a run.

    Args:
        family: model family; no weights need to be loaded.
        config: the recipe.
        batches: batches per epoch for each extent (number of frames or objects, height and width).
        windows: number of windows to cache for each extent.
        captions: captions to cache.
        device: device of the run.
        precision: dtype of the frozen base model, or of autocast in full fine-tuning.
        optimizer: name of the optimizer that is used on this device.
        memo: results of earlier simulated training steps, by a hash of the inputs; new results are added.

    Raises:
        ValueError: if `tuner.targets` matches no layer, or the network rejects the clip size or the offload.
    """
    what = trained_by(config, family)
    full = what.autocast
    denoiser, trained = _network(family, what, precision)
    parameters = sum(p.numel() for p in denoiser.parameters()) - (0 if full else trained)
    largest = max(batches, key=lambda e: family.tokens(*e))
    checkpointing, accumulate = config.memory.gradient_checkpointing, config.train.accumulate
    counts = _counted(
        family,
        denoiser,
        largest,
        config.train.batch,
        {} if memo is None else memo,
        checkpointing=checkpointing,
        accumulating=accumulate > 1,
        offloaded="activations" in config.memory.offload,
        sequence=config.runtime.sequence,
    )
    held = torch.float32 if full else precision
    frozen = _frozen(config, denoiser, held, recomputed=checkpointing in (1, "attention"))
    offloaded = config.memory.offload_optimizer and device.type != "cpu"
    memory = {
        "frozen weights": frozen.device,
        "trained weights": trained * 4,
        "unpacked weights": frozen.temporary
        + (_autocast_copies(config, denoiser, precision) if full and precision.itemsize < 4 else 0),
        f"{optimizer} state": 0 if offloaded else round(trained * STATE_BYTES[optimizer]),
        "EMA": trained * 4 if config.optim.ema else 0,
        "gradients": counts.gradients,
        "activations": counts.activations,
    }
    memory, sharding = _sharded(memory, config, denoiser, optimizer)
    ratios = [family.tokens(*e) / family.tokens(*largest) for e in batches]
    each = [(counts.linear + counts.across) * r + counts.attention * r**2 for r in ratios]
    mean = sum(f * n for f, n in zip(each, batches.values(), strict=True)) / sum(batches.values())
    flops = mean * accumulate
    seconds, why = _time(flops, device, precision)
    cache, kept = _cache(
        family, windows, captions, text_width(denoiser), precision.itemsize if device.type == "cuda" else 4
    )
    weights = f"weights: {parameters / 1e6:,.1f} M in total, {trained / 1e6:,.2f} M trained, in float32"
    small = config.memory.quantize or config.memory.layerwise_casting
    recomputed = RECOMPUTED.get(checkpointing, f"every {checkpointing}th block")
    how = (
        weights if full else f"{weights}; the others in {small or _name(precision)}",
        (
            f"activations: peak of a simulated forward and backward pass of {'x'.join(map(str, largest))} at "
            f"batch {config.train.batch}{_shared(config)}, with gradient checkpointing of {recomputed}, "
            "including gradients that exist at the peak; assumes fused attention"
        ),
        *([sharding] if sharding else []),
        *_host(config, frozen, counts, optimizer=offloaded),
        (
            "not counted: workspaces of kernels (on the CPU: packed copies of bfloat16 weights)"
            if device.type == "cpu"
            else "not counted: the CUDA context (about 1 GB), fragmentation, encoders while caching"
        ),
        kept,
        f"time: {why}",
    )
    about = (*describe_device(device), _name(precision), how, counts, frozen.copied + counts.host)
    return Estimate(parameters, trained, memory, cache, flops, seconds, *about)


def _host(config: recipe.Config, frozen: _Frozen, counts: Counts, *, optimizer: bool) -> Iterator[str]:
    """Yield a sentence for each kind of offload: bytes in host memory, and bytes copied in each step."""
    if optimizer:
        yield "the optimizer state is offloaded to CPU memory"
    times = config.train.accumulate
    if frozen.host:
        yield (
            f"blocks: {frozen.host / 1e9:,.1f} GB of frozen weights in host memory, of which "
            f"{times * frozen.copied / 1e9:,.1f} GB are copied to the device in each step"
        )
    if "activations" in config.memory.offload:
        yield (
            f"activations: {counts.host / 1e9:,.1f} GB in host memory, copied there and back in each "
            "micro-batch"
        )


def _cache(
    family: Family,
    windows: Mapping[Extent, int],
    captions: Sequence[str],
    width: int,
    itemsize: int,
) -> tuple[dict[str, int], str]:
    """Return the cache sizes of clips and captions in bytes, and an explanation."""
    clips = sum(
        n * math.prod(shape) * (1 if name in family.bytewise else 2)
        for extent, n in windows.items()
        for name, shape in family.stored(*extent).items()
    )
    if not family.text_length:
        return {"clips": clips, "captions": 0}, "cache: latents and image embeddings in float16"
    tokens = sum(math.ceil(len(c.split()) * WORDS_TO_TOKENS) + 1 for c in captions)
    note = f"cache: latents in float16; captions at {WORDS_TO_TOKENS:g} tokens per word, width {width}"
    return {"clips": clips, "captions": tokens * width * itemsize}, note


def _network(family: Family, what: Trained, precision: torch.dtype) -> tuple[nn.Module, int]:
    """Return the network on the meta device, prepared for training, and the number of its trained weights.

    The weights have the dtype in which the run computes, even if the run stores them in float32 and uses
    autocast.
    """
    denoiser = family.load_denoiser(precision, meta=True)
    for parameter in denoiser.parameters():
        parameter.data = parameter.data.to(precision)
    with torch.device("meta"):
        what.attach(denoiser, seed=0)
    trained = [p for p in denoiser.parameters() if p.requires_grad]
    if what.autocast:
        for parameter in trained:
            parameter.data = parameter.data.to(precision)
    return denoiser, sum(p.numel() for p in trained)


def _autocast_copies(config: recipe.Config, denoiser: nn.Module, precision: torch.dtype) -> int:
    """Return the bytes of the copies of trained float32 weights on which autocast computes, at the peak.

    Autocast deletes its copies after the forward pass. With gradient checkpointing of all blocks, the
    backward pass makes copies of one block at a time. If gradients of an earlier micro-batch exist, memory
    may be largest in the forward pass, when the copies of all weights exist.
    """
    sizes = {n: p.numel() * precision.itemsize for n, p in denoiser.named_parameters() if p.requires_grad}
    if config.memory.gradient_checkpointing not in (1, "attention") or config.train.accumulate > 1:
        return sum(sizes.values())
    blocks = quantize.blocks(denoiser)
    return max((sum(v for n, v in sizes.items() if n.startswith(f"{b}.")) for b in blocks), default=0)


@dataclass(frozen=True)
class _Frozen:
    """Bytes of the frozen weights of a run."""

    device: int
    """On the device, including the slots for offloaded blocks."""
    temporary: int
    """Temporary copies of quantized or cast weights, which are expanded for the computation."""
    host: int
    """In host memory: weights of offloaded blocks."""
    copied: int
    """Copied to the device in each micro-batch."""


def _frozen(
    config: recipe.Config, denoiser: nn.Module, precision: torch.dtype, *, recomputed: bool
) -> _Frozen:
    """Return the bytes of the frozen weights and of their temporary copies, on the device and in host memory.

    Before a layer computes, its quantized or downcast weight is expanded to a temporary copy in `precision`.
    Copies of downcast weights are kept for the backward pass. If `recomputed` is true (gradient
    checkpointing), only the copies of one block exist at a time.

    Raises:
        ValueError: if the network has fewer blocks than the recipe offloads.
    """
    section = config.memory
    wrong = offload.problems(section, denoiser)
    if wrong:
        raise ValueError("; ".join(wrong))
    stored = quantize.stored_bytes(section, denoiser, precision)
    frozen = {
        n: p.numel() * precision.itemsize for n, p in denoiser.named_parameters() if not p.requires_grad
    }
    small = {n: size for n, size in frozen.items() if stored[n] != size}
    temporary = 0
    if small and section.quantize:
        # Dequantization of int4 holds unpacked codes and values at the same time, in both passes.
        temporary = max(small.values()) * (2 if section.quantize == "int4" else 1)
    elif small:
        blocks = [
            sum(v for n, v in small.items() if n.startswith(f"{b}.")) for b in quantize.blocks(denoiser)
        ]
        # The backward pass needs the copies used in the forward pass; checkpointing limits them to one block.
        temporary = max(blocks, default=0) if recomputed else sum(small.values())
    away = [
        sum(stored[n] for n in frozen if n.startswith(f"{block}."))
        for block in offload.offloaded(section, denoiser)
    ]
    total, slots = sum(stored[n] for n in frozen), offload.SLOTS * max(away, default=0.0)
    host = sum(away)
    copied = 2 * host * max(0, len(away) - offload.SLOTS) / max(1, len(away))
    return _Frozen(round(total - host + slots), temporary, round(host), round(copied))


def _sharded(
    memory: dict[str, int], config: recipe.Config, denoiser: nn.Module, optimizer: str
) -> tuple[dict[str, int], str]:
    """Return the memory of one process with sharding, and an explanation.

    Without sharding, the memory is unchanged and the explanation is empty.
    """
    parallel = config.runtime.parallel
    world = config.runtime.shard_size or config.runtime.world_size or 1
    if world == 1 or parallel == "ddp":
        return memory, ""
    own = [f"{optimizer} state", "EMA"]
    if parallel != "zero2":
        own += ["frozen weights", "trained weights"]
    if config.train.accumulate == 1 or parallel != "fsdp":
        own += ["gradients"]
    out = {k: -(-v // world) if k in own else v for k, v in memory.items()}
    note = f"{parallel}: each of {world} processes holds a shard of {', '.join(own)}"
    if parallel == "zero2":
        return out, note
    sizes = [sum(p.nbytes for p in b.parameters()) for b in quantize.blocks(denoiser).values()]
    return {**out, "gathered blocks": 2 * max(sizes, default=0)}, f"{note}, and two complete blocks"


def _shared(config: recipe.Config) -> str:
    """Return a phrase that says how many processes share each sample; empty if samples are not split."""
    processes = config.runtime.sequence
    return f" in one of {processes} processes that share each sample" if processes > 1 else ""


def _time(
    flops: float, device: torch.device, precision: torch.dtype
) -> tuple[tuple[float, float] | None, str]:
    """Return the minimum and maximum seconds per step (None if unknown), and an explanation."""
    if device.type == "meta":
        return None, "unknown, the recipe's device is not on this machine"
    rate = measure_speed(device, precision)
    bounds = (flops / rate / EFFICIENCY[1], flops / rate / EFFICIENCY[0])
    if bounds[0] < OVERHEAD_SECONDS:
        return None, f"not estimated, overhead dominates at {flops / 1e9:,.1f} GFLOP per step"
    return bounds, (
        f"{flops / 1e12:,.1f} TFLOP per step at {EFFICIENCY[0]:.0%} to {EFFICIENCY[1]:.0%} of the "
        f"{rate / 1e12:,.2f} TFLOP/s measured now on this device with matrix products in {_name(precision)}"
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def measure_speed(device: torch.device, precision: torch.dtype, *, seconds: float = 0.2) -> float:
    """Measure the speed of large matrix products on a device, in floating-point operations per second."""
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


def describe_device(device: torch.device) -> tuple[str, int]:
    """Return the name of a device and its memory in bytes; the memory is 0 if it is unknown."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return properties.name, properties.total_memory
    if device.type == "meta":
        return "unknown", 0
    pages = os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    names = {"cpu": "the CPU", "mps": "Apple MPS"}
    return names.get(device.type, device.type), pages * os.sysconf("SC_PAGE_SIZE") if pages else 0
