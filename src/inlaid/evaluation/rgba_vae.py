"""Evaluation of an RGBA VAE (a VAE for color and alpha) on validation clips.

The report contains errors by alpha region (opaque, soft, transparent), a comparison with trivial (constant)
predictors, and an image.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.table import Table

from inlaid import config as recipe
from inlaid.alpha.opening import build_family
from inlaid.data.batch import Batch
from inlaid.data.prepare import build_cache
from inlaid.files import atomic
from inlaid.media import compositing
from inlaid.networks import rgba_vae_metrics
from inlaid.networks.rgba_vae_checkpoint import FOLDER
from inlaid.networks.rgba_vae_metrics import GUESSES, REGIONS
from inlaid.runs.folder import Run
from inlaid.runs.launch import start_processes
from inlaid.training.rgba_vae import RgbaVaeStep, reconstruct

SHOWN = 8
"""Maximum number of clips in the report image."""


@dataclass(frozen=True)
class RgbaVaeReport:
    """Metrics of an RGBA VAE on validation clips, and the path of the written report."""

    path: Path
    """Path of the JSON file. The report image has the same path with the suffix `.png`."""
    clips: int
    values: dict[str, float]
    """Metrics by name, from `rgba_vae_metrics.report`."""
    warnings: list[str]
    """Warnings from `rgba_vae_metrics.trivial`, such as alpha that is hardly better than a constant
    prediction."""


def evaluate(run: str | Path, *, checkpoint: str | None = None, device: str | None = None) -> RgbaVaeReport:
    """Measure the reconstruction error of a trained RGBA VAE on the validation clips of its run.

    Args:
        run: run folder. The results are written to its subfolder `report/`.
        checkpoint: checkpoint such as `step-000500` or `500`. Default: the final weights, or the newest
            checkpoint if there are no final weights.
        device: device name as in `runtime.device`. Default: the recipe's device.

    Raises:
        ValueError: if the run does not train an RGBA VAE, has no trained weights, or has no validation clips.
    """
    place = Run(Path(run))
    config = place.config()
    values = {"world_size": None, "device": device or config.runtime.device}
    config = recipe.build(recipe.merge(json.loads(config.model_dump_json()), {"runtime": values}))
    section = config.rgba_vae
    if section is None:
        raise ValueError(f"{run}: this run does not train an RGBA VAE; its recipe has no rgba_vae section")
    made = place.checkpoints()
    folder = (place.checkpoint(checkpoint) if checkpoint else place.folder) / FOLDER
    if not folder.is_dir():
        if checkpoint:
            raise ValueError(f"{folder.parent}: this checkpoint has no folder {FOLDER}; name another one")
        if not made:
            raise ValueError(f"{run}: nothing is trained yet; run `inlaid train` first")
        folder = made[-1] / FOLDER
    family = build_family(config)
    with start_processes(config) as ctx:
        batches = build_cache(config, family, place, ctx).validation_batches(family)
        if not batches:
            raise ValueError(f"{run}: no validation clips; set data.validation and train again")
        vae = family.load_denoiser(torch.float32, folder=folder).to(ctx.device).eval()
        step = RgbaVaeStep.of(section.model_copy(update={"perceptual": "none"}), quiet=True)
        rows = step.validation(vae, batches, ctx.device)
        found = rgba_vae_metrics.report(rows.sum(0))
        picture = _picture(step, vae, batches[:SHOWN], ctx.device)
    warnings = rgba_vae_metrics.trivial(found)
    path = place.folder / "report" / "rgba_vae.json"
    with atomic(path) as part:
        part.write_text(json.dumps({"clips": len(batches), **found, "warnings": warnings}, indent=1), "utf-8")
    with atomic(path.with_suffix(".png")) as part:
        picture.save(part)
    return RgbaVaeReport(path, len(batches), found, warnings)


def _picture(
    step: RgbaVaeStep, vae: torch.nn.Module, batches: list[Batch], device: torch.device
) -> Image.Image:
    """Return an image that compares original and reconstructed clips.

    Each row shows the middle frame of one clip: the original and the reconstruction over a checkerboard, then
    the alpha of the original and of the reconstruction. Each batch contributes its first clip.
    """
    rows = []
    for batch in batches:
        true = batch.latents[:1]
        got = reconstruct(vae, true.to(device), step.loss.alpha_eps, *batch.names, colors=step.colors).cpu()
        pair = [x[0, :, x.shape[2] // 2].permute(1, 2, 0).numpy() for x in (true, got)]
        ground = compositing.checkerboard(*pair[0].shape[:2], cell=max(4, pair[0].shape[0] // 8))
        shown = [compositing.composite(x[None], ground)[0] for x in pair]
        rows.append(np.concatenate([*shown, *(x[..., 3:].repeat(3, -1) for x in pair)], axis=1))
    width = max(r.shape[1] for r in rows)
    return Image.fromarray(
        np.concatenate([np.pad(r, ((0, 0), (0, width - r.shape[1]), (0, 0))) for r in rows])
    )


def table(report: RgbaVaeReport) -> Table:
    """Return a table of mean alpha errors (0-255) by region, for the RGBA VAE and trivial predictors.

    A trivial predictor gives all pixels of a clip the same alpha.
    """
    out = Table(title=f"alpha: mean error, 0-255, {report.clips} validation clips", title_justify="left")
    columns = ("all", *REGIONS, "mean of regions")
    for name in ("", *columns):
        out.add_column(name, justify="left" if not name else "right")
    keys = ("", *(f"_{r}" for r in REGIONS), "_balanced")
    for who in ("RGBA VAE", *GUESSES):
        prefix = "" if who == "RGBA VAE" else f"{who.replace(' ', '_')}_"
        each = [report.values.get(f"{prefix}alpha_mae{key}") for key in keys]
        out.add_row(who, *("-" if v is None else f"{v:.2f}" for v in each))
    return out


def text(report: RgbaVaeReport) -> list[str]:
    """Return lines of text: the metrics that `table` does not show, then the warnings."""
    v = report.values
    return [
        (
            f"visible color: mean error {v['rgb_mae']:.2f} (mean-color predictor: "
            f"{v['mean_rgb_mae']:.2f}), PSNR {v['rgb_psnr']:.1f} dB"
        ),
        f"alpha: PSNR {v['alpha_psnr']:.1f} dB, SSIM {v['ssim_alpha']:.3f}",
        (
            f"composited over the eight corner colors of the RGB cube: PSNR {v['composite_psnr']:.1f} dB, "
            f"worst {v['composite_psnr_worst']:.1f} dB; SSIM over black and white {v['ssim_composite']:.3f}"
        ),
        *(f"warning: {w}" for w in report.warnings),
    ]
