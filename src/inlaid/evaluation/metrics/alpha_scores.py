"""Errors of predicted alpha by region, compared with the errors of trivial predictors.

Trivial predictors give the same alpha everywhere: 255, 0, or the mean of the ground truth. If most of a clip
is transparent, the mean error of alpha 0 is small. For example, it is at most 13 (of 255) if the foreground
covers 5 % of the frame. Errors are therefore reported separately for the opaque, soft and transparent regions
of the ground truth.

Alpha is uint8 (t, h, w); straight RGBA is uint8 (t, h, w, 4).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from inlaid.config.sections import ALPHA_EPS
from inlaid.networks.rgba_vae_metrics import GUESSES, REGIONS, regions

HALF = 128
"""Minimum alpha (0-255) of the pixels that form the binary foreground."""


@dataclass(frozen=True)
class Scores:
    """Alpha metrics of a clip. Errors are on a scale of 0 to 255, unless stated otherwise."""

    mae: float
    """Mean absolute error of alpha."""
    mse: float
    """Mean squared error, with alpha in [0, 1]."""
    gradient: float
    """Mean absolute error of the spatial gradients, summed over both axes. It is high for misplaced or
    blurred edges."""
    temporal: float
    """Root mean square error of the change from frame to frame (dtSSD, Erofeev et al. 2015), averaged over
    pairs of frames. It is high for flicker and lag, and 0 for a single frame."""
    iou: float
    """Intersection over union of the predicted and true binary foregrounds (alpha >= `HALF`); 1 if both are
    empty."""
    opaque: float | None
    """Mean absolute error in the opaque region of the ground truth; None if the region is empty. The fields
    `soft` and `transparent` are defined likewise."""
    soft: float | None
    transparent: float | None

    @property
    def balanced(self) -> float:
        """Mean of the errors `opaque`, `soft` and `transparent`; errors that are None are left out."""
        errors = [v for v in (self.opaque, self.soft, self.transparent) if v is not None]
        return sum(errors) / len(errors)


def score(found: np.ndarray, truth: np.ndarray, eps: float = ALPHA_EPS) -> Scores:
    """Return the metrics of predicted alpha against the ground truth.

    Args:
        found: predicted alpha, uint8 (t, h, w).
        truth: true alpha of the same shape.
        eps: tolerance. Pixels count as transparent up to a true alpha of 255 * eps, and as opaque from
            255 * (1 - eps).
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
    """Return the metrics of each trivial predictor in `GUESSES` against a ground truth.

    A trivial predictor gives the same alpha everywhere: 255, 0, or the mean of the ground truth.
    """
    values = (255, 0, round(float(truth.mean())))
    return {n: score(np.full_like(truth, v), truth, eps) for n, v in zip(GUESSES, values, strict=True)}


MARGIN = 0.5
"""Maximum error of predicted alpha, as a share of the best trivial (constant) predictor's error."""


def faults(found: Scores, trivial: Mapping[str, Scores], margin: float = MARGIN) -> list[str]:
    """Return the reasons why predicted alpha is too inaccurate; empty if it is accurate enough.

    The error is compared with the errors of trivial predictors, which give the same alpha everywhere. The
    comparison uses `Scores.balanced`. The mean error over all pixels is not suitable: if the foreground is
    small, it is low for a fully transparent prediction. The error in each region must also be at most half of
    the alpha range.

    Args:
        found: metrics of the predicted alpha of a clip.
        trivial: metrics of the trivial predictors for the same clip, from `baselines`.
        margin: the error must be below this share of the best trivial predictor's error.
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
