"""Clips stored as NumPy arrays; headers are validated before frames are loaded."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
from PIL import Image

from inlaid.media.kinds import MediaError, Probe


def probe_array(path: Path, channels: Sequence[int] = (3,)) -> Probe:
    """Return the properties of an `.npz` clip, without loading its frames.

    Args:
        path: the `.npz` file.
        channels: accepted channel counts; a clip with four channels is RGBA.

    Raises:
        MediaError: if the file has no such frames.
    """
    (t, h, w), (_, c), fps = _header(path, channels)
    interval, names = float(1 / fps) if fps else 0.0, "rgba" if c == 4 else "rgb24"
    return Probe(t, fps, h, w, t * interval, interval, codec="npz", pix_fmt=names, transparent=c == 4)


def fit_array(pixels: np.ndarray, size: tuple[int, int], sar: float = 1.0) -> np.ndarray:
    """Scale RGB pixels to cover `size` and center-crop them, with an antialiased bicubic filter.

    Args:
        pixels: uint8 (h, w, 3).
        size: height and width.
        sar: pixel aspect ratio, width / height.
    """
    height, width = pixels.shape[:2]
    scale = max(size[0] / height, size[1] / (width * sar))
    h, w = size[0] / scale, size[1] / scale / sar
    box = ((width - w) / 2, (height - h) / 2, (width + w) / 2, (height + h) / 2)
    box = (max(box[0], 0.0), max(box[1], 0.0), min(box[2], width), min(box[3], height))
    image = Image.fromarray(np.ascontiguousarray(pixels))
    return np.asarray(image.resize((size[1], size[0]), Image.Resampling.BICUBIC, box=box))


def _header(
    path: Path, channels: Sequence[int]
) -> tuple[tuple[int, int, int], tuple[int, int], Fraction | None]:
    """Read the headers of an `.npz`: (t, h, w), (channel axis, channel count), and `fps` or None."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = [n.removesuffix(".npy") for n in archive.namelist()]
            if "frames" not in names:
                raise MediaError(path, f"has no array `frames`; its arrays are: {', '.join(names) or 'none'}")
            with archive.open("frames.npy") as file:
                version = np.lib.format.read_magic(file)
                reader = (
                    np.lib.format.read_array_header_1_0
                    if version == (1, 0)
                    else np.lib.format.read_array_header_2_0
                )
                shape, _, dtype = reader(file)
        fps = None
        if "fps" in names:
            with np.load(path, allow_pickle=False) as arrays:
                fps = Fraction(float(arrays["fps"])).limit_denominator(1001)
    except MediaError:
        raise
    except (OSError, ValueError, zipfile.BadZipFile, EOFError, TypeError) as error:
        raise MediaError(path, f"is not an npz clip ({error})") from None
    places = [(i, n) for n in channels for i in (3, 0, 1) if len(shape) == 4 and shape[i] == n]
    if dtype != np.uint8 or not places or 0 in shape:
        wants = " or ".join(f"(t, h, w, {n}), ({n}, t, h, w) or (t, {n}, h, w)" for n in channels)
        wants = f"uint8 and {wants}"
        raise MediaError(path, f"`frames` is {dtype} {tuple(shape)}; it must be {wants}")
    if fps is not None and fps <= 0:
        raise MediaError(path, f"`fps` is {fps}; it must be positive")
    t, h, w = (n for i, n in enumerate(shape) if i != places[0][0])
    return (t, h, w), places[0], fps


def load_array(path: Path, channels: Sequence[int] = (3,)) -> tuple[np.ndarray, Fraction | None]:
    """Return the frames of an `.npz`, uint8 (t, h, w, c), and its frame rate, or None if it has no `fps`.

    Args:
        path: the `.npz` file.
        channels: accepted channel counts, in order of preference.

    Raises:
        MediaError: if the file has no such frames or is damaged.
    """
    _, (axis, _), fps = _header(path, channels)
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return np.moveaxis(arrays["frames"], axis, -1), fps
    except (OSError, ValueError, zipfile.BadZipFile, EOFError, zlib.error) as error:
        raise MediaError(path, f"is damaged ({error})", "truncated") from None
