"""Training steps: the losses of a micro-batch, and the validation loss.

All random values of a micro-batch (noise, timesteps, background colors) come from the generator that is
passed to the step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from inlaid.data.batch import Batch, stable_hash
from inlaid.families import Family
from inlaid.objectives import Objective, mean_squared_error

QUANTILES = (0.1, 0.3, 0.5, 0.7, 0.9)
"""Quantiles of the noise levels in training; the validation loss is measured at these noise levels."""


class Step(Protocol):
    """Training step: a callable that returns the losses of one micro-batch.

    The result contains `loss`, the scalar to minimize, and `losses`, with one value per sample. It may
    contain further losses `loss_NAME`, also with one value per sample. The logged metrics are the means of
    these values.
    """

    def __call__(self, denoiser: nn.Module, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """Return the losses of a micro-batch.

        The `generator` is on the CPU, so that random values are the same for every device.
        """
        ...

    def validation(self, denoiser: nn.Module, batches: Sequence[Batch], device: torch.device) -> Tensor:
        """Return one row of metrics per batch; repeated calls with the same network return the same rows."""
        ...

    def summary(self, rows: Tensor) -> dict[str, float]:
        """Convert mean validation metrics to a mapping from metric name to value.

        Args:
            rows: result of `validation`, averaged over all batches.

        Returns:
            Metrics by name, including `validation_loss`.
        """
        ...


@dataclass(frozen=True)
class DenoisingStep:
    """Training step with the denoising loss: the mean of w(t) (prediction - target)^2, in float32.

    For samples with prior preservation (Ruiz et al. 2023, section 3.2), the target is the prediction of the
    network without its adapter, as in learning without forgetting (Li & Hoiem 2016). Unlike the usual target,
    this prediction depends on the sampled noise only through x_t, so it has less variance.
    """

    family: Family
    objective: Objective
    precision: AbstractContextManager[Any] = field(
        default_factory=lambda: torch.autocast("cpu", enabled=False)
    )
    untuned: Callable[[nn.Module], AbstractContextManager[Any]] | None = None
    """Function that returns a context manager in which the network computes without its adapter. Required for
    batches with prior preservation."""

    def __call__(self, denoiser: nn.Module, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """Return the losses of a micro-batch.

        `losses` has one value per sample, and `loss` is their mean. If the family reports parts of the
        prediction separately, such as color and alpha, `loss_NAME` has one value per sample for the part
        NAME. `t` contains the noise levels (n,).
        """
        n, device = len(batch.latents), batch.latents.device
        t = self.objective.sample_time(n, generator).to(device)
        noise = torch.randn(batch.latents.shape, generator=generator).to(device, non_blocking=True)
        noise = self.family.shift_noise(noise, batch.cond)
        prediction, target, weight = self._predict(denoiser, batch, t, noise)
        pairs = {"losses": (prediction, target)}
        for name, part in self.family.parts(prediction.detach()).items():
            pairs[f"loss_{name}"] = part, self.family.parts(target)[name]
        found = {name: mean_squared_error(*pair, weight) for name, pair in pairs.items()}
        return {"loss": found["losses"].mean(), **{k: v.detach() for k, v in found.items()}, "t": t}

    def losses(self, denoiser: nn.Module, batch: Batch, t: Tensor, noise: Tensor) -> Tensor:
        """Return the loss (n,) of each sample for given noise and given noise levels t (n,) in [0, 1]."""
        return mean_squared_error(*self._predict(denoiser, batch, t, noise))

    def _predict(
        self, denoiser: nn.Module, batch: Batch, t: Tensor, noise: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the prediction, target and loss weight of each sample."""
        x0 = batch.latents.float()
        x_t = self.objective.corrupt(x0, noise, t)
        with self.precision:
            kept = self._untuned(denoiser, batch, x_t, t)
            prediction = self.family.predict(denoiser, x_t, t, batch.cond)
        target, weight = self.objective.target(x0, noise, t), self.objective.weight(t)
        if kept is not None and batch.prior_preservation is not None:
            target = target.index_copy(0, batch.prior_preservation.nonzero()[:, 0], kept.to(target.dtype))
            weight = torch.where(batch.prior_preservation > 0, batch.prior_preservation * weight, weight)
        return prediction, target, weight

    @torch.no_grad()
    def _untuned(self, denoiser: nn.Module, batch: Batch, x_t: Tensor, t: Tensor) -> Tensor | None:
        """Return the base model's predictions for the samples with prior preservation.

        The result is None if `batch.prior_preservation` is None.
        """
        if batch.prior_preservation is None:
            return None
        assert self.untuned is not None
        rows = batch.prior_preservation.nonzero()[:, 0]
        with self.untuned(denoiser):
            cond = {k: v[rows] for k, v in batch.cond.items()}
            return self.family.predict(denoiser, x_t[rows], t[rows], cond)

    @torch.no_grad()
    def validation(self, denoiser: nn.Module, batches: Sequence[Batch], device: torch.device) -> Tensor:
        """Return the loss of each batch at each of several noise levels, (batches, quantiles).

        The noise levels are the quantiles `QUANTILES` of the noise levels in training. The noise depends only
        on the names of the clips and on the quantile. Therefore, repeated calls give different results only
        if the network has changed.
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
                noise = self.family.shift_noise(noise, batch.cond)
                row.append(
                    self.losses(denoiser, batch, t.expand(len(batch.latents)).to(device), noise).mean()
                )
            rows.append(torch.stack(row))
        denoiser.train(was_training)
        return torch.stack(rows) if rows else torch.zeros(0, len(QUANTILES), device=device)

    def summary(self, rows: Tensor) -> dict[str, float]:
        """Return the losses at all noise levels by name, and the mean of the losses as `validation_loss`.

        Each name contains the quantile of its noise level: `validation_q0.1` is the loss at quantile 0.1.
        """
        losses = rows.tolist()
        values = {f"validation_q{q:.1f}": v for q, v in zip(QUANTILES, losses, strict=True)}
        return {"validation_loss": sum(losses) / len(losses), **values}
