"""How far a matte is from the true one, by region, and what predictors that learned nothing would get.

Most of a clip is clear, so that predicting nothing at all has a small error on the average: all clear has
under 15 of 255 wherever the foreground covers less than 6 %. So errors are told for what is opaque, soft and
clear in the truth, and beside them those of all clear, all opaque and the mean.

Mattes are uint8 (t, h, w), straight RGBA is uint8 (t, h, w, 4).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

REGIONS = ("opaque", "soft", "clear")
TRIVIAL = ("all clear", "all opaque", "the mean")
"""Names of the predictors that learned nothing."""

EPS = 2 / 255
"""The truth counts as clear up to this alpha, and as opaque from 1 less this."""

HALF = 128
"""Alpha from which a pixel belongs to the subject, where there is only yes and no."""


@dataclass(frozen=True)
class Scores:
    """How far a matte is from the truth; errors are of 255, and None where a region has no pixels."""

    mae: float
    """Mean absolute error."""
    mse: float
    """Mean squared error, of alpha in [0, 1]."""
    gradient: float
    """Mean absolute difference of the slopes along both axes: edges in the wrong place or too soft."""
    temporal: float
    """Root mean square of the difference of changes from frame to frame (dtSSD, Erofeev et al. 2015), the
    mean over pairs of frames: flicker and lag. 0 for one frame."""
    iou: float
    """Intersection over union of the subjects, alpha at least half; 1 where neither has any."""
    opaque: float | None
    """Mean absolute error where the truth is opaque."""
    soft: float | None
    clear: float | None

    @property
    def balanced(self) -> float:
        """Mean of the errors of the regions that are there, each with the same weight."""
        there = [v for v in (self.opaque, self.soft, self.clear) if v is not None]
        return sum(there) / len(there)


def score(found: np.ndarray, truth: np.ndarray, eps: float = EPS) -> Scores:
    """Compares a matte with the true one.

    Args:
        found: uint8 (t, h, w).
        truth: the same shape.
        eps: see `EPS`.
    """
    assert found.shape == truth.shape and found.dtype == truth.dtype == np.uint8, (found.shape, truth.shape)
    a, b = found.astype(np.float32), truth.astype(np.float32)
    off = np.abs(a - b)
    masks = regions(truth, eps)
    slopes = [np.abs(np.diff(a, axis=i) - np.diff(b, axis=i)) for i in (1, 2)]
    changes = np.diff(a, axis=0) - np.diff(b, axis=0)
    subjects = found >= HALF, truth >= HALF
    union = float((subjects[0] | subjects[1]).sum())
    return Scores(
        mae=_mean(off),
        mse=_mean((off / 255) ** 2),
        gradient=sum(_mean(s) for s in slopes if s.size),
        temporal=_mean(np.sqrt((changes**2).mean((1, 2)))) if len(changes) else 0.0,
        iou=float((subjects[0] & subjects[1]).sum()) / union if union else 1.0,
        **{name: _mean(off[mask]) if mask.any() else None for name, mask in masks.items()},
    )


def _mean(values: np.ndarray) -> float:
    return float(values.mean(dtype=np.float64))


def regions(truth: np.ndarray, eps: float = EPS) -> dict[str, np.ndarray]:
    """Masks of what is opaque, soft and clear in a matte."""
    level = round(255 * eps)
    opaque, clear = truth >= 255 - level, truth <= level
    return {"opaque": opaque, "soft": ~opaque & ~clear, "clear": clear}


def baselines(truth: np.ndarray, eps: float = EPS) -> dict[str, Scores]:
    """Scores of the predictors of `TRIVIAL` for a truth."""
    values = (0, 255, round(float(truth.mean())))
    return {n: score(np.full_like(truth, v), truth, eps) for n, v in zip(TRIVIAL, values, strict=True)}


def mean(scores: list[Scores]) -> Scores:
    """Means over clips; those of a region over the clips that have it."""
    names = Scores.__dataclass_fields__
    columns = {n: [v for s in scores if (v := getattr(s, n)) is not None] for n in names}
    return Scores(**{n: sum(c) / len(c) if c else None for n, c in columns.items()})  # type: ignore[arg-type]


MARGIN = 0.5
"""A matte has to have less than this share of the best trivial predictor's error."""


def faults(found: Scores, trivial: Mapping[str, Scores], margin: float = MARGIN) -> list[str]:
    """Why a matte is not better than what learned nothing; empty when it is.

    The error that counts has each region with the same weight. All clear, all opaque and a grey each get one
    region right or all of them half wrong, whatever the share of the foreground; the plain mean lets them
    pass.

    Args:
        found: of the matte, or the `mean` over clips.
        trivial: from `baselines`, or their means.
        margin: see `MARGIN`.
    """
    name = min(trivial, key=lambda n: trivial[n].balanced)
    best = trivial[name].balanced
    out = []
    if found.balanced >= margin * best:
        out.append(
            f"regions are {found.balanced:.1f} of 255 off on the average, {name} is {best:.1f} off: it "
            f"should be under {margin * best:.1f}"
        )
    for region in REGIONS:
        off, known = (getattr(s, region) for s in (found, trivial[name]))
        if off is not None and off > 127.5:
            out.append(f"what is {region} is {off:.1f} of 255 off, {name} is {known:.1f} off there")
    return out
