"""Steps: one micro-batch to losses. Noise and time of a micro-batch are functions of its generator alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from inlay.families import Family
from inlay.objectives import Objective, mean_squared_error

QUANTILES = (0.1, 0.3, 0.5, 0.7, 0.9)
"""Quantiles of the noise-level distribution at which the held-out loss is measured."""


@dataclass(frozen=True)
class Batch:
    """A micro-batch: latents (n, c, t, h, w), conditions, and the clips' names."""

    latents: Tensor
    cond: Mapping[str, Tensor]
    names: Sequence[str] = ()
    preserve: Tensor | None = None
    """Of each sample, the weight with which the network should go on predicting what it does untuned; 0 for
    those that are learned: (n,)."""

    @classmethod
    def of(
        cls,
        family: Family,
        clips: Sequence[Mapping[str, Tensor]],
        text: Sequence[Mapping[str, Tensor]],
        names: Sequence[str],
        *seed: Any,
    ) -> Batch:
        """Cached clips and captions as a micro-batch; what is random in a clip is a function of `seed`."""
        drawn = [
            family.draw(clip, torch.Generator().manual_seed(stable_hash(*seed, "clip", i)))
            for i, clip in enumerate(clips)
        ]
        stacked = {k: torch.stack([d[k] for d in drawn]) for k in drawn[0]}
        return cls(stacked.pop("latents"), {**family.collate(text), **stacked}, names)

    def to(self, device: torch.device) -> Batch:
        """The same on a device; the copy overlaps with computation where memory is pinned."""
        pin = (lambda t: t.pin_memory()) if device.type == "cuda" else (lambda t: t)
        move = lambda t: pin(t).to(device, non_blocking=True)  # noqa: E731
        preserve = None if self.preserve is None else move(self.preserve)
        return Batch(move(self.latents), {k: move(v) for k, v in self.cond.items()}, self.names, preserve)


class Step(Protocol):
    """One micro-batch to losses; `loss` is required, `losses` has one value per sample."""

    def __call__(self, denoiser: nn.Module, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """Draws what is random from `generator`, on the CPU so that every device sees the same."""
        ...


@dataclass(frozen=True)
class DenoisingStep:
    """Corrupt, predict, compare: loss = mean of w(t) (prediction - target)^2 in float32.

    Samples to `preserve` are compared with the prediction of the untuned network in place of the target:
    prior preservation (Ruiz et al. 2023, section 3.2) as learning without forgetting (Li & Hoiem 2016), which
    has no noise.
    """

    family: Family
    objective: Objective
    precision: AbstractContextManager[Any] = field(
        default_factory=lambda: torch.autocast("cpu", enabled=False)
    )
    untuned: Callable[[nn.Module], AbstractContextManager[Any]] | None = None
    """Switches off for a while what is trained; for batches with samples to preserve."""

    def __call__(self, denoiser: nn.Module, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """See `Step`."""
        n, device = len(batch.latents), batch.latents.device
        t = self.objective.sample_time(n, generator).to(device)
        noise = torch.randn(batch.latents.shape, generator=generator).to(device, non_blocking=True)
        losses = self.losses(denoiser, batch, t, noise)
        return {"loss": losses.mean(), "losses": losses.detach(), "t": t}

    def losses(self, denoiser: nn.Module, batch: Batch, t: Tensor, noise: Tensor) -> Tensor:
        """The loss of each sample at given times (n,) and noise."""
        x0 = batch.latents.float()
        x_t, target = self.objective.corrupt(x0, noise, t), self.objective.target(x0, noise, t)
        weight = self.objective.weight(t)
        with self.precision:
            if batch.preserve is not None:
                target = self._preserved(denoiser, batch, x_t, t, target)
                weight = torch.where(batch.preserve > 0, batch.preserve * weight, weight)
            prediction = self.family.predict(denoiser, x_t, t, batch.cond)
        return mean_squared_error(prediction, target, weight)

    @torch.no_grad()
    def _preserved(self, denoiser: nn.Module, batch: Batch, x_t: Tensor, t: Tensor, target: Tensor) -> Tensor:
        """The target, and for samples to preserve what the untuned network predicts."""
        assert self.untuned is not None and batch.preserve is not None
        rows = batch.preserve.nonzero()[:, 0]
        with self.untuned(denoiser):
            kept = self.family.predict(
                denoiser, x_t[rows], t[rows], {k: v[rows] for k, v in batch.cond.items()}
            )
        return target.index_copy(0, rows, kept.to(target.dtype))

    @torch.no_grad()
    def held_out(self, denoiser: nn.Module, batches: Sequence[Batch], device: torch.device) -> Tensor:
        """Loss of each batch at each of `QUANTILES`, with fixed noise: shape (batches, quantiles).

        Noise levels and noise are the same in every call, so two calls differ by the network alone.
        """
        times = self.objective.quantile(torch.tensor(QUANTILES))
        was_training = denoiser.training
        denoiser.eval()
        rows = []
        for batch in batches:
            batch = batch.to(device)
            row = []
            for q, t in enumerate(times):
                generator = torch.Generator().manual_seed(stable_hash("held out", *batch.names, q))
                noise = torch.randn(batch.latents.shape, generator=generator).to(device)
                row.append(
                    self.losses(denoiser, batch, t.expand(len(batch.latents)).to(device), noise).mean()
                )
            rows.append(torch.stack(row))
        denoiser.train(was_training)
        return torch.stack(rows) if rows else torch.zeros(0, len(QUANTILES), device=device)


def stable_hash(*parts: Any) -> int:
    """A 63-bit hash that is the same in every process: the seed of a micro-batch."""
    import hashlib

    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "little") >> 1
