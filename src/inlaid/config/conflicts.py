"""Conflicts in a recipe: settings that are valid alone but not together."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from inlaid.config.sections import Config, RgbaVae


def conflicts(config: Config) -> Iterator[str]:
    """Yield an error message for each combination of keys that are valid alone but not together."""
    memory, tuner, parallel = config.memory, config.tuner, config.runtime.parallel
    folder = Path(os.path.realpath(config.run))
    there = next(p for p in (folder, *folder.parents) if os.path.exists(p))  # noqa: PTH110 - a name may be too long
    if not there.is_dir():
        yield f"run: {config.run} cannot be a folder, because {there} is a file: choose another"
    if folder in (Path(folder.anchor), Path.home()):
        yield f"run: {config.run} is {folder}: choose a folder of its own, such as {folder / 'runs/first'}"
    for source in config.data.sources:
        if Path(config.run).is_dir() and os.path.realpath(source.path) == os.path.realpath(config.run):
            yield (
                f"run: {config.run} is the folder of a data source, and files of the run would become "
                "part of the data: choose another folder"
            )
    if any(source.prior_preservation for source in config.data.sources):
        if tuner.kind == "full":
            yield (
                "data.sources.prior_preservation: needs the network without its adapter, which full "
                "fine-tuning does not keep: train an adapter (tuner.kind=lora)"
            )
        elif parallel in ("fsdp", "zero3"):
            yield (
                f"data.sources.prior_preservation: not supported with runtime.parallel={parallel}: "
                "use ddp or zero2"
            )
        if config.alpha.kind != "opaque":
            yield (
                "data.sources.prior_preservation: not supported in transparent runs, the base model has "
                "no alpha to preserve: remove it, or set alpha.kind=opaque"
            )
        if all(source.prior_preservation for source in config.data.sources):
            yield (
                "data.sources.prior_preservation: is set on every source, so nothing new is trained: "
                "remove it from the sources to train on"
            )
    small = [k for k in ("quantize", "layerwise_casting") if getattr(memory, k) is not None]
    if tuner.kind == "full":
        for key in small:
            yield (
                f"memory.{key}: needs a frozen base model, full fine-tuning trains it in float32: "
                "remove it, or train an adapter (tuner.kind=lora)"
            )
    elif tuner.kind in ("lokr", "loha") and tuner.dropout:
        yield f"tuner.dropout: not supported with tuner.kind={tuner.kind}: remove it, or use lora or dora"
    if len(small) == 2:
        yield "memory.layerwise_casting: cannot be combined with memory.quantize: remove one of them"
    elif memory.layerwise_casting == "float8" and tuner.kind == "dora":
        yield (
            "memory.layerwise_casting: DoRA needs norms of weights, which float8 tensors do not "
            "support: use memory.quantize=float8, which needs the same memory"
        )
    if memory.quantize in ("int4", "nf4") and tuner.kind == "loha":
        yield f"memory.quantize: LoHa does not support packed weights ({memory.quantize}): use int8 or float8"
    if memory.offload_optimizer and config.optim.name != "adamw":
        yield f"memory.offload_optimizer: needs optim.name=adamw (got {config.optim.name}): remove it"
    if parallel != "ddp":
        for key in [*small, *(["offload_optimizer"] if memory.offload_optimizer else [])]:
            yield f"memory.{key}: not supported with runtime.parallel={parallel}: use ddp, or remove it"
    yield from _parallel_conflicts(config)
    yield from _offload_conflicts(config)
    if config.rgba_vae is not None:
        yield from _rgba_vae_conflicts(config, config.rgba_vae)
    if config.runtime.compile and memory.layerwise_casting:
        yield "runtime.compile: cannot be combined with memory.layerwise_casting: remove one of them"
    if config.runtime.compile and memory.gradient_checkpointing == "attention":
        yield (
            "runtime.compile: cannot be combined with memory.gradient_checkpointing=attention: set "
            "memory.gradient_checkpointing=true, or remove runtime.compile"
        )


def _parallel_conflicts(config: Config) -> Iterator[str]:
    """Yield an error message for each conflict of `runtime.sequence` or `runtime.shard_size`."""
    runtime = config.runtime
    if runtime.shard_size is not None and runtime.parallel != "fsdp":
        yield (
            f"runtime.shard_size: applies to runtime.parallel=fsdp only, not to {runtime.parallel}: remove it"
        )
    for key in ("sequence", "shard_size"):
        size = getattr(runtime, key) or 1
        if runtime.world_size is not None and runtime.world_size % size:
            yield f"runtime.{key}: {size} does not divide runtime.world_size {runtime.world_size}: change one"
    if runtime.sequence == 1:
        return
    if runtime.parallel in ("zero2", "zero3"):
        yield (
            f"runtime.sequence: not supported with runtime.parallel={runtime.parallel}: use ddp, or fsdp to "
            "shard weights as well"
        )
    if config.tuner.kind != "full" and config.tuner.dropout:
        yield (
            "tuner.dropout: not supported with runtime.sequence, because each process would drop other "
            "values than one process does: remove one of them"
        )
    if config.rgba_vae is not None:
        yield "runtime.sequence: an RGBA VAE has no token sequence: remove it"


def _offload_conflicts(config: Config) -> Iterator[str]:
    """Yield an error message for each key that cannot be combined with block or activation offload."""
    memory, every, parallel = config.memory, config.memory.gradient_checkpointing, config.runtime.parallel
    key = "memory.offload" if memory.offload else "memory.blocks_to_swap"
    if not memory.offload and memory.blocks_to_swap is None:
        return
    if config.rgba_vae is not None:
        yield f"{key}: not supported for an RGBA VAE, which has no repeated blocks: remove it"
    if parallel != "ddp":
        yield f"{key}: not supported with runtime.parallel={parallel}: use ddp, or remove it"
    if every is False:
        yield f"{key}: needs gradient checkpointing: set memory.gradient_checkpointing=true"
    if not memory.offloads_blocks:
        return
    if config.tuner.kind == "full" and config.rgba_vae is None:
        yield (
            f"{key}: `blocks` needs a frozen base model, full fine-tuning changes its weights in each step: "
            "train an adapter (tuner.kind=lora), or set memory.offload=activations"
        )
    if every not in (False, True) and isinstance(every, int):
        yield (
            f"{key}: `blocks` needs gradient checkpointing of all blocks, not of one in {every}: set "
            "memory.gradient_checkpointing=true"
        )
    if memory.layerwise_casting is not None:
        yield (
            f"{key}: `blocks` cannot be combined with memory.layerwise_casting, which copies the weights "
            "of a layer in each pass: use memory.quantize"
        )
    if config.runtime.compile:
        yield f"runtime.compile: cannot be combined with {key} of blocks: remove one of them"


def _rgba_vae_conflicts(config: Config, section: RgbaVae) -> Iterator[str]:
    """Yield an error message for each recipe setting that is invalid when an RGBA VAE is trained."""
    if config.alpha.kind != "opaque":
        yield f"alpha.kind: {config.alpha.kind} does not apply to training an RGBA VAE: leave `alpha` out"
    if config.tuner != type(config).model_fields["tuner"].default:
        yield "tuner: does not apply to training an RGBA VAE: leave `tuner` out"
    if any(source.prior_preservation for source in config.data.sources):
        yield "data.sources.prior_preservation: does not apply to training an RGBA VAE: remove it"
    if section.train == "merge" and section.init_from is None:
        yield (
            "rgba_vae.init_from: missing, and train=merge needs decoders that were trained on alpha: set the "
            "folder of an RGBA VAE, or use train=merge+decoders"
        )
    if config.runtime.parallel != "ddp":
        yield f"runtime.parallel: an RGBA VAE trains with ddp only, not {config.runtime.parallel}: use ddp"
    if config.runtime.compile:
        yield "runtime.compile: an RGBA VAE has no repeated blocks to compile: remove it"
    for key in ("quantize", "layerwise_casting"):
        if getattr(config.memory, key) is not None:
            yield f"memory.{key}: not supported for an RGBA VAE, which stays in float32: remove it"
    if config.sample.every:
        yield (
            "sample.every: an RGBA VAE generates no samples, validation reconstructs clips instead: remove it"
        )
