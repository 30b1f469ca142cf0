"""Rule-based evaluation of transparent synthetic clips: checks the visible subject and its alpha.

The subject is a star whose orange half is opaque and whose purple half is semi-transparent like glass. Both
checks must pass. To check the subject, the clip is composited with binary alpha over a plain dark background
and evaluated like an opaque clip. To check alpha, the subject is rendered in each frame with the position,
size and angle that fit the clip best. The alpha of the clip is compared with the alpha of this rendering. The
rules have no learned parts and use no information about the model that generated a clip.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import numpy as np

from inlaid.tiny import judge, world
from inlaid.tiny.rgba_world import BACKDROP, GLASS
from inlaid.tiny.world import SIZE, SUBJECT, Scene

VISIBLE = 64
"""Minimum alpha (0-255) of the pixels that count as visible."""

LEAST_OVERLAP = 0.75
"""Minimum intersection over union of two masks of visible pixels: those of the clip, and those of the
best-fitting rendering of the subject."""

MOST_ERROR = 12.0
"""Maximum mean absolute error of alpha (0-255) over all pixels. For comparison, alpha 0 everywhere has an
error of 16 to 60."""

SEAM = 2.0
"""Minimum distance in pixels from the line between the subject's halves. Closer pixels are ignored, because
the two colors mix there."""

GLASS_RANGE = (0.3, 0.75)
"""Lowest and highest accepted median alpha of the semi-transparent (glass) half, in [0, 1]."""


@dataclass(frozen=True)
class Verdict:
    """Result of the evaluation of one transparent clip."""

    subject: bool
    """True if the clip shows the subject: a star with an orange half and a purple half."""
    alpha: bool
    """True if alpha matches the subject: an opaque half, a semi-transparent (glass) half, and a transparent
    background."""
    error: float
    """Mean absolute error of alpha (0-255), compared with the best-fitting rendering of the subject."""
    overlap: float
    """Intersection over union of two masks of visible pixels: those of the clip, and those of the
    best-fitting rendering of the subject."""
    glass: float
    """Median alpha of the semi-transparent (glass) half, in [0, 1]; NaN if no glass half is found."""

    @property
    def both(self) -> bool:
        """True if the clip passes both checks: subject and alpha."""
        return self.subject and self.alpha


def judge_subject(frames: np.ndarray) -> Verdict:
    """Evaluate a clip that should show the subject.

    The subject is a star with an opaque orange half and a semi-transparent purple half.

    Args:
        frames: straight RGBA, `uint8 (17, 64, 64, 4)`.
    """
    subject = judge.judge_subject(hard_over_dark(frames), SEAM)
    again, glass_side = rerender(frames)
    alpha = frames[..., 3].astype(np.float32)
    error = float(np.abs(alpha - again * 255).mean())
    seen, wanted = alpha >= VISIBLE, again * 255 >= VISIBLE
    overlap = float((seen & wanted).sum() / max(1, (seen | wanted).sum()))
    inner = glass_side & ~judge._neighbors(~(again > 0.4))
    glass = float(np.median(alpha[inner]) / 255) if inner.any() else float("nan")
    fits = overlap >= LEAST_OVERLAP and error <= MOST_ERROR
    low, high = GLASS_RANGE
    return Verdict(subject, bool(fits and low <= glass <= high), error, overlap, glass)


def hard_over_dark(frames: np.ndarray) -> np.ndarray:
    """Composite a clip over a dark background without blending, and return `uint8 (t, h, w, 3)`.

    A pixel keeps its color if its alpha is at least `VISIBLE`. Otherwise, it gets the background color.
    """
    ground = np.array(BACKDROP, dtype=np.uint8)
    return np.where(frames[..., 3:] >= VISIBLE, frames[..., :3], ground)


@functools.cache
def _template() -> tuple[np.ndarray, float, float, float]:
    """Return a table of signed distances to a star of unit radius, and the area and centroid of the star."""
    return judge._template(SUBJECT)


def rerender(frames: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Render the subject (a two-colored star) in each frame with the pose that fits a clip best.

    Position and size are computed from the visible pixels of the clip. The angle is the multiple of 5 degrees
    with the smallest alpha error.

    Returns:
        Alpha of the rendering, `(t, 64, 64)` in [0, 1], and a mask of its semi-transparent half.
    """
    table, unit, cx, cy = _template()
    axis = np.arange(SIZE) + 0.5
    angles = np.deg2rad(np.arange(0, 360, 5.0))
    cos, sin = np.cos(angles)[:, None, None], np.sin(angles)[:, None, None]
    out, side = np.zeros(frames.shape[:3], np.float32), np.zeros(frames.shape[:3], dtype=bool)
    for t, alpha in enumerate(frames[..., 3].astype(np.float32) / 255):
        seen = np.clip(alpha / GLASS, 0, 1) * (alpha * 255 >= VISIBLE / 2)
        area = seen.sum()
        if area < 20:
            continue
        radius = np.sqrt(area / unit)
        x, y = (seen.sum(0) * axis).sum() / area, (seen.sum(1) * axis).sum() / area
        dx, dy = (axis[None, :] - x) / radius, (axis[:, None] - y) / radius
        u, v = cos * dx + sin * dy + cx, cos * dy - sin * dx + cy
        star = np.clip(0.5 - world.look_up(table, u, v) * radius, 0, 1)
        right = np.clip(0.5 + u * radius, 0, 1)
        tried = star * (1 - right * (1 - GLASS))
        best = int(np.abs(tried - alpha).mean((1, 2)).argmin())
        out[t], side[t] = tried[best], (right[best] > 0.95) & (star[best] > 0.5)
    return out, side


def judge_world(frames: np.ndarray, scene: Scene) -> bool:
    """Return True if a clip shows its scene and is transparent around the object.

    `judge.judge_scene` checks the scene.
    """
    stated = replace(scene, background=None)
    shown = judge.judge_scene(hard_over_dark(frames), stated)["all"]
    around = ~judge._neighbors(frames[..., 3] >= VISIBLE, 4)
    return bool(shown and around.any() and frames[..., 3][around].mean() <= 8)
