"""Alpha metrics by region, for predicted alpha and for trivial predictors.

Most of a clip is transparent, so a trivial prediction has a small mean error: if the foreground covers less
than 6 %, predicting alpha 0 everywhere has an error below 15 (of 255). Errors are therefore reported
separately for the opaque, soft and transparent regions of the ground truth, and compared with the errors of
three trivial predictors: alpha 255, alpha 0 and the mean alpha.

Alpha is uint8 (t, h, w), straight RGBA is uint8 (t, h, w, 4).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from inlaid.config.sections import ALPHA_EPS
from inlaid.networks.rgba_vae_metrics import GUESSES, REGIONS, regions

HALF = 128
"""Minimum alpha (0-255) of a pixel in the binary foreground."""


@dataclass(frozen=True)
class Scores:
    """Alpha metrics of a clip; errors are on a scale of 0 to 255, None for a region without pixels."""

    mae: float
    """Mean absolute error."""
    mse: float
    """Mean squared error of alpha in [0, 1]."""
    gradient: float
    """Mean absolute difference of the gradients along both axes; high for misplaced or blurred edges."""
    temporal: float
    """Root mean square difference of the frame-to-frame changes (dtSSD, Erofeev et al. 2015), averaged over
    pairs of frames; high for flicker and lag. 0 for one frame."""
    iou: float
    """Intersection over union of the binary foregrounds (see `HALF`); 1 if both are empty."""
    opaque: float | None
    """Mean absolute error in the opaque region of the ground truth; `soft` and `transparent` likewise."""
    soft: float | None
    transparent: float | None

    @property
    def balanced(self) -> float:
        """Mean of the errors of the regions that have pixels, with equal weights."""
        errors = [v for v in (self.opaque, self.soft, self.transparent) if v is not None]
        return sum(errors) / len(errors)


def score(found: np.ndarray, truth: np.ndarray, eps: float = ALPHA_EPS) -> Scores:
    """Return the metrics of predicted alpha against the ground truth.

    Args:
        found: predicted alpha, uint8 (t, h, w).
        truth: true alpha of the same shape.
        eps: width of the transparent and opaque alpha ranges, see `regions`.
    """
    assert found.shape == truth.shape and found.dtype == truth.dtype == np.uint8, (found.shape, truth.shape)
    a, b = found.astype(np.float32), truth.astype(np.float32)
    errors = np.abs(a - b)
    masks = regions(truth, eps)
    slopes = [np.abs(np.diff(a, axis=i) - np.diff(b, axis=i)) for i in (1, 2)]
    changes = np.diff(a, axis=0) - np.diff(b, axis=0)
    subjects = found >= HALF, truth >= HALF
    union = float((subjects[0] | subjects[1]).sum())
    return Scores(
        mae=_mean(errors),
        mse=_mean((errors / 255) ** 2),
        gradient=sum(_mean(s) for s in slopes if s.size),
        temporal=_mean(np.sqrt((changes**2).mean((1, 2)))) if len(changes) else 0.0,
        iou=float((subjects[0] & subjects[1]).sum()) / union if union else 1.0,
        **{name: _mean(errors[mask]) if mask.any() else None for name, mask in masks.items()},
    )


def _mean(values: np.ndarray) -> float:
    return float(values.mean(dtype=np.float64))


def baselines(truth: np.ndarray, eps: float = ALPHA_EPS) -> dict[str, Scores]:
    """Return the metrics of the trivial predictors `GUESSES`, which are constant, against a ground truth."""
    values = (255, 0, round(float(truth.mean())))
    return {n: score(np.full_like(truth, v), truth, eps) for n, v in zip(GUESSES, values, strict=True)}


MARGIN = 0.5
"""Maximum error of predicted alpha, as a share of the error of the best trivial predictor."""


def faults(found: Scores, trivial: Mapping[str, Scores], margin: float = MARGIN) -> list[str]:
    """Return the reasons why predicted alpha is not better than a trivial predictor; empty if it is.

    The comparison uses `Scores.balanced`, which is high for every trivial predictor. The mean over pixels is
    low for a fully transparent prediction if the foreground is small.

    Args:
        found: metrics of the predicted alpha of a clip.
        trivial: result of `baselines` for the clip.
        margin: see `MARGIN`.
    """
    name = min(trivial, key=lambda n: trivial[n].balanced)
    best = trivial[name].balanced
    out = []
    if found.balanced >= margin * best:
        out.append(
            f"the mean alpha error over regions is {found.balanced:.1f} of 255, that of the trivial "
            f"prediction `{name}` {best:.1f}: it should be below {margin * best:.1f}"
        )
    for region in REGIONS:
        error, trivial_error = (getattr(s, region) for s in (found, trivial[name]))
        if error is not None and error > 127.5:
            out.append(
                f"the alpha error in the {region} region is {error:.1f} of 255, that of `{name}` "
                f"{trivial_error:.1f}"
            )
    return out
