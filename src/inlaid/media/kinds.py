"""Kinds of media files, their properties, and the errors of reading them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Literal

import numpy as np

Kind = Literal["video", "image", "array"]

Trouble = Literal["unreadable", "truncated", "unfitting", "no-alpha", "constant-alpha", "pair"]

VIDEOS = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v", ".gif")

IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")

ARRAYS = (".npz",)

KNOWN = (*VIDEOS, *IMAGES, *ARRAYS)

ANIMATED = (".apng",)
"""Further video suffixes, which only transparent runs search for."""

READER = 1
"""Version of the output of `read` for the same file and arguments; part of the cache identity."""

EPSILON = 1e-6
"""Seconds below which two time differences are equal; far below any clock, far above float64 rounding."""


class MediaError(ValueError):
    """Error for an unusable file, with its path, the cause and a code."""

    def __init__(self, path: Path, cause: str, code: str = "unreadable") -> None:
        super().__init__(f"{path}: {cause}")
        self.cause = cause
        self.code = code


@dataclass(frozen=True)
class Probe:
    """Properties of a clip that are known without decoding all of it.

    Height and width are those of the displayed frame: rotated, with square pixels.
    """

    frames: int
    fps: Fraction | None
    """Mean frame rate; None for frames without times (images, arrays without `fps`)."""
    height: int
    width: int
    duration: float
    """Seconds, including the duration of the last frame; 0 for frames without times."""
    interval: float = 0.0
    """Median seconds between frames."""
    variable: bool = False
    """True if frame intervals differ by more than the container's rounding."""
    first: float = 0.0
    """Time of the first frame in the file, in seconds; window starts are relative to it."""
    codec: str = ""
    pix_fmt: str = ""
    transparent: bool = False
    """True with an alpha channel, which `read` composites over white."""
    hdr: bool = False
    """True with an HDR transfer function (PQ or HLG), which `read` does not tone-map."""
    untagged: bool = False
    """True if the YUV matrix is unspecified; `read` assumes BT.601 below 720 lines, else BT.709."""


def media_kind(path: Path) -> Kind:
    """Return the kind of a media file by its suffix: video, image or array.

    Raises:
        MediaError: (a ValueError) the suffix is not supported.
    """
    suffix = path.suffix.lower()
    if suffix in (*VIDEOS, *ANIMATED):
        return "video"
    if suffix in IMAGES:
        return "image"
    if suffix in ARRAYS:
        return "array"
    raise MediaError(path, f"`{suffix}` files are not read; convert it to one of {' '.join(KNOWN)}")


# --- time ---------------------------------------------------------------------------------------------------


def nearest_frames(stamps: Sequence[float] | np.ndarray, wanted: Sequence[float] | np.ndarray) -> np.ndarray:
    """Return the index of the timestamp nearest to each wanted time; the earlier one of a tie.

    Args:
        stamps: ascending times in seconds, at least one.
        wanted: times in seconds.
    """
    stamps, wanted = np.asarray(stamps, np.float64), np.asarray(wanted, np.float64)
    middles = (stamps[1:] + stamps[:-1]) / 2
    return np.searchsorted(middles, wanted - EPSILON / 2, side="left")


def available_formats(probe: Probe, fps: float) -> int:
    """Return the number of frames of a clip at `fps`; none is over half an interval past the last frame.

    For frames without times it is the number of frames in the file.
    """
    if probe.fps is None:
        return probe.frames
    span = probe.duration - probe.interval
    return int((span + probe.interval / 2) * float(fps) + 1e-3) + 1
