"""Training of an RGBA VAE: trainable weights, loss and files.

An RGBA VAE encodes the color and alpha of a clip in one latent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
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
class TrainedRgbaVae:
    """Trained weights of an RGBA VAE: the merge block and, unless frozen, the color and alpha decoders.

    The merge block maps encoder features of color and alpha to one latent. The class implements
    `inlaid.training.trained.Trained`.
    """

    config: recipe.Config
    section: recipe.RgbaVae
    base: str
    """Hub ID or folder name of the checkpoint whose VAE is extended."""
    folder: str = field(default=rgba_vae_checkpoint.FOLDER, init=False)
    name: str = field(default="RGBA VAE", init=False)
    autocast: bool = field(default=True, init=False)

    def select(self, network: nn.Module) -> list[str]:
        """Return the names of the trainable parameters."""
        trained = ("merge.",) if self.section.train == "merge" else ("merge.", "rgb.", "alpha.")
        return [n for n, _ in network.named_parameters() if n.startswith(trained)]

    def attach(self, network: nn.Module, *, seed: int) -> dict[str, nn.Parameter]:
        """Make the selected weights trainable and return them by name.

        They are converted to float32. If `rgba_vae.init_from` is not set, the trained parts of the RGBA VAE
        are initialized first.
        """
        vae: Any = network
        if self.section.init_from is None:
            rgba_vae_checkpoint.initialize(vae, seed, self.section.init)
        chosen = set(self.select(network))
        for name, parameter in network.named_parameters():
            parameter.requires_grad_(name in chosen)
            if name in chosen:
                parameter.data = parameter.data.float()
        return {n: p for n, p in network.named_parameters() if n in chosen}

    def weights(self, network: nn.Module) -> dict[str, Tensor]:
        """Return all tensors by name except those of the base VAE, including frozen tensors.

        They belong to the merge block and to the decoder's low-rank updates for color and alpha.
        """
        return {n: p for n, p in network.named_parameters() if not n.startswith("vae.")}

    def save(
        self, network: nn.Module, weights: Mapping[str, Tensor], folder: Path, *, metadata: Mapping[str, str]
    ) -> None:
        """Write the weights of the RGBA VAE to `folder`, with a `config.json` that includes `metadata`."""
        vae: Any = network
        section = self.section
        about = {"loss": section.loss, **{n.removeprefix("inlaid_"): v for n, v in metadata.items()}}
        about |= {
            n: getattr(section, n)
            for n in ("hard_mask", "anchor", "noise", "visible", "visible_alpha")
            if getattr(section, n)
        }
        rgba_vae_checkpoint.save(
            vae,
            folder,
            alpha_eps=section.alpha_eps,
            colors=_backgrounds(section),
            about=about,
            weights=weights,
        )

    def step(self, precision: AbstractContextManager[Any]) -> RgbaVaeStep:
        """Return the training step, which computes in the context manager `precision`.

        Raises:
            ValueError: if the perceptual network cannot be loaded.
        """
        return RgbaVaeStep.of(self.section, precision)

    def card(self, step: int, prompts: Sequence[str]) -> str:
        """Return the model card (README) of the weights after `step` steps; `prompts` is not used."""
        data, optim, train, section = self.config.data, self.config.optim, self.config.train, self.section
        settings = {
            "VAE of": self.base,
            "steps": step,
            "samples seen": step * train.batch * train.accumulate,
            "trained": section.train,
            "rank of the decoders": section.rank,
            "loss": section.loss + (", without perceptual terms" if section.perceptual == "none" else ""),
            "largest alpha treated as transparent": f"{section.alpha_eps:.4f}",
            "size": f"{data.size[0]} x {data.size[1]}, {', '.join(map(str, data.frames))} frames",
            "optimizer": f"{optim.name}, learning rate {optim.lr:g}, {optim.schedule}",
        }
        lines = [
            "---\nlibrary_name: inlaid\ntags: [inlaid, wan, rgba, vae]\n---\n",
            f"# RGBA VAE for the VAE of {self.base}\n",
            "A merge block and two low-rank decoders that store color and alpha of a clip in one latent.\n",
            "```yaml\nalpha: {kind: merged, vae: path/to/this/folder}\n```\n",
            "| setting | value |\n|---|---|",
            *[f"| {k} | {v} |" for k, v in settings.items()],
        ]
        return "\n".join(lines) + "\n"


def _backgrounds(section: recipe.RgbaVae) -> Sequence[Sequence[float]]:
    """Return the recipe's background colors, or else the default colors, as RGB in [-1, 1]."""
    return [[c / 127.5 - 1 for c in color] for color in section.colors] or COLORS


@dataclass(frozen=True)
class RgbaVaeStep:
    """Training step of an RGBA VAE. Background colors are chosen at random for each micro-batch."""

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
        section: recipe.RgbaVae,
        precision: AbstractContextManager[Any] | None = None,
        *,
        quiet: bool = False,
    ) -> RgbaVaeStep:
        """Create the training step from the recipe.

        Args:
            section: the `rgba_vae` section of the recipe.
            precision: context manager in which the step computes. Default: no autocast.
            quiet: do not print a note if `perceptual: none` disables loss terms.

        Raises:
            ValueError: if the VGG16 weights cannot be loaded.
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
        weights = (section.anchor, section.noise, section.visible, section.visible_alpha)
        return cls(loss, *weights, _backgrounds(section), precision)

    def __call__(self, denoiser: nn.Module, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """Return the losses of a micro-batch, as described in `Step`.

        The losses are computed for the whole micro-batch, so all samples have the same values in `losses` and
        in each `loss_NAME`.
        """
        if isinstance(self.loss.perceptual, nn.Module):
            self.loss.perceptual.to(batch.latents.device)
        vae: Any = denoiser
        with self.precision:
            terms = rgba_vae_checkpoint.losses(
                vae,
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
        """Reconstruct the clips of all batches, and return one row of error sums per batch.

        A row is the sum of `rgba_vae_metrics.tally` over the clips of the batch. Without batches, the result
        is one row of zeros.
        """
        rows = [torch.zeros(len(COLUMNS), dtype=torch.float64, device=device)] * (not batches)
        for batch in batches:
            true = batch.latents.to(device)
            got = reconstruct(denoiser, true, self.loss.alpha_eps, *batch.names, colors=self.colors)
            rows.append(
                torch.stack([rgba_vae_metrics.tally(*pair) for pair in zip(true, got, strict=True)]).sum(0)
            )
        return torch.stack(rows)

    def summary(self, rows: Tensor) -> dict[str, float]:
        """Return `validation_loss`, and the metrics of `rgba_vae_metrics.report` as `validation_NAME`.

        The validation loss is the mean of `alpha_mae_balanced` and `rgb_mae`.
        """
        found = rgba_vae_metrics.report(rows)
        loss = (found["alpha_mae_balanced"] + found["rgb_mae"]) / 2
        return {"validation_loss": loss, **{f"validation_{n}": v for n, v in found.items()}}


@torch.no_grad()
def reconstruct(
    vae: Any, clips: Tensor, eps: float, *names: str, colors: Sequence[Sequence[float]] = COLORS
) -> Tensor:
    """Encode RGBA clips, decode the latents, and return the reconstructed clips.

    Before encoding, a background color replaces the color of transparent pixels.

    Args:
        vae: the RGBA VAE.
        clips: straight RGBA, uint8 (b, 4, t, h, w), like the result.
        eps: maximum alpha of a transparent pixel, 0 to 1.
        names: strings whose hash selects the background color from `colors`.
        colors: RGB background colors in [-1, 1].
    """
    rgb, alpha = rgba_vae_checkpoint.to_video(clips)
    color = torch.tensor(colors[stable_hash("color", *names) % len(colors)])
    return rgba_vae_checkpoint.to_pixels(
        *vae.decode(vae.encode(hard_render(rgb, alpha, color, eps=eps), alpha))
    )
