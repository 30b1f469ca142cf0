"""Steps: one micro-batch to losses. Noise and time of a micro-batch are functions of its generator alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
        return Batch(move(self.latents), {k: move(v) for k, v in self.cond.items()}, self.names)


class Step(Protocol):
    """One micro-batch to losses; `loss` is required, `losses` has one value per sample.

    So has every `loss_NAME`, of which the means are reported too.
    """

    def __call__(self, denoiser: nn.Module, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """Draws what is random from `generator`, on the CPU so that every device sees the same."""
        ...


@dataclass(frozen=True)
class DenoisingStep:
    """Corrupt, predict, compare: loss = mean of w(t) (prediction - target)^2 in float32."""

    family: Family
    objective: Objective
    precision: AbstractContextManager[Any] = field(
        default_factory=lambda: torch.autocast("cpu", enabled=False)
    )

    def __call__(self, denoiser: nn.Module, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """See `Step`."""
        n, device = len(batch.latents), batch.latents.device
        t = self.objective.sample_time(n, generator).to(device)
        noise = torch.randn(batch.latents.shape, generator=generator).to(device, non_blocking=True)
        prediction, target = self._predict(denoiser, batch, t, noise)
        weight, pairs = self.objective.weight(t), {"losses": (prediction, target)}
        for name, part in self.family.parts(prediction.detach()).items():
            pairs[f"loss_{name}"] = part, self.family.parts(target)[name]
        found = {name: mean_squared_error(*pair, weight) for name, pair in pairs.items()}
        return {"loss": found["losses"].mean(), **{k: v.detach() for k, v in found.items()}, "t": t}

    def losses(self, denoiser: nn.Module, batch: Batch, t: Tensor, noise: Tensor) -> Tensor:
        """The loss of each sample at given times (n,) and noise."""
        return mean_squared_error(*self._predict(denoiser, batch, t, noise), self.objective.weight(t))

    def _predict(self, denoiser: nn.Module, batch: Batch, t: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """What the network says, and what it should."""
        x0 = batch.latents.float()
        with self.precision:
            prediction = self.family.predict(denoiser, self.objective.corrupt(x0, noise, t), t, batch.cond)
        return prediction, self.objective.target(x0, noise, t)

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
