"""What can be measured of a video without a learned judge: motion, flicker, consistency, sharpness.

Pure functions of uint8 frames (t, h, w, 3); the same frames give the same numbers on every machine. None of
them says that a video is good. They say what changed between two videos of one prompt, and whether that went
towards the training clips.

Motion, flicker and consistency are measured on luma, scaled down by whole factors until its longer side is at
most `LONG` pixels, so that they mean the same at every size and cost little; sharpness and distance see every
pixel. The motion behind them is found by matching blocks, as video codecs do, so that no network for optical
flow is needed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from inlaid import rgba

if TYPE_CHECKING:
    from PIL import Image

LONG = 128
"""Pixels of the longer side at which motion is searched."""
BLOCK = 8
"""Height and width of a block, at that size."""
RADIUS = 6
"""Furthest displacement from frame to frame that is looked for, in pixels along each axis, at that size."""
GAIN = 0.5
"""A block has moved when that leaves less than this share of its difference; noise leaves two thirds."""
STRIDE = 4
"""Displacements are searched over so many frames too, so that slow motion counts."""
STILL = 1 / 255
"""A block that differs by less than one level (mean absolute) is at rest."""

_LUMA = np.array([0.2126, 0.7152, 0.0722], np.float32) / 255
"""BT.709 weights, from uint8 to [0, 1]."""


@dataclass(frozen=True)
class Metric:
    """How a number is told."""

    name: str
    brief: str
    """For narrow tables; empty where they leave it out."""
    unit: str
    digits: int
    better: str
    """`lower`, `higher`, or empty where neither is better by itself."""
    meaning: str


METRICS: Mapping[str, Metric] = {
    "motion": Metric(
        "motion",
        "motion",
        "% per frame",
        2,
        "",
        "How far the picture moves from frame to frame, in percent of its diagonal; a still has 0.",
    ),
    "flicker": Metric(
        "flicker",
        "flicker",
        "% of range",
        2,
        "lower",
        "Brightness that jumps and comes back where motion does not explain it, in percent of its range.",
    ),
    "consistency": Metric(
        "consistency",
        "consist.",
        "correlation",
        3,
        "higher",
        "How well each frame is the one before, moved. 1 is perfect, and a still gets it for nothing.",
    ),
    "sharpness": Metric(
        "sharpness",
        "sharp",
        "Laplacian",
        0,
        "",
        "Variance of the Laplacian: fine detail, noise included; blur lowers it.",
    ),
}
"""What `measure` gives, in the order in which it is shown."""


TRUTH = False
"""A video has no one right answer."""


def right(metrics: Mapping[str, float]) -> None:
    """Says nothing: no metric knows whether a video is as asked."""


def keep(frames: np.ndarray) -> np.ndarray:
    """What the difference of two videos is measured on: all that is seen, alpha over a checkerboard."""
    return rgba.composite(frames, rgba.checkerboard(*frames.shape[1:3])) if frames.shape[-1] == 4 else frames


def picture(frames: np.ndarray) -> Image.Image:
    """Some of its frames in a row."""
    from inlaid.evaluate import page

    return page.strip(keep(frames))


def gauge(frames: np.ndarray, prompt: Any) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """`everything` about a video, which has no parts; its matte against the true one where that is known."""
    metrics = everything(frames)
    if prompt.truth is not None and frames.shape[-1] == 4:
        from inlaid.evaluate import matte

        metrics |= matte.against(frames, prompt.truth(frames))
    return metrics, {}


def everything(frames: np.ndarray) -> dict[str, float]:
    """`METRICS` of frames (t, h, w, 3); with alpha they are measured over grey, and their matte too."""
    if frames.shape[-1] == 3:
        return measure(frames)
    from inlaid.evaluate import matte

    return measure(rgba.composite(frames, np.full(3, 128, np.uint8))) | matte.measure(frames)


def measure(frames: np.ndarray) -> dict[str, float]:
    """All of `METRICS` for uint8 frames (t, h, w, 3); motion and flicker in percent."""
    y = luma(frames)
    small = shrink(y)
    match = compensate(small[:-1], small[1:])
    after = compensate(small[2:], small[1:-1]).moved
    return {
        "motion": 100 * _motion(small, match),
        "flicker": 100 * unsteady(match.moved[:-1], small[1:-1], after),
        "consistency": _consistency(match.moved, small[1:]),
        "sharpness": _sharpness(y),
    }


def motion(frames: np.ndarray) -> float:
    """Mean displacement of blocks from frame to frame, as a share of the picture's diagonal.

    In [0, `RADIUS` sqrt(2) / diagonal]: 0 for a still picture and for noise without motion. A picture that
    moves as a whole by d pixels a frame gives d / diagonal, up to the strip that enters; an object that fills
    a tenth of it a tenth of that. The slowest motion that counts is a pixel in `STRIDE` frames, at the scale
    of `LONG`.
    """
    small = shrink(luma(frames))
    return _motion(small, compensate(small[:-1], small[1:]))


def flicker(frames: np.ndarray) -> float:
    """Mean brightness by which a pixel jumps away from both neighbours in time, along its motion; in [0, 1].

    |Y_k - median(P, Y_k, N)|, with P and N the frames before and after, moved onto frame k: what a
    motion-compensated temporal median filter would take out. 0 for stills, for any motion that matching
    follows, for fades and for cuts, which change but do not come back. Brightness that alternates by a gives
    a; independent noise of deviation s without motion gives s / sqrt(pi). Fewer than three frames give 0.
    (VBench's temporal flickering, Huang et al. 2024, is the mean difference of neighbours: it counts motion
    as flicker and is meant for stills. The warping error of Lai et al. 2018 needs learned flow.)
    """
    small = shrink(luma(frames))
    middle = small[1:-1]
    return unsteady(compensate(small[:-2], middle).moved, middle, compensate(small[2:], middle).moved)


def consistency(frames: np.ndarray) -> float:
    """Mean correlation of each frame with the one before, moved onto it; in [-1, 1].

    1 for stills and for motion that matching follows, near 0 for unrelated frames, whatever their brightness
    and contrast. Frames without contrast count as 1 where both are flat and as 0 where one is. One frame
    alone gives 1.
    """
    small = shrink(luma(frames))
    return _consistency(compensate(small[:-1], small[1:]).moved, small[1:])


def sharpness(frames: np.ndarray) -> float:
    """Variance of the Laplacian of luma in levels of 255, the mean over frames (Pech-Pacheco et al. 2000).

    0 for pictures without detail, ramps included; a checkerboard of single black and white pixels has the
    most, 1020^2.
    """
    return _sharpness(luma(frames))


def distance(a: np.ndarray, b: np.ndarray) -> float:
    """Mean absolute difference of two videos of one shape, in [0, 1]: 1 is black against white."""
    assert a.shape == b.shape, "videos of one prompt have one shape"
    total = sum(
        float(np.abs(x.astype(np.int16) - y).mean(dtype=np.float64)) for x, y in zip(a, b, strict=True)
    )
    return total / len(a) / 255


def luma(frames: np.ndarray) -> np.ndarray:
    """BT.709 luma of uint8 RGB (t, h, w, 3) as float32 (t, h, w) in [0, 1]."""
    assert frames.dtype == np.uint8 and frames.ndim == 4 and frames.shape[-1] == 3 and len(frames), (
        frames.shape
    )
    red, green, blue = _LUMA
    return frames[..., 0] * red + frames[..., 1] * green + frames[..., 2] * blue


def shrink(y: np.ndarray, long: int = LONG) -> np.ndarray:
    """(t, h, w) with the longer side scaled down to `long` by the least whole factor, averaging squares."""
    t, h, w = y.shape
    n = -(-max(h, w) // long)
    h, w = h // n or 1, w // n or 1
    return y[:, : h * n, : w * n].reshape(t, h, min(n, y.shape[1]), w, min(n, y.shape[2])).mean(axis=(2, 4))


@dataclass(frozen=True)
class Match:
    """Frames moved onto other frames, block by block."""

    moved: np.ndarray
    """(t, h, w)"""
    lengths: np.ndarray
    """Of the displacements in pixels: (t, blocks down, blocks across)."""
    errors: np.ndarray
    """Mean absolute differences that are left: (t, blocks down, blocks across)."""


def compensate(source: np.ndarray, target: np.ndarray, radius: int = RADIUS) -> Match:
    """Moves the blocks of each source frame to where they are in the target frame.

    A block stays where it is unless moving it removes most of its difference (`GAIN`); of equally good
    displacements the shortest is taken. So neither noise nor plain areas move.

    Args:
        source: (t, h, w) in [0, 1].
        target: the same shape.
        radius: furthest displacement along each axis.
    """
    t, h, w = target.shape
    far = np.pad(source, ((0, 0), (radius, radius), (radius, radius)), mode="edge")
    rows, columns = np.arange(0, h, BLOCK), np.arange(0, w, BLOCK)
    pixels = np.diff(rows, append=h)[:, None] * np.diff(columns, append=w)

    def error(y: int, x: int) -> np.ndarray:
        difference = far[:, radius + y : radius + y + h, radius + x : radius + x + w] - target
        np.abs(difference, out=difference)
        return np.add.reduceat(np.add.reduceat(difference, rows, axis=1), columns, axis=2) / pixels

    steps = [(y, x) for y in range(-radius, radius + 1) for x in range(-radius, radius + 1)]
    steps.sort(key=lambda s: (s[0] ** 2 + s[1] ** 2, s))
    rest = error(0, 0)
    best, chosen = np.where(rest > STILL, rest * GAIN, 0), np.zeros(rest.shape, np.intp)
    for i, step in enumerate(steps[1:], 1):
        found = error(*step)
        better = found < best - 1e-6
        best[better], chosen[better] = found[better], i
    shift = np.array(steps)[chosen]
    each = shift.repeat(BLOCK, axis=1)[:, :h].repeat(BLOCK, axis=2)[:, :, :w] + radius
    t_, y_, x_ = np.ogrid[:t, :h, :w]
    moved = far[t_, y_ + each[..., 0], x_ + each[..., 1]]
    return Match(moved, np.hypot(shift[..., 0], shift[..., 1]), np.where(chosen > 0, best, rest))


def _motion(y: np.ndarray, match: Match) -> float:
    """Mean displacement of (t, h, w), given the match of each frame with the one before."""
    lengths = match.lengths
    if len(y) > STRIDE:
        slow, fast, lengths = (
            compensate(y[:-STRIDE], y[STRIDE:]),
            match.errors[STRIDE - 1 :],
            lengths[STRIDE - 1 :],
        )
        # Over several frames, what moves fast is out of reach, and something else may fit half as badly.
        good = (slow.lengths > 0) & ((lengths == 0) | (slow.errors <= fast + STILL))
        lengths = np.where(good, slow.lengths / STRIDE, lengths)
    return float(lengths.mean(dtype=np.float64) / np.hypot(*y.shape[1:])) if lengths.size else 0.0


def unsteady(before: np.ndarray, middle: np.ndarray, after: np.ndarray) -> float:
    """Mean distance of frames from the median of themselves and their neighbours, moved onto them."""
    if not len(middle):
        return 0.0
    median = np.maximum(np.minimum(before, middle), np.minimum(np.maximum(before, middle), after))
    return float(np.abs(middle - median).mean(dtype=np.float64))


def _consistency(before: np.ndarray, now: np.ndarray) -> float:
    if not len(now):
        return 1.0
    a, b = (x - x.mean(axis=(1, 2), keepdims=True, dtype=np.float64) for x in (before, now))
    norms = np.sqrt((a**2).mean(axis=(1, 2))), np.sqrt((b**2).mean(axis=(1, 2)))
    flat = norms[0] < STILL / 10, norms[1] < STILL / 10
    both = (a * b).mean(axis=(1, 2)) / np.maximum(norms[0] * norms[1], 1e-12)
    return float(np.where(flat[0] & flat[1], 1.0, np.where(flat[0] | flat[1], 0.0, both)).mean())


def _sharpness(y: np.ndarray) -> float:
    if min(y.shape[1:]) < 3:
        return 0.0
    variances = []
    for frame in y * np.float32(255):
        laplacian = (
            frame[:-2, 1:-1] + frame[2:, 1:-1] + frame[1:-1, :-2] + frame[1:-1, 2:] - 4 * frame[1:-1, 1:-1]
        )
        variances.append(laplacian.var(dtype=np.float64))
    return float(np.mean(variances))
