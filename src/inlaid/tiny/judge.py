"""Rule-based evaluation of synthetic clips: checks whether a clip shows what its caption describes.

The rules have no learned parts and use no information about the model that generated a clip. The foreground
consists of all pixels that differ from the border color. Its hues, outlines, centroids, moments and gradients
are compared with the definitions in `inlaid.tiny.world`. The thresholds are calibrated only on clips that
`world.render` produced. At least 98 % of these clips are accepted, and clips with one wrong attribute are
rejected.
"""

from __future__ import annotations

import colorsys
import functools
from dataclasses import dataclass

import numpy as np

from inlaid.tiny import world
from inlaid.tiny.world import (
    COLORS,
    DIRECTIONS,
    FRAMES,
    SHAPES,
    SIZE,
    SIZES,
    SUBJECT,
    SUBJECT_COLORS,
    TABLE_EXTENT,
    Scene,
)

CONTRAST, EDGE = 42, 0.42
"""Minimum differences between a foreground pixel and the median border color, in the channel with the
largest difference. `CONTRAST` is an absolute value (0-255). `EDGE` is a share of the foreground's median
difference; it keeps soft edges from moving the outline."""

LEAST_OVERLAP = 0.7
"""Minimum intersection over union of two soft masks: the foreground, and the best-fitting template of the
expected shape."""

SOFTNESS = 2
"""Number of 3 x 3 blurs that are applied to soft masks and templates before comparison. They remove about
as much detail as an autoencoder with stride 8. A ring with a half-filled hole still differs from a circle."""

LEAST_COLOR = 0.75
"""Minimum share of the shape's inner pixels that have the expected color."""

LEAST_TRAVEL, MOST_DRIFT = 9.0, 6.5
"""Displacement in pixels between the first and the last frames: the minimum for a moving shape, and the
maximum for a spinning or growing shape."""

LEAST_TURN, LEAST_GROWTH = 60.0, 2.0
"""Minimum rotation in degrees of a spinning shape, and minimum factor by which the area of a growing shape
increases."""

HOLES = (0.3, 0.4, 0.5, 0.6, 0.7)
"""Inner radii of the ring templates, as a share of the outer radius."""

_SYMMETRY = {"square": 4, "triangle": 3, "cross": 4, "heart": 1, SUBJECT: 5}


@dataclass(frozen=True)
class _View:
    """Measurements of a clip; all checks use them."""

    frames: np.ndarray
    """Pixels of the clip, float32 (t, 64, 64, 3) with values 0-255."""
    mask: np.ndarray
    """Foreground mask, bool (t, 64, 64)."""
    matte: np.ndarray
    """Blurred soft foreground mask, float (t, 64, 64) with values in [0, 1]."""
    inner: np.ndarray
    """Foreground mask eroded by one pixel, bool (t, 64, 64)."""
    area: np.ndarray
    """Area of the foreground in each frame, (t,) in pixels."""
    center: np.ndarray
    """Centroid (x, y) of the foreground in each frame, (t, 2) in pixels; NaN in a frame without
    foreground."""


def _neighbors(mask: np.ndarray, steps: int = 1) -> np.ndarray:
    """Dilate a mask by `steps` pixels."""
    for _ in range(steps):
        padded = np.pad(mask, ((0, 0), (1, 1), (1, 1)))
        mask = padded[:, 1:-1, 1:-1] | padded[:, :-2, 1:-1] | padded[:, 2:, 1:-1] | padded[:, 1:-1, :-2]
        mask = mask | padded[:, 1:-1, 2:]
    return mask


def _blurred(images: np.ndarray) -> np.ndarray:
    """Blur images `(n, h, w)` `SOFTNESS` times with the binomial filter (1, 2, 1) along both axes."""
    for _ in range(SOFTNESS):
        padded = np.pad(images, ((0, 0), (1, 1), (1, 1)), mode="edge")
        rows = (padded[:, :-2] + 2 * padded[:, 1:-1] + padded[:, 2:]) / 4
        images = (rows[..., :-2] + 2 * rows[..., 1:-1] + rows[..., 2:]) / 4
    return images


def _look(frames: np.ndarray) -> _View:
    pixels = frames.astype(np.float32)
    border = np.ones((SIZE, SIZE), dtype=bool)
    border[3:-3, 3:-3] = False
    background = np.median(pixels[:, border].reshape(-1, 3), axis=0)
    difference = np.abs(pixels - background).max(axis=-1)
    level = CONTRAST
    if (difference > CONTRAST).any():
        level = max(CONTRAST, EDGE * float(np.median(difference[difference > CONTRAST])))
    mask = difference > level
    solid = np.median(difference[mask]) if mask.any() else 1.0
    matte = _blurred(np.where(_neighbors(mask, 2), np.clip(difference / solid, 0, 1), 0))
    area = mask.sum(axis=(1, 2)).astype(np.float64)
    axis = np.arange(SIZE) + 0.5
    with np.errstate(invalid="ignore", divide="ignore"):
        center = np.stack(
            [(mask.sum(axis=1) * axis).sum(1) / area, (mask.sum(axis=2) * axis).sum(1) / area], axis=1
        )
    return _View(pixels, mask, matte, ~_neighbors(~mask), area, center)


# --- color ------------------------------------------------------------------------------------------------


def _hues(pixels: np.ndarray) -> np.ndarray:
    """Return for each of the `pixels` (n, 3) the index of its color in `COLORS`.

    A pixel of low saturation counts as white. Any other pixel gets the color with the nearest hue.
    """
    high, low = pixels.max(axis=1), pixels.min(axis=1)
    spread = np.maximum(high - low, 1e-3)
    r, g, b = pixels.T
    sector = np.where(
        high == r, ((g - b) / spread) % 6, np.where(high == g, (b - r) / spread + 2, (r - g) / spread + 4)
    )
    names = [name for name in COLORS if name != "white"]
    targets = np.array([colorsys.rgb_to_hsv(*(c / 255 for c in COLORS[name]))[0] * 6 for name in names])
    gap = np.abs(sector[:, None] - targets)
    nearest = np.minimum(gap, 6 - gap).argmin(axis=1)
    white = list(COLORS).index("white")
    index = np.array([list(COLORS).index(name) for name in names])
    return np.where(spread / np.maximum(high, 1) < 0.22, white, index[nearest])


def _has_color(view: _View, color: str) -> bool:
    pixels = view.frames[view.inner]
    return len(pixels) > 0 and bool((_hues(pixels) == list(COLORS).index(color)).mean() >= LEAST_COLOR)


def _has_halves(view: _View, seam: float = 0.0) -> bool:
    """Return True if the subject's two colors are visible on opposite sides of a line.

    The subject is a star with an orange half and a purple half. The line lies midway between the centroids
    of the two colors. Pixels within `seam` pixels of the line do not count toward the shares of the colors.
    """
    first, second = (list(COLORS).index(name) for name in SUBJECT_COLORS)
    shares, sides = [], []
    for t in np.flatnonzero(view.inner.sum(axis=(1, 2)) >= 30):
        y, x = np.nonzero(view.inner[t])
        hues = _hues(view.frames[t][y, x])
        points = np.stack([x, y], axis=1).astype(np.float64)
        one, two = points[hues == first], points[hues == second]
        beside = np.ones(len(points), dtype=bool)
        if len(one) and len(two):
            across = two.mean(axis=0) - one.mean(axis=0)
            middle = (one.mean(axis=0) + two.mean(axis=0)) / 2
            beside = np.abs((points - middle) @ across) >= seam * np.linalg.norm(across)
            apart = np.linalg.norm(across) / np.sqrt(len(points))
            right = np.concatenate([(one - middle) @ across < 0, (two - middle) @ across > 0])
            sides.append(right.mean() if apart > 0.25 else 0.0)
        shares.append([(hues[beside] == color).sum() / max(1, beside.sum()) for color in (first, second)])
    if len(shares) < FRAMES // 2 or not sides:
        return False
    share = np.mean(shares, axis=0)
    return bool(share.min() >= 0.25 and share.sum() >= LEAST_COLOR and np.mean(sides) >= 0.85)


# --- shape ------------------------------------------------------------------------------------------------


@functools.cache
def _template(name: str, hole: float = 0.0) -> tuple[np.ndarray, float, float, float]:
    """Return a grid of signed distances to the shape `name`, and the shape's area and centroid (x, y).

    If `hole` is positive, the shape is instead a ring with outer radius 1 and inner radius `hole`.
    """
    table = world.distance_table(name)
    cells = len(table)
    axis = ((np.arange(cells) + 0.5) / cells * 2 - 1) * TABLE_EXTENT
    if hole:
        away = np.hypot(axis[None, :], axis[:, None])
        table = np.maximum(away - 1, hole - away)
    inside = table < 0
    area = inside.sum() * (2 * TABLE_EXTENT / cells) ** 2
    return (
        table,
        float(area),
        float(axis[np.nonzero(inside)[1]].mean()),
        float(axis[np.nonzero(inside)[0]].mean()),
    )


def _fit(view: _View, t: int, name: str) -> tuple[float, float]:
    """Fit a shape to the foreground in frame `t`; return the best overlap and the shape's radius in pixels.

    The overlap is the intersection over union of soft masks. The shape gets the area and the centroid of the
    foreground. For a ring, all inner radii in `HOLES` are tried.
    """
    if view.area[t] == 0:
        return 0.0, 0.0
    return max(_overlap(view, t, name, hole) for hole in (HOLES if name == "ring" else (0.0,)))


def _overlap(view: _View, t: int, name: str, hole: float) -> tuple[float, float]:
    """Fit a shape to the foreground; return the best overlap and the shape's radius in pixels.

    The overlap is the intersection over union of soft masks. Rotations in steps of 10 degrees are tried.
    """
    table, unit, cx, cy = _template(name, hole)
    matte = view.matte[t]
    radius = np.sqrt(matte.sum() / unit)
    axis = np.arange(SIZE) + 0.5
    dx, dy = (axis[None, :] - view.center[t, 0]) / radius, (axis[:, None] - view.center[t, 1]) / radius
    turns = 1 if name in ("circle", "ring") else 36 // _SYMMETRY[name] + 1
    angles = np.arange(turns) * np.deg2rad(10.0)
    cos, sin = np.cos(angles)[:, None, None], np.sin(angles)[:, None, None]
    u, v = cos * dx + sin * dy + cx, cos * dy - sin * dx + cy
    inside = _blurred(np.clip(0.5 - world.look_up(table, u, v) * radius, 0, 1))
    both, either = np.minimum(inside, matte).sum(axis=(1, 2)), np.maximum(inside, matte).sum(axis=(1, 2))
    return float((both / either).max()), float(radius)


def _shape_scores(view: _View) -> dict[str, float]:
    names = (*SHAPES, SUBJECT)
    if view.area.max() < 30:
        return dict.fromkeys(names, 0.0)
    large = np.flatnonzero(view.area >= 0.7 * view.area.max())
    chosen = large[np.unique(np.linspace(0, len(large) - 1, 6).round().astype(int))]
    return {name: float(np.mean([_fit(view, t, name)[0] for t in chosen])) for name in names}


# --- motion, size, background -----------------------------------------------------------------------------


def _turned(view: _View, shape: str) -> tuple[float, float]:
    """Return the total rotation of a shape in degrees, and how consistent its direction is.

    Clockwise rotation is positive. The consistency is the share of frame-to-frame rotations that have the
    same sign as the total rotation.
    """
    fold = _SYMMETRY[shape]
    axis = np.arange(SIZE) + 0.5
    phases = []
    for t in range(len(view.mask)):
        dx, dy = axis[None, :] - view.center[t, 0], axis[:, None] - view.center[t, 1]
        moment = (view.mask[t] * np.hypot(dx, dy) ** 3 * np.exp(1j * fold * np.arctan2(dy, dx))).sum()
        phases.append(np.angle(moment))
    steps = (np.diff(phases) + np.pi) % (2 * np.pi) - np.pi
    total = steps.sum()
    return float(np.rad2deg(total) / fold), float((np.sign(steps) == np.sign(total)).mean())


def _has_motion(view: _View, scene: Scene) -> bool:
    if view.area.min() < 8:
        return False
    travel = view.center[-3:].mean(axis=0) - view.center[:3].mean(axis=0)
    growth = view.area[-3:].mean() / view.area[:3].mean()
    if scene.motion in DIRECTIONS:
        heading = np.array(DIRECTIONS[scene.motion])
        along = float(travel @ heading)
        across = float(np.abs(travel - along * heading).max())
        return bool(along >= LEAST_TRAVEL and across <= 0.5 * along and 0.5 < growth < 2.0)
    still = float(np.abs(travel).max()) <= MOST_DRIFT
    if scene.motion == "grow":
        return bool(still and growth >= LEAST_GROWTH)
    degrees, steady = _turned(view, scene.shape)
    return bool(still and 0.5 < growth < 2.0 and abs(degrees) >= LEAST_TURN and steady >= 0.7)


def _has_size(view: _View, scene: Scene) -> bool:
    amount = view.matte.sum(axis=(1, 2))
    chosen = range(-3, 0) if scene.motion == "grow" else np.argsort(amount)[-6:-3]
    radius = np.mean([_fit(view, t, scene.shape)[1] for t in chosen])
    small, large = SIZES["small"], SIZES["large"]
    is_large = radius > np.sqrt(small * large)
    return bool(is_large == (scene.size == "large"))


def _background(view: _View) -> str:
    covered = _neighbors(view.mask, 5)
    gray = view.frames.mean(axis=-1)
    seen = (~covered).sum(axis=0)
    mean = np.where(covered, 0, gray).sum(axis=0) / np.maximum(seen, 1)
    free = seen >= 3
    if free.sum() < 200:
        return "plain"
    rows = np.arange(SIZE)[:, None] * np.ones(SIZE)
    slope, offset = np.polyfit(rows[free], mean[free], 1)
    flat = mean - slope * rows - offset
    if flat[free].std() < 4.0:
        return "plain"
    dy, dx = np.gradient(flat)
    well = ~_neighbors(~free[None])[0]
    xx, yy, xy = (dx * dx)[well].sum(), (dy * dy)[well].sum(), (dx * dy)[well].sum()
    coherence = np.hypot(xx - yy, 2 * xy) / max(xx + yy, 1e-6)
    return "striped" if coherence > 0.5 else "dotted"


# --- verdicts ---------------------------------------------------------------------------------------------


def _verdict(view: _View, scene: Scene) -> dict[str, bool]:
    scores = _shape_scores(view)
    best = max(scores, key=scores.__getitem__)
    color = _has_halves(view) if scene.color is None else _has_color(view, scene.color)
    verdict = {
        "shape": best == scene.shape and scores[best] >= LEAST_OVERLAP,
        "color": color,
        "motion": _has_motion(view, scene),
    }
    if scene.size:
        verdict["size"] = _has_size(view, scene)
    if scene.background:
        verdict["background"] = _background(view) == scene.background
    return verdict


def judge_scene(frames: np.ndarray, scene: Scene) -> dict[str, bool]:
    """Check whether a clip shows the scene of its caption.

    Args:
        frames: `uint8 (17, 64, 64, 3)`.
        scene: scene that the caption describes.

    Returns:
        True or False for each of the keys "shape", "color", "motion", "size", "background" and "all". The
        keys "size" and "background" are left out if they are None in the scene.
    """
    verdict = _verdict(_look(frames), scene)
    return verdict | {"all": all(verdict.values())}


def judge_subject(frames: np.ndarray, seam: float = 0.0) -> bool:
    """Return True if a clip shows the subject: a star with an orange half and a purple half.

    Args:
        frames: `uint8 (17, 64, 64, 3)`.
        seam: minimum distance in pixels from the line between the halves. Closer pixels are ignored, because
            orange and purple mix to red there.
    """
    view = _look(frames)
    scores = _shape_scores(view)
    star = max(scores, key=scores.__getitem__) == SUBJECT and scores[SUBJECT] >= LEAST_OVERLAP
    return star and _has_halves(view, seam)


# --- transparency -----------------------------------------------------------------------------------------

LEAST_AGREEMENT = 0.8
"""Minimum intersection over union of two foreground masks, one from alpha and one from color."""


def agreement(frames: np.ndarray) -> float:
    """Return the intersection over union of two foreground masks, one from color and one from alpha.

    Both masks are computed with the same method. With a fixed alpha threshold, their outlines would differ,
    because the VAE of the tiny model blurs small shapes.

    Args:
        frames: straight RGBA, uint8 (t, 64, 64, 4).
    """
    seen, matte = (_look(part).mask for part in (frames[..., :3], np.repeat(frames[..., 3:], 3, -1)))
    return float((seen & matte).sum() / max((seen | matte).sum(), 1))


def judge_alpha(frames: np.ndarray) -> bool:
    """Return True if the foreground in alpha and the foreground in color are about the same.

    If both are empty, the result is False.
    """
    return agreement(frames) >= LEAST_AGREEMENT
