"""Optimizers, learning-rate schedules and EMA."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from inlaid import config as recipe
from inlaid.runs.packages import require_package
from inlaid.training.memory import Offloaded


def make_optimizer(
    name: str, section: recipe.Optim, parameters: Sequence[nn.Parameter], *, offload: bool = False
) -> torch.optim.Optimizer:
    """Create an optimizer by name.

    Weight decay does not apply to one-dimensional weights (norms, biases, DoRA magnitudes).

    Args:
        name: a value of `optim.name`.
        section: the `optim` section of the recipe.
        parameters: parameters to train.
        offload: keep the optimizer state in CPU memory and run the optimizer step there.

    Raises:
        ValueError: if the optimizer's package is not installed.
    """
    if offload:
        return Offloaded(parameters, lambda here: make_optimizer(name, section, here))
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": section.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    groups = [g for g in groups if g["params"]]
    common: dict[str, Any] = {"lr": section.lr, "betas": section.betas, "eps": section.eps}
    if name == "adamw8bit":
        return require_package("optim.name", name).AdamW8bit(groups, **common)
    if name == "adamw4bit":
        made = require_package("optim.name", name).AdamW4bit(groups, **common)
        made.register_step_pre_hook(_tensor_rates)
        return made
    if name == "prodigy":
        return require_package("optim.name", name).Prodigy(
            groups, **common, decouple=True, use_bias_correction=True, safeguard_warmup=section.warmup > 0
        )
    return torch.optim.AdamW(
        groups, **common, fused=all(p.device.type in ("cuda", "cpu") for p in parameters)
    )


def _tensor_rates(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Convert learning rates to tensors, because torchao's compiled step recompiles for every new number."""
    for group in optimizer.param_groups:
        group["lr"] = torch.as_tensor(group["lr"], dtype=torch.float32)


def learning_rate(section: recipe.Optim, step: int, steps: int) -> float:
    """Return the learning rate of a step: linear warmup, then the schedule in `optim.schedule`.

    Args:
        section: the `optim` section of the recipe.
        step: number of the step; the first step is 0.
        steps: total number of steps.
    """
    if step < section.warmup:
        return section.lr * (step + 1) / section.warmup
    done = (step - section.warmup) / max(1, steps - section.warmup)
    if section.schedule == "cosine":
        return section.lr * 0.5 * (1 + math.cos(math.pi * done))
    return section.lr * (1 - done) if section.schedule == "linear" else section.lr


class EMA:
    """Exponential moving average of the trained weights.

    The decay of a step is at most (1 + step) / (10 + step), so that the initial weights lose influence
    quickly.
    """

    def __init__(self, decay: float, weights: Mapping[str, Tensor]) -> None:
        self.decay = decay
        self.weights = {n: w.detach().clone() for n, w in weights.items()}

    @torch.no_grad()
    def update(self, weights: Mapping[str, Tensor], step: int) -> None:
        """Update the EMA with `weights` after an optimizer step.

        `step` is the number of the optimizer step. The decay is lower in the first steps.
        """
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, average in self.weights.items():
            average.lerp_(weights[name].detach(), 1 - decay)


@contextmanager
def swapped(held: Mapping[str, Tensor], weights: Mapping[str, Tensor] | None) -> Iterator[None]:
    """Context manager that swaps the values of `held` and `weights` on entry and swaps them back on exit.

    If `weights` is None, nothing is swapped. Tensors are changed in place, because other objects hold
    references to them.
    """

    @torch.no_grad()
    def exchange(weights: Mapping[str, Tensor]) -> None:
        for name, tensor in held.items():
            kept = tensor.detach().clone()
            tensor.copy_(weights[name])
            weights[name].copy_(kept)

    if weights is None:
        yield
        return
    exchange(weights)
    try:
        yield
    finally:
        exchange(weights)
