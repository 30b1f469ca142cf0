"""Mean-shifted noise of Wan-Alpha v2 (arXiv 2509.24979, version 2): noise whose mean depends on the subject.

Each latent frame has one Gaussian ellipse G. It describes where the subject is: G is 1 at the center of the
subject, and near 0 far away. The noise of all latent channels has mean (1 - G) * mu, with a constant mu.

In training, the ellipses are fitted to the clip's alpha. In sampling, alpha is not known, so the ellipses are
in the center of the frame or come from a file.

The paper writes the mean as G * mu, where G is 1 *away from* the subject. The released code and this module
use 1 - G instead, as above.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from inlaid.files import load_torch
from inlaid.media import kinds, rgba

if TYPE_CHECKING:
    from torch import Tensor

OPAQUE = 0.5
"""Alpha, 0 to 1, above which a pixel belongs to the subject."""

PART, MOST = 0.2, 0.9
"""Thresholds for the share of subject pixels in a latent cell. Cells above the first threshold determine the
center and size of the ellipse. Cells above the second threshold determine its orientation."""

COVERED, LARGER, TRIES = 0.98, 1.12, 8
"""Share of the subject's cells that the ellipse must contain, factor of each enlargement, and maximum number
of sizes that are tried."""

CENTER = 0.3
"""Half-axes of the default ellipse in sampling, as a fraction of height and width."""


def ellipses(alpha: np.ndarray, stride: tuple[int, int]) -> np.ndarray:
    """Fit an elliptical Gaussian to a clip's alpha for each latent frame, at the size of the latents.

    Args:
        alpha: uint8 (t, h, w).
        stride: video frames per latent frame, and side length of a latent cell in pixels.

    Returns:
        float32 (1 + (t - 1) / stride[0], h / stride[1], w / stride[1]) in [0, 1]. A latent frame without
        opaque pixels is 0 everywhere.
    """
    h, w = (n // stride[1] for n in alpha.shape[1:])
    cells = (alpha > 255 * OPAQUE).reshape(-1, h, stride[1], w, stride[1]).mean((2, 4), dtype=np.float32)
    rest = cells[1:].reshape(-1, stride[0], h, w).mean(1)
    return np.stack([_ellipse(frame) for frame in (cells[0], *rest)])


def _ellipse(cells: np.ndarray) -> np.ndarray:
    """Fit a Gaussian ellipse to one latent frame.

    `cells` (h, w) contains the share of subject pixels in each latent cell.
    """
    points = np.argwhere(cells > PART)[:, ::-1].astype(float)  # x, y
    if not len(points):
        return np.zeros(cells.shape, np.float32)
    if len(points) < 5:
        low, high = points.min(0), points.max(0)
        return gaussian(cells.shape, (low + high) / 2, np.maximum(high - low, 2) / 2, np.eye(2))
    center = points.mean(0)
    along = (points - center) @ _axes(points)
    half = np.maximum(np.ptp(along, axis=0) / 2, 1)
    solid = np.argwhere(cells > MOST)[:, ::-1].astype(float)
    axes = _axes(solid if len(solid) >= 5 else points)
    distance = (((points - center) @ axes / half) ** 2).sum(1)
    best, chosen = -1.0, half
    for i in range(TRIES):
        covered = float((distance <= LARGER ** (2 * i)).mean())
        if covered > best:
            best, chosen = covered, half * LARGER**i
        if covered >= COVERED:
            break
    return gaussian(cells.shape, center, chosen, axes)


def _axes(points: np.ndarray) -> np.ndarray:
    """Return the principal axes of points (n, 2) as columns, the longer axis first."""
    return np.linalg.eigh(np.cov(points, rowvar=False))[1][:, ::-1]


def gaussian(shape: tuple[int, ...], center: Any, half: Any, axes: np.ndarray) -> np.ndarray:
    """Return an elliptical Gaussian, rescaled to [0, 1]: float32 (h, w).

    Before rescaling, the value is exp(-d^2 / 2). The distance d is 0 at the center and 1 on the ellipse with
    the half-axes `half`.

    Args:
        shape: height and width.
        center: x and y of the center.
        half: lengths of the two half-axes.
        axes: matrix (2, 2); each column is the direction (x, y) of one axis.
    """
    y, x = np.mgrid[: shape[0], : shape[1]]
    along = np.stack([x - center[0], y - center[1]], -1) @ axes / half
    values = np.exp(np.maximum(-0.5 * (along**2).sum(-1), -50))
    spread = values.max() - values.min()
    return ((values - values.min()) / max(spread, 1e-9) * (spread > 1e-9)).astype(np.float32)


def centered(shape: tuple[int, ...]) -> np.ndarray:
    """Return a Gaussian ellipse at the center of every latent frame: float32 (t, h, w).

    It is the default in sampling, where the position of the subject is not known.
    """
    _, h, w = shape
    one = gaussian((h, w), ((w - 1) / 2, (h - 1) / 2), (CENTER * w, CENTER * h), np.eye(2))
    return np.broadcast_to(one, shape)


def read_mask(path: Path, stride: tuple[int, int]) -> np.ndarray:
    """Read the noise mask (`alpha.noise_mask`) from a clip or a torch file, float32 (t, h, w), in [0, 1].

    For a clip, the mask is a Gaussian ellipse in each latent frame, which is fitted to the subject. A torch
    file contains the mask itself.

    Args:
        path: the clip or the torch file.
        stride: video frames per latent frame, and pixels per latent cell and side.

    Raises:
        ValueError: if the file cannot be read, shows no subject, or contains values outside [0, 1].
    """
    import torch

    if path.is_dir() or path.suffix.lower() in (*kinds.KNOWN, *kinds.ANIMATED, ".zip"):
        pixels = rgba.read_rgba(path)
        alpha = pixels[..., 3] if (pixels[..., 3] < 255).any() else pixels[..., :3].max(-1)
        if alpha.min() == alpha.max():
            raise ValueError(f"{path}: alpha is {alpha.min()} of 255 in every pixel, so it shows no subject")
        length = (len(alpha) - 1) // stride[0] * stride[0] + 1
        h, w = (n // stride[1] * stride[1] for n in alpha.shape[1:])
        return ellipses(alpha[:length, :h, :w], stride)
    found = load_torch(path)
    if not isinstance(found, torch.Tensor) or found.ndim != 3 or not found.numel():
        raise ValueError(
            f"{path}: not a tensor (t, h, w) of weights; use a clip, or the published gauss_mask"
        )
    found = found.float()
    if not (found.isfinite().all() and found.min() >= 0 and found.max() <= 1):
        raise ValueError(f"{path}: weights must be 0 to 1; use a clip, or the published gauss_mask")
    return found.numpy()


def shifted(noise: Tensor, ellipse: Tensor, mean: float) -> Tensor:
    """Add mean * (1 - ellipse) to noise (n, c, t, h, w).

    `ellipse` is (n, t, h, w). If its t, h and w differ from those of the noise, it is resized by trilinear
    interpolation.
    """
    import torch

    weights = ellipse.to(noise.device, torch.float32)[:, None]
    if weights.shape[2:] != noise.shape[2:]:
        weights = torch.nn.functional.interpolate(weights, noise.shape[2:], mode="trilinear")
    return noise + mean * (1 - weights)
