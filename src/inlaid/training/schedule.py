"""Conversion of training length and intervals, such as `train.epochs` and `train.save_every`, to steps."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

from inlaid import config as recipe
from inlaid.config.values import epochs


@dataclass(frozen=True)
class Schedule:
    """Length of a run, and intervals of checkpoints, validations and samples, in optimizer steps.

    Intervals can be fractions, because an epoch can end within an optimizer step.
    """

    steps: int
    """Number of optimizer steps."""
    epoch: Fraction
    """Steps per epoch."""
    save: Fraction
    validate: Fraction
    sample: Fraction | None
    """Steps between samples; None if no samples are generated."""

    def saves(self, step: int) -> bool:
        """Return True if a checkpoint is due after a step, counted from 1."""
        return _due(step, self.save)

    def validates(self, step: int) -> bool:
        """Return True if the validation loss is due after a step."""
        return _due(step, self.validate)

    def samples(self, step: int) -> bool:
        """Return True if videos or scenes must be generated after a step."""
        return self.sample is not None and _due(step, self.sample)


def make_schedule(config: recipe.Config, batches: int, per_step: int) -> Schedule:
    """Return the number of steps of a run, and the steps between checkpoints, validations and samples.

    Args:
        config: the recipe.
        batches: micro-batches per epoch.
        per_step: micro-batches per optimizer step, over all processes.
    """
    epoch = Fraction(batches, per_step)

    def interval(every: int | str) -> Fraction:
        count = epochs(every)
        return Fraction(every) if count is None else max(Fraction(1), Fraction(str(count)) * epoch)

    train, every = config.train, config.sample.every
    length = train.steps or math.ceil(Fraction(str(train.epochs)) * epoch)
    sample = None if every is None else interval(every)
    return Schedule(length, epoch, interval(train.save_every), interval(train.validate_every), sample)


def _due(step: int, every: Fraction) -> bool:
    """Return True if a multiple of `every` lies in (step - 1, step]."""
    return step // every > (step - 1) // every
