"""Memory settings of a run from the fastest to the smallest, each with its predicted memory and time.

The time is predicted from counted operations: floating-point operations of attention and of matrix products,
and the bytes that all other operations move, each divided by a rate. The rates were fitted to three measured
training steps on an H100, so the seconds are those of an H100. On another GPU, the ratios of the seconds are
a guide.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from inlaid import config as recipe
from inlaid.check.counting import Counts
from inlaid.check.estimate import estimate_recipe
from inlaid.families import Family
from inlaid.families.grid import Extent
from inlaid.runs.launch import DevicePlan, Devices, resolve_devices

RATES = {"attention": 580e12, "small_heads": 316e12, "products": 650e12, "moved": 2.9e12, "copied": 50e9}
"""Fitted rates of an H100: floating-point operations per second of attention with heads of 128 channels, of
attention with heads of 64 channels, and of matrix products; bytes per second of all other operations.
`copied` is an assumption: bytes per second of copies from host memory over PCIe 5."""

SPARE = (0.06, 0.8e9)
"""Memory that must stay free: a fraction of the GPU memory, and bytes (CUDA context, fragmentation)."""

LADDER: tuple[dict[str, Any], ...] = (
    {"gradient_checkpointing": False},
    {"gradient_checkpointing": 2},
    {"gradient_checkpointing": "attention"},
    {"gradient_checkpointing": "attention", "offload": ["activations"]},
    {"gradient_checkpointing": True},
    {"gradient_checkpointing": True, "offload": ["activations"]},
    {"gradient_checkpointing": True, "offload": ["blocks", "activations"]},
    {"gradient_checkpointing": True, "quantize": "int8"},
    {"gradient_checkpointing": True, "quantize": "nf4"},
    {"gradient_checkpointing": True, "quantize": "nf4", "offload": ["blocks", "activations"]},
)
"""Settings of the section `memory`, in the order in which a user would try them: those that change no number
come first."""


@dataclass(frozen=True)
class Rung:
    """Memory settings with their predicted memory and time."""

    settings: Mapping[str, Any]
    """Values of keys of the section `memory`."""
    problem: str = ""
    """Why this recipe cannot use the settings; empty if it can."""
    peak: int = 0
    """Bytes of GPU memory."""
    seconds: float = 0.0
    """Seconds of an optimizer step on an H100."""
    fits: bool = False
    """True if the GPU memory is large enough for the peak and the spare memory."""

    @property
    def text(self) -> str:
        """The settings as text, such as `quantize=int8`."""
        return ", ".join(f"{k}={_plain(v)}" for k, v in self.settings.items())


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return "all" if len(value) > 1 else value[0]
    return str(value).lower() if isinstance(value, bool) else str(value)


def seconds_of(counts: Counts, accumulate: int = 1, copied: int = 0) -> float:
    """Return the predicted seconds of an optimizer step on an H100.

    Args:
        counts: counts of one micro-batch.
        accumulate: number of micro-batches in a step.
        copied: bytes that a micro-batch copies from host memory while it computes.
    """
    large = counts.attention - counts.small_heads
    attention = large / RATES["attention"] + counts.small_heads / RATES["small_heads"]
    products = (counts.linear + counts.across) / RATES["products"]
    computed = attention + products + counts.moved / RATES["moved"]
    return accumulate * max(computed, copied / RATES["copied"])


def usable(vram: float) -> float:
    """Return the bytes that a run may use on a GPU with `vram` GB (2^30 bytes each)."""
    total = vram * 2**30
    return total * (1 - SPARE[0]) - SPARE[1]


def climb(
    family: Family,
    config: recipe.Config,
    extent: Extent,
    vram: float,
    *,
    memo: dict[str, Any] | None = None,
    advance: Callable[[], None] = lambda: None,
) -> list[Rung]:
    """Predict memory and time of a recipe on a CUDA GPU for every setting of `LADDER`.

    Other keys of the recipe's section `memory` keep their values, and a recipe that quantizes keeps its
    format.

    Args:
        family: model family; no weights need to be loaded.
        config: the recipe.
        extent: largest clips: frames (objects for scenes), height and width.
        vram: GPU memory in GB (2^30 bytes each), as on a data sheet.
        memo: results of earlier simulated training steps; new results are added.
        advance: called after each setting.

    Raises:
        ValueError: if the recipe names a device other than CUDA.
    """
    place = resolve_devices(config, Devices(cuda=1, cuda_bfloat16=True))
    if place.device != "cuda":
        raise ValueError(f"--vram: the recipe sets runtime.device={place.device}, which has no GPU memory")
    raw = config.model_dump(mode="json")
    rungs = []
    for settings in LADDER:
        if config.memory.quantize in (None, settings.get("quantize")) or "quantize" not in settings:
            rungs.append(_rung(family, raw, settings, extent, vram, place, memo))
        advance()
    return rungs


def _rung(
    family: Family,
    raw: dict[str, Any],
    settings: dict[str, Any],
    extent: Extent,
    vram: float,
    place: DevicePlan,
    memo: dict[str, Any] | None,
) -> Rung:
    try:
        changed = recipe.build(recipe.merge(raw, {"memory": settings}))
        found = estimate_recipe(
            family,
            changed,
            {extent: 1},
            {extent: 1},
            [""],
            device=torch.device("meta"),
            precision=place.precision,
            optimizer=place.optimizer,
            memo=memo,
        )
    except ValueError as error:
        return Rung(settings, problem=str(error).splitlines()[-1].strip(" -"))
    seconds = seconds_of(found.counts, changed.train.accumulate, found.copied)
    return Rung(settings, "", found.peak, seconds, found.peak <= usable(vram))


def choose(rungs: Sequence[Rung]) -> Rung | None:
    """Return the fastest settings that fit; None if none fits."""
    return min((r for r in rungs if r.fits), key=lambda r: r.seconds, default=None)


def explain(rungs: Sequence[Rung], vram: float) -> str:
    """Return a sentence about the chosen settings, and why the next faster settings do not fit."""
    limit, best = size_text(usable(vram)), choose(rungs)
    if best is None:
        least = min((r.peak for r in rungs if not r.problem), default=0)
        return (
            f"nothing fits into {vram:g} GB: at least {size_text(least)} are needed, and {limit} are usable. "
            "Lower train.batch, data.size or data.frames"
        )
    chosen = " ".join(f"memory.{each}" for each in best.text.split(", "))
    text = f"fastest that fits into {vram:g} GB: {chosen} ({size_text(best.peak)})"
    faster = [r for r in rungs if not r.problem and r.seconds < best.seconds]
    if faster:
        near = max(faster, key=lambda r: r.seconds)
        text += f"; {near.text} needs {size_text(near.peak)}, and {limit} are usable"
    return text


def size_text(size: float) -> str:
    """Return a size as text, such as `12.3 GB` (10^9 bytes)."""
    for unit in ("B", "KB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:,.1f} GB"
