"""Training step of an RGBA VAE."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from inlaid import config as recipe
from inlaid.console import say
from inlaid.data.batch import Batch, stable_hash
from inlaid.networks import rgba_vae_checkpoint, rgba_vae_metrics
from inlaid.networks.rgba_vae_losses import COLORS, Perceptual, RgbaLoss, hard_render
from inlaid.networks.rgba_vae_metrics import COLUMNS


@dataclass(frozen=True)
class RgbaVaeStep:
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
    ) -> RgbaVaeStep:
        """Create the step of a recipe; `quiet` suppresses the note about disabled loss terms.

        Raises:
            ValueError: when the perceptual network cannot be loaded.
        """
        from inlaid.alpha.rgba_vae import perceptual_file

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
            terms = rgba_vae_checkpoint.losses(
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
    def validation(self, denoiser: nn.Module, batches: Sequence[Batch], device: torch.device) -> Tensor:
        """Return sums of `rgba_metrics.tally` over the reconstructed clips of each batch."""
        rows = [torch.zeros(len(COLUMNS), dtype=torch.float64, device=device)] * (not batches)
        for batch in batches:
            true = batch.latents.to(device)
            got = reconstruct(denoiser, true, self.loss.alpha_eps, *batch.names, colors=self.colors)
            rows.append(
                torch.stack([rgba_vae_metrics.tally(*pair) for pair in zip(true, got, strict=True)]).sum(0)
            )
        return torch.stack(rows)

    def summary(self, rows: Tensor) -> dict[str, float]:
        """Return `rgba_metrics.report` and the validation loss.

        The validation loss is the mean of the balanced alpha error and the color error.
        """
        found = rgba_vae_metrics.report(rows)
        loss = (found["alpha_mae_balanced"] + found["rgb_mae"]) / 2
        return {"validation_loss": loss, **{f"validation_{n}": v for n, v in found.items()}}


@torch.no_grad()
def reconstruct(
    codec: Any, clips: Tensor, eps: float, *names: str, colors: Sequence[Sequence[float]] = COLORS
) -> Tensor:
    """Encode and decode uint8 (b, 4, t, h, w); the background color is a function of `names`."""
    rgb, alpha = rgba_vae_checkpoint.to_video(clips)
    color = torch.tensor(colors[stable_hash("color", *names) % len(colors)])
    return rgba_vae_checkpoint.to_pixels(
        *codec.decode(codec.encode(hard_render(rgb, alpha, color, eps=eps), alpha))
    )
