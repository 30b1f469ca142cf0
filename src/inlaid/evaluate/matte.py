"""What can be measured of a transparent video's matte without knowing the true one.

None of these says that a matte is good: smoke is soft and glass has no edge of its own. They say what changed
between two videos of one prompt. Where the truth is known, see `inlaid.mattes`.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from inlaid import mattes, rgba
from inlaid.evaluate import video
from inlaid.evaluate.video import Metric

AWAY = 0.08
"""What is further from the subject than this share of the picture's longer side should be clear."""
SOME = 16
"""Frames of a long video in which edges are looked for."""
REACH = 2
"""Pixels that an edge of colour may be away from an edge of the matte."""

METRICS: Mapping[str, Metric] = {
    "coverage": Metric(
        "coverage", "cover", "% of picture", 1, "", "Mean alpha: how much of the picture is covered."
    ),
    "soft": Metric(
        "soft share", "soft", "% of pixels", 1, "", "Share of pixels that are neither clear nor opaque."
    ),
    "matte_flicker": Metric(
        "matte flicker",
        "m.flick",
        "% of range",
        2,
        "lower",
        "Alpha that jumps and comes back where motion does not explain it, in percent of its range.",
    ),
    "haze": Metric(
        "haze",
        "haze",
        "% of range",
        2,
        "lower",
        "Mean alpha away from the subject, where it should be clear: a background that was left in.",
    ),
    "edges": Metric(
        "edge agreement",
        "edges",
        "% of edge",
        0,
        "",
        "Share of the matte's edge that has an edge of the straight colour beside it.",
    ),
}
"""What `measure` gives, in the order in which it is shown."""

TRUTH: Mapping[str, Metric] = {
    "matte_error": Metric(
        "matte error",
        "m.error",
        "of 255",
        1,
        "lower",
        "Mean absolute error of alpha against the known truth.",
    ),
    "matte_regions": Metric(
        "matte error by region",
        "regions",
        "of 255",
        1,
        "lower",
        "The same, with opaque, soft and clear pixels of the truth weighted alike: all clear and all opaque "
        "have about 128.",
    ),
}
"""What `against` gives, where a prompt says what the true matte is."""


def measure(frames: np.ndarray) -> dict[str, float]:
    """All of `METRICS` for straight uint8 (t, h, w, 4); shares in percent."""
    found = rgba.measure(frames)
    alpha = frames[..., 3].astype(np.float32) / 255
    return {
        "coverage": 100 * found.coverage,
        "soft": 100 * found.soft,
        "matte_flicker": 100 * flicker(alpha),
        "haze": 100 * haze(alpha),
        "edges": 100 * edges(frames),
    }


def against(frames: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """All of `TRUTH` for uint8 RGBA (t, h, w, 4) and the true matte, uint8 (t, h, w)."""
    scores = mattes.score(frames[..., 3], truth)
    return {"matte_error": scores.mae, "matte_regions": scores.balanced}


def flicker(alpha: np.ndarray) -> float:
    """`video.flicker` of alpha (t, h, w) in [0, 1]."""
    small = video.shrink(alpha)
    middle = small[1:-1]
    before, after = (video.compensate(x, middle).moved for x in (small[:-2], small[2:]))
    return video.unsteady(before, middle, after)


def haze(alpha: np.ndarray) -> float:
    """Mean alpha (t, h, w) in [0, 1] further than `AWAY` from all that is at least half opaque.

    0 where nothing is that far; a picture without any subject counts whole.
    """
    alpha = video.shrink(alpha)
    subject = alpha >= 0.5
    away = ~rgba.widened(subject, max(1, round(AWAY * max(alpha.shape[1:]))))
    return float(alpha[away].mean()) if away.any() else 0.0


def edges(frames: np.ndarray) -> float:
    """Share of the matte's edge within `REACH` pixels of an edge of the colour; 0 where it has no edge.

    Colour is looked at as it is, straight: it has to show the subject by itself. An edge of colour is where
    the slope is among the steepest tenth of its picture and over 8 of 255, one of alpha where it is over 64.
    """
    frames = frames[:: max(1, len(frames) // SOME)]
    alpha = frames[..., 3].astype(np.float32)
    grey = video.luma(frames[..., :3]) * 255
    matte, color = _slope(alpha) > 64, _slope(grey)
    steep = np.quantile(color.reshape(len(color), -1), 0.9, axis=1)[:, None, None]
    near = rgba.widened(color > np.maximum(steep, 8), REACH)
    return float(near[matte].mean()) if matte.any() else 0.0


def _slope(y: np.ndarray) -> np.ndarray:
    """Central differences along both axes, their length: (t, h, w)."""
    padded = np.pad(y, ((0, 0), (1, 1), (1, 1)), mode="edge")
    down, across = padded[:, 2:, 1:-1] - padded[:, :-2, 1:-1], padded[:, 1:-1, 2:] - padded[:, 1:-1, :-2]
    return np.hypot(down, across)
