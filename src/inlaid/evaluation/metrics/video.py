"""Video metrics without a learned model: motion, flicker, consistency, sharpness and distance.

All functions are pure and take uint8 frames (t, h, w, 3); the same frames give the same numbers on every
machine. No metric proves that a video is good. The metrics show what changed between two videos of the same
prompt, and whether the change brings the videos closer to the training clips.

Motion, flicker and consistency are computed on luma. The luma is downscaled by an integer factor until its
longer side is at most `LONG` pixels, so these metrics are fast and comparable across sizes. Sharpness and
distance use every pixel. Motion is estimated by block matching, as in video codecs, without an optical flow
network.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from inlaid.evaluation.metrics.metric import Metric

LONG = 128
"""Maximum longer side of frames for motion estimation, in pixels; larger frames are downscaled."""

BLOCK = 8
"""Height and width in pixels of a block in block matching, after downscaling to `LONG`."""

RADIUS = 6
"""Maximum displacement of a block between two frames, in pixels along each axis, after downscaling to
`LONG`."""

GAIN = 0.5
"""Threshold for moved blocks: a block counts as moved if motion compensation leaves less than this share of
its frame difference.

In pure noise, about two thirds of the difference remain, so blocks of noise do not count as moved."""

STRIDE = 4
"""Distance in frames between the two frames that a second block matching compares. It detects slow motion."""

STILL = 1 / 255
"""Mean absolute frame difference below which a block is static, equal to one level of 255."""

_LUMA = np.array([0.2126, 0.7152, 0.0722], np.float32) / 255
"""BT.709 luma weights for uint8 RGB; the resulting luma is in [0, 1]."""

METRICS: Mapping[str, Metric] = {
    "motion": Metric(
        "motion",
        "motion",
        "% per frame",
        2,
        "",
        "Mean displacement from frame to frame, in percent of the diagonal; 0 for a still.",
    ),
    "flicker": Metric(
        "flicker",
        "flicker",
        "% of range",
        2,
        "lower",
        "Brightness changes that revert in the next frame and that motion does not explain, in percent of "
        "range.",
    ),
    "consistency": Metric(
        "consistency",
        "consist.",
        "correlation",
        3,
        "higher",
        "Correlation of each frame with the motion-compensated previous frame. A still also scores 1.",
    ),
    "sharpness": Metric(
        "sharpness",
        "sharp",
        "Laplacian",
        0,
        "",
        "Variance of the Laplacian: amount of fine detail, including noise; blur lowers it.",
    ),
}
"""Descriptions of the metrics that `measure` returns, in display order."""


def measure(frames: np.ndarray) -> dict[str, float]:
    """Return all `METRICS` of a video.

    Args:
        frames: uint8 (t, h, w, 3).

    Returns:
        Values by metric name. Motion and flicker are in percent.
    """
    y = luma(frames)
    small = shrink(y)
    match = compensate(small[:-1], small[1:])
    after = compensate(small[2:], small[1:-1]).moved
    return {
        "motion": 100 * _motion(small, match),
        "flicker": 100 * flicker(match.moved[:-1], small[1:-1], after),
        "consistency": _consistency(match.moved, small[1:]),
        "sharpness": _sharpness(y),
    }


def distance(a: np.ndarray, b: np.ndarray) -> float:
    """Return the mean absolute difference of two uint8 videos of equal shape, in [0, 1].

    The difference of a black and a white video is 1.
    """
    assert a.shape == b.shape, "videos of one prompt have equal shapes"
    total = sum(
        float(np.abs(x.astype(np.int16) - y).mean(dtype=np.float64)) for x, y in zip(a, b, strict=True)
    )
    return total / len(a) / 255


def luma(frames: np.ndarray) -> np.ndarray:
    """Convert RGB frames, uint8 (t, h, w, 3), to BT.709 luma, float32 (t, h, w) in [0, 1]."""
    assert frames.dtype == np.uint8 and frames.ndim == 4 and frames.shape[-1] == 3 and len(frames), (
        frames.shape
    )
    red, green, blue = _LUMA
    return frames[..., 0] * red + frames[..., 1] * green + frames[..., 2] * blue


def shrink(y: np.ndarray, long: int = LONG) -> np.ndarray:
    """Downscale frames (t, h, w) by the smallest integer factor for which the longer side is at most `long`.

    Each output pixel is the mean of a square of input pixels.
    """
    t, h, w = y.shape
    n = -(-max(h, w) // long)
    h, w = h // n or 1, w // n or 1
    return y[:, : h * n, : w * n].reshape(t, h, min(n, y.shape[1]), w, min(n, y.shape[2])).mean(axis=(2, 4))


@dataclass(frozen=True)
class Match:
    """Result of block matching between source frames and target frames."""

    moved: np.ndarray
    """Source frames (t, h, w), motion-compensated to match the target frames."""
    lengths: np.ndarray
    """Length of each block's displacement in pixels, (t, block rows, block columns)."""
    errors: np.ndarray
    """Mean absolute difference of each block after motion compensation, (t, block rows, block columns)."""


def compensate(source: np.ndarray, target: np.ndarray, radius: int = RADIUS) -> Match:
    """Motion-compensate source frames to target frames by block matching.

    A block counts as moved only if the motion explains most of its frame difference (see `GAIN`). Of equally
    good displacements, the shortest is used. Noise and flat areas therefore have no displacement.

    Args:
        source: (t, h, w) with values in [0, 1].
        target: array of the same shape as `source`.
        radius: maximum displacement along each axis in pixels.
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
    """Return the mean displacement of blocks per frame, as a fraction of the frame's diagonal.

    The result is 0 for a still image and for pure noise. If the whole image moves by d pixels per frame, the
    result is about d / diagonal. It is slightly lower, because new content at the edge has no match. If only
    a tenth of the frame moves in this way, the result is a tenth of this value. The slowest motion that is
    detected is one pixel in `STRIDE` frames.

    Args:
        y: luma (t, h, w), downscaled to `LONG`.
        match: match of each frame with the previous frame.
    """
    lengths = match.lengths
    if len(y) > STRIDE:
        slow, fast, lengths = (
            compensate(y[:-STRIDE], y[STRIDE:]),
            match.errors[STRIDE - 1 :],
            lengths[STRIDE - 1 :],
        )
        # Across several frames, fast motion exceeds the radius, and an unrelated block may match better.
        good = (slow.lengths > 0) & ((lengths == 0) | (slow.errors <= fast + STILL))
        lengths = np.where(good, slow.lengths / STRIDE, lengths)
    return float(lengths.mean(dtype=np.float64) / np.hypot(*y.shape[1:])) if lengths.size else 0.0


def flicker(before: np.ndarray, middle: np.ndarray, after: np.ndarray) -> float:
    """Return the flicker of a video, in [0, 1].

    Flicker is a change of brightness that is not motion and that reverts in the next frame. The flicker of a
    frame Y is the mean of |Y - median(P, Y, N)|. P and N are the previous and the next frame,
    motion-compensated to Y.

    The result is 0 for still images, for motion that block matching detects, and for videos of fewer than
    three frames. It is also 0 for fades and cuts, because they do not revert. For brightness that alternates
    between two values, the result is their difference. For independent Gaussian noise of standard deviation s
    in a still image, it is s / sqrt(pi).

    The temporal flickering of VBench (Huang et al. 2024) is the mean difference of neighboring frames. It
    counts motion as flicker, so it is meant for static scenes. The warping error of Lai et al. 2018 needs
    learned optical flow.

    Args:
        before: previous frames (t, h, w), motion-compensated to `middle`.
        middle: frames (t, h, w) that have a previous and a next frame.
        after: next frames (t, h, w), motion-compensated to `middle`.
    """
    if not len(middle):
        return 0.0
    median = np.maximum(np.minimum(before, middle), np.minimum(np.maximum(before, middle), after))
    return float(np.abs(middle - median).mean(dtype=np.float64))


def _consistency(before: np.ndarray, now: np.ndarray) -> float:
    """Return the mean correlation, in [-1, 1], between frames `now` and motion-compensated frames `before`.

    The result is 1 for still images, near 1 for motion that block matching detects, and near 0 for unrelated
    frames. It does not depend on brightness and contrast. A pair of flat frames counts as 1. A pair with only
    one flat frame counts as 0. The result is 1 if there are no pairs.
    """
    if not len(now):
        return 1.0
    a, b = (x - x.mean(axis=(1, 2), keepdims=True, dtype=np.float64) for x in (before, now))
    norms = np.sqrt((a**2).mean(axis=(1, 2))), np.sqrt((b**2).mean(axis=(1, 2)))
    flat = norms[0] < STILL / 10, norms[1] < STILL / 10
    both = (a * b).mean(axis=(1, 2)) / np.maximum(norms[0] * norms[1], 1e-12)
    return float(np.where(flat[0] & flat[1], 1.0, np.where(flat[0] | flat[1], 0.0, both)).mean())


def _sharpness(y: np.ndarray) -> float:
    """Return the variance of the Laplacian of luma (0-255), averaged over frames (Pech-Pacheco et al. 2000).

    The result is 0 for frames without detail, including linear gradients. The maximum is 1020^2, for a
    checkerboard of black and white squares of one pixel.
    """
    if min(y.shape[1:]) < 3:
        return 0.0
    variances = []
    for frame in y * np.float32(255):
        laplacian = (
            frame[:-2, 1:-1] + frame[2:, 1:-1] + frame[1:-1, :-2] + frame[1:-1, 2:] - 4 * frame[1:-1, 1:-1]
        )
        variances.append(laplacian.var(dtype=np.float64))
    return float(np.mean(variances))
