"""Metrics for the alpha of transparent videos, with and without ground truth.

The function `measure` needs no ground truth. Its metrics cannot prove that alpha is correct, because correct
alpha can be soft (smoke) or have no distinct edge (glass). They show how two videos of the same prompt
differ. The function `against` compares alpha with ground truth.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from inlaid.evaluation.metrics import alpha_scores, video
from inlaid.evaluation.metrics.metric import Metric
from inlaid.media import rgba

AWAY = 0.08
"""Distance from the subject beyond which the metric `haze` expects alpha 0. It is a share of the frame's
longer side."""

SOME = 16
"""Approximate number of frames in which `edges` detects edges; other frames of a long video are skipped."""

REACH = 2
"""Maximum distance in pixels between an alpha edge and a color edge that match."""

METRICS: Mapping[str, Metric] = {
    "coverage": Metric(
        "coverage", "cover", "% of frame", 1, "", "Mean alpha: the share of the frame that is covered."
    ),
    "soft": Metric(
        "soft share", "soft", "% of pixels", 1, "", "Share of pixels that are neither transparent nor opaque."
    ),
    "alpha_flicker": Metric(
        "alpha flicker",
        "a.flick",
        "% of range",
        2,
        "lower",
        "Alpha changes that revert in the next frame and that motion does not explain, in percent of range.",
    ),
    "haze": Metric(
        "haze",
        "haze",
        "% of range",
        2,
        "lower",
        "Mean alpha far from the subject, where it should be 0: leftover background.",
    ),
    "edges": Metric(
        "edge agreement",
        "edges",
        "% of edge",
        0,
        "",
        "Share of the alpha edge with an edge of the straight color next to it.",
    ),
}
"""Descriptions of the metrics that `measure` returns, in display order."""

TRUTH: Mapping[str, Metric] = {
    "alpha_error": Metric(
        "alpha error",
        "a.error",
        "of 255",
        1,
        "lower",
        "Mean absolute error of alpha against the ground truth.",
    ),
    "alpha_regions": Metric(
        "alpha error by region",
        "regions",
        "of 255",
        1,
        "lower",
        "Mean absolute error of alpha, with opaque, soft and transparent ground-truth regions weighted "
        "equally: fully transparent and fully opaque predictions score about 128.",
    ),
}
"""Descriptions of the metrics that `against` returns, for prompts with a known true alpha."""


def measure(frames: np.ndarray) -> dict[str, float]:
    """Return all `METRICS` in percent, for a transparent video (straight RGBA, uint8 (t, h, w, 4))."""
    found = rgba.measure_alpha(frames)
    alpha = frames[..., 3].astype(np.float32) / 255
    return {
        "coverage": 100 * found.coverage,
        "soft": 100 * found.soft,
        "alpha_flicker": 100 * flicker(alpha),
        "haze": 100 * haze(alpha),
        "edges": 100 * edges(frames),
    }


def against(frames: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Return all `TRUTH` metrics, which measure the error of alpha.

    Args:
        frames: RGBA, uint8 (t, h, w, 4).
        truth: true alpha, uint8 (t, h, w).
    """
    scores = alpha_scores.score(frames[..., 3], truth)
    return {"alpha_error": scores.mae, "alpha_regions": scores.balanced}


def flicker(alpha: np.ndarray) -> float:
    """Return the flicker of alpha (t, h, w); alpha and flicker are in [0, 1].

    See `video.flicker` for the definition.
    """
    small = video.shrink(alpha)
    middle = small[1:-1]
    before, after = (video.compensate(x, middle).moved for x in (small[:-2], small[2:]))
    return video.flicker(before, middle, after)


def haze(alpha: np.ndarray) -> float:
    """Return the mean alpha of all pixels that are far from the subject, in [0, 1].

    Pixels with alpha >= 0.5 belong to the subject. A pixel is far if its distance from the subject is more
    than `AWAY` times the longer side of the frame. In a frame without a subject, all pixels are far. The
    result is 0 if no pixel is far.

    Args:
        alpha: (t, h, w) with values in [0, 1].
    """
    alpha = video.shrink(alpha)
    subject = alpha >= 0.5
    away = ~rgba.widened(subject, max(1, round(AWAY * max(alpha.shape[1:]))))
    return float(alpha[away].mean()) if away.any() else 0.0


def edges(frames: np.ndarray) -> float:
    """Return the share of alpha edge pixels that have a color edge within `REACH` pixels.

    A pixel is on an alpha edge if the slope of alpha is above 64 (of 255). A pixel is on a color edge if the
    slope of the gray value is above 8, and is in the top 10% of its frame. The gray value is that of the
    straight color, not of a composite. The result is 0 if there is no alpha edge. In a long video, only about
    `SOME` frames are measured.

    Args:
        frames: straight RGBA, uint8 (t, h, w, 4).
    """
    frames = frames[:: max(1, len(frames) // SOME)]
    alpha = frames[..., 3].astype(np.float32)
    gray = video.luma(frames[..., :3]) * 255
    alpha_edge, color = _slope(alpha) > 64, _slope(gray)
    steep = np.quantile(color.reshape(len(color), -1), 0.9, axis=1)[:, None, None]
    near = rgba.widened(color > np.maximum(steep, 8), REACH)
    return float(near[alpha_edge].mean()) if alpha_edge.any() else 0.0


def _slope(y: np.ndarray) -> np.ndarray:
    """Return twice the gradient magnitude of images (t, h, w); central differences are not halved."""
    padded = np.pad(y, ((0, 0), (1, 1), (1, 1)), mode="edge")
    down, across = padded[:, 2:, 1:-1] - padded[:, :-2, 1:-1], padded[:, 1:-1, 2:] - padded[:, 1:-1, :-2]
    return np.hypot(down, across)
