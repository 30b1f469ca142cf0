"""Training steps: the losses of one micro-batch, and the measurements on validation clips.

All randomness of a micro-batch (noise, time, colors) is a function of its generator.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from inlaid import config as recipe
from inlaid.console import say
from inlaid.families import Family
from inlaid.models import rgba_codec, rgba_metrics
from inlaid.models.rgba_losses import COLORS, Perceptual, RgbaLoss, hard_render
from inlaid.objectives import Objective, mean_squared_error

QUANTILES = (0.1, 0.3, 0.5, 0.7, 0.9)
"""Quantiles of the noise level distribution at which the validation loss is measured."""


@dataclass(frozen=True)
class Batch:
    """Micro-batch: latents (n, c, t, h, w), conditions, and names of the clips."""

    latents: Tensor
    cond: Mapping[str, Tensor]
    names: Sequence[str] = ()
    preserve: Tensor | None = None
    """Weight of the prior preservation loss of each sample, (n,); 0 trains on the clip itself."""

    @classmethod
    def of(
        cls,
        family: Family,
        clips: Sequence[Mapping[str, Tensor]],
        text: Sequence[Mapping[str, Tensor]],
        names: Sequence[str],
        *seed: Any,
    ) -> Batch:
        """Return a micro-batch of cached clips and captions; randomness in a clip is a function of `seed`."""
        drawn = [
            family.draw(clip, torch.Generator().manual_seed(stable_hash(*seed, "clip", i)))
            for i, clip in enumerate(clips)
        ]
        stacked = {k: torch.stack([d[k] for d in drawn]) for k in drawn[0]}
        return cls(stacked.pop("latents"), {**family.collate(text), **stacked}, names)

    def to(self, device: torch.device) -> Batch:
        """Move the batch to a device; on CUDA from pinned memory, so the copy overlaps with computation."""
        pin = (lambda t: t.pin_memory()) if device.type == "cuda" else (lambda t: t)
        move = lambda t: pin(t).to(device, non_blocking=True)  # noqa: E731
        preserve = None if self.preserve is None else move(self.preserve)
        return Batch(move(self.latents), {k: move(v) for k, v in self.cond.items()}, self.names, preserve)


class Step(Protocol):
    """Callable that returns the losses of one micro-batch; `loss` is required.

    `losses` and every `loss_NAME` have one value per sample; their means are reported.
    """

    def __call__(self, denoiser: nn.Module, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """Return the losses; randomness comes from `generator` on the CPU, the same for every device."""
        ...

    def held_out(self, denoiser: nn.Module, batches: Sequence[Batch], device: torch.device) -> Tensor:
        """Return one row of numbers per batch, the same in every call with the same network."""
        ...

    def summary(self, rows: Tensor) -> dict[str, float]:
        """Return the mean row of all validation batches as named numbers, including the validation loss."""
        ...


def of(
    config: recipe.Config,
    family: Family,
    precision: AbstractContextManager[Any],
    untuned: Callable[[nn.Module], AbstractContextManager[Any]],
) -> Step:
    """Return the step of a recipe."""
    if isinstance(config.tuner, recipe.Codec):
        return CodecStep.of(config.tuner, precision)
    objective = family.objective(config.objective, config.data.size)
    return DenoisingStep(family, objective, precision, untuned)


@dataclass(frozen=True)
class DenoisingStep:
    """Denoising loss: mean of w(t) (prediction - target)^2 in float32.

    For samples with prior preservation (Ruiz et al. 2023, section 3.2) the target is the prediction of the
    network without its adapter, as in learning without forgetting (Li & Hoiem 2016). This target contains no
    noise.
    """

    family: Family
    objective: Objective
    precision: AbstractContextManager[Any] = field(
        default_factory=lambda: torch.autocast("cpu", enabled=False)
    )
    untuned: Callable[[nn.Module], AbstractContextManager[Any]] | None = None
    """Context that disables the trained weights; needed for batches with prior preservation."""

    def __call__(self, denoiser: nn.Module, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """Return the losses of a micro-batch; see `Step`."""
        n, device = len(batch.latents), batch.latents.device
        t = self.objective.sample_time(n, generator).to(device)
        noise = torch.randn(batch.latents.shape, generator=generator).to(device, non_blocking=True)
        prediction, target, weight = self._predict(denoiser, batch, t, noise)
        pairs = {"losses": (prediction, target)}
        for name, part in self.family.parts(prediction.detach()).items():
            pairs[f"loss_{name}"] = part, self.family.parts(target)[name]
        found = {name: mean_squared_error(*pair, weight) for name, pair in pairs.items()}
        return {"loss": found["losses"].mean(), **{k: v.detach() for k, v in found.items()}, "t": t}

    def losses(self, denoiser: nn.Module, batch: Batch, t: Tensor, noise: Tensor) -> Tensor:
        """Return the loss of each sample at given times (n,) and noise."""
        return mean_squared_error(*self._predict(denoiser, batch, t, noise))

    def _predict(
        self, denoiser: nn.Module, batch: Batch, t: Tensor, noise: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return prediction, target and weight of each sample."""
        x0 = batch.latents.float()
        x_t = self.objective.corrupt(x0, noise, t)
        with self.precision:
            kept = self._untuned(denoiser, batch, x_t, t)
            prediction = self.family.predict(denoiser, x_t, t, batch.cond)
        target, weight = self.objective.target(x0, noise, t), self.objective.weight(t)
        if kept is not None and batch.preserve is not None:
            target = target.index_copy(0, batch.preserve.nonzero()[:, 0], kept.to(target.dtype))
            weight = torch.where(batch.preserve > 0, batch.preserve * weight, weight)
        return prediction, target, weight

    @torch.no_grad()
    def _untuned(self, denoiser: nn.Module, batch: Batch, x_t: Tensor, t: Tensor) -> Tensor | None:
        """Return the base model's prediction for samples with prior preservation; None if there are none."""
        if batch.preserve is None:
            return None
        assert self.untuned is not None
        rows = batch.preserve.nonzero()[:, 0]
        with self.untuned(denoiser):
            cond = {k: v[rows] for k, v in batch.cond.items()}
            return self.family.predict(denoiser, x_t[rows], t[rows], cond)

    @torch.no_grad()
    def held_out(self, denoiser: nn.Module, batches: Sequence[Batch], device: torch.device) -> Tensor:
        """Return the loss of each batch at each of `QUANTILES` with fixed noise: shape (batches, quantiles).

        Noise levels and noise are the same in every call, so two calls differ only by the network.
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

    def summary(self, rows: Tensor) -> dict[str, float]:
        """Return the mean over noise levels, and the loss at each level."""
        losses = rows.tolist()
        values = {f"held_out_q{q:.1f}": v for q, v in zip(QUANTILES, losses, strict=True)}
        return {"held_out_loss": sum(losses) / len(losses), **values}


@dataclass(frozen=True)
class CodecStep:
    """RGBA VAE loss: the terms of `RgbaLoss` over background colors sampled for each micro-batch."""

    loss: RgbaLoss
    anchor: float = 0.0
    noise: float = 0.0
    visible: float = 0.0
    visible_alpha: float = 0.0
    colors: Sequence[Sequence[float]] = COLORS
    precision: AbstractContextManager[Any] = field(
        default_factory=lambda: torch.autocast("cpu", enabled=False)
    )

    @classmethod
    def of(
        cls,
        section: recipe.Codec,
        precision: AbstractContextManager[Any] | None = None,
        *,
        quiet: bool = False,
    ) -> CodecStep:
        """Create the step of a recipe; `quiet` suppresses the note about disabled loss terms.

        Raises:
            ValueError: when the perceptual network cannot be loaded.
        """
        from inlaid.alpha.codec import perceptual_file

        network = None
        precision = precision or torch.autocast("cpu", enabled=False)
        if section.perceptual == "none":
            if not quiet:
                say("note: rgba_vae.perceptual is none: three of the nine terms of the loss are disabled")
        else:
            imagenet = section.vgg_normalize or ("imagenet" if section.loss == "paper" else "none")
            file = perceptual_file(section.perceptual)
            network = Perceptual.load(file, imagenet=imagenet == "imagenet")
        loss = RgbaLoss(section.loss, network, section.alpha_eps, section.edge, section.hard_mask)
        colors = [[c / 127.5 - 1 for c in color] for color in section.colors] or COLORS
        weights = (section.anchor, section.noise, section.visible, section.visible_alpha)
        return cls(loss, *weights, colors, precision)

    def __call__(self, denoiser: nn.Module, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """Return the losses of a micro-batch, see `Step`; terms are batch means, equal for all samples."""
        if isinstance(self.loss.perceptual, nn.Module):
            self.loss.perceptual.to(batch.latents.device)
        codec: Any = denoiser
        with self.precision:
            terms = rgba_codec.losses(
                codec,
                batch.latents,
                self.loss,
                generator,
                anchor=self.anchor,
                noise=self.noise,
                visible=self.visible,
                visible_alpha=self.visible_alpha,
                colors=self.colors,
            )
        each = {f"loss_{n}": t for n, t in terms.items() if n != "loss"} | {"losses": terms["loss"]}
        n = len(batch.latents)
        return {"loss": terms["loss"], **{k: v.detach().expand(n) for k, v in each.items()}}

    @torch.no_grad()
    def held_out(self, denoiser: nn.Module, batches: Sequence[Batch], device: torch.device) -> Tensor:
        """Return sums of `rgba_metrics.tally` over the reconstructed clips of each batch."""
        rows = [torch.zeros(len(rgba_metrics.COLUMNS), dtype=torch.float64, device=device)] * (not batches)
        for batch in batches:
            true = batch.latents.to(device)
            got = reconstruct(denoiser, true, self.loss.alpha_eps, *batch.names, colors=self.colors)
            rows.append(
                torch.stack([rgba_metrics.tally(*pair) for pair in zip(true, got, strict=True)]).sum(0)
            )
        return torch.stack(rows)

    def summary(self, rows: Tensor) -> dict[str, float]:
        """Return `rgba_metrics.report` and the validation loss.

        The validation loss is the mean of the balanced alpha error and the color error.
        """
        found = rgba_metrics.report(rows)
        loss = (found["alpha_mae_balanced"] + found["rgb_mae"]) / 2
        return {"held_out_loss": loss, **{f"held_out_{n}": v for n, v in found.items()}}


@torch.no_grad()
def reconstruct(
    codec: Any, clips: Tensor, eps: float, *names: str, colors: Sequence[Sequence[float]] = COLORS
) -> Tensor:
    """Encode and decode uint8 (b, 4, t, h, w); the background color is a function of `names`."""
    rgb, alpha = rgba_codec.to_video(clips)
    color = torch.tensor(colors[stable_hash("color", *names) % len(colors)])
    return rgba_codec.to_pixels(*codec.decode(codec.encode(hard_render(rgb, alpha, color, eps=eps), alpha)))


def stable_hash(*parts: Any) -> int:
    """Return a 63-bit hash that is the same in every process; seeds the micro-batches."""
    import hashlib

    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "little") >> 1
