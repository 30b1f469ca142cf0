"""Warnings about settings in a recipe (the YAML file of a run) that are valid but probably mistakes."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from inlaid import config as recipe
from inlaid.runs.folder import Run


def cautions(config: recipe.Config, denoiser: nn.Module, selected: list[str]) -> list[str]:
    """Return warnings about settings that are valid but probably mistakes.

    The commands `check` and `train` print these warnings.

    Args:
        config: the recipe.
        denoiser: network without adapters; may be on the meta device.
        selected: names of the layers that get an adapter.
    """
    found, optim = [], config.optim
    if optim.name == "prodigy" and optim.lr != 1:
        found.append(
            f"optim.lr: {optim.lr:g} scales the rate that prodigy estimates, made for 1: leave lr out"
        )
    over = _over_width(config.tuner, denoiser, selected) if config.rgba_vae is None else []
    return [*found, *over]


def length_cautions(config: recipe.Config, steps: int) -> list[str]:
    """Return warnings about the number of optimizer steps.

    There is a warning if the warmup lasts for all steps, or if the run already has a checkpoint with more
    steps.
    """
    found, optim = [], config.optim
    if optim.warmup >= steps:
        found.append(
            f"optim.warmup: {optim.warmup} of {steps} steps: the learning rate never stays at {optim.lr:g}"
        )
    checkpoints = Run(Path(config.run)).checkpoints()
    done = int(checkpoints[-1].name.removeprefix("step-")) if checkpoints else 0
    if done > steps:
        epochs = config.train.epochs
        key, value = (
            ("train.steps", f"{steps}") if epochs is None else ("train.epochs", f"{epochs:g}, {steps} steps")
        )
        found.append(
            f"{key}: {value}, but {config.run} is trained for {done} steps already: nothing is left to "
            f"train; raise {key}, or choose another folder (run=...)"
        )
    return found


def _over_width(tuner: recipe.LowRank | recipe.Full, denoiser: nn.Module, selected: list[str]) -> list[str]:
    """Return a warning if the rank of LoRA or DoRA exceeds the smaller dimension of a layer's weight matrix.

    The list is empty if there is no such layer.
    """
    if not isinstance(tuner, recipe.LowRank) or tuner.kind not in ("lora", "dora"):
        return []
    sizes = {name: min(_matrix(denoiser.get_submodule(name))) for name in selected}
    narrow = [name for name, size in sizes.items() if size < tuner.rank]
    if not narrow:
        return []
    least = min(narrow, key=lambda name: sizes[name])
    where = f"{len(narrow)} of {len(sizes)} layers (least {sizes[least]}, {least})"
    why = "more parameters than the layer and no more capacity: lower the rank"
    return [f"tuner.rank: {tuner.rank} is over the width of {where}: {why}"]


def _matrix(layer: nn.Module) -> tuple[int, int]:
    weight = layer.weight
    assert isinstance(weight, nn.Parameter)
    return weight.shape[0], weight[0].numel()
