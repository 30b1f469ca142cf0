"""Kinds and properties of media files, frame times, and the error for unusable files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Literal

import numpy as np

from inlaid.reading import FileError

Kind = Literal["video", "image", "array"]

Trouble = Literal["unreadable", "truncated", "unfitting", "no-alpha", "constant-alpha", "pair"]

VIDEOS = (
    *(".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v", ".gif"),
    *(".ts", ".m2ts", ".mts", ".mpg", ".mpeg", ".3gp", ".flv", ".wmv", ".ogv"),
)

IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".avif")

ARRAYS = (".npz",)

KNOWN = (*VIDEOS, *IMAGES, *ARRAYS)

ANIMATED = (".apng",)
"""Additional video suffixes, searched for only in transparent runs."""

READER = 2
"""Version of the decoded pixels, part of cache keys; increase it when a file gives different pixels."""

EPSILON = 1e-6
"""Seconds below which two times count as equal; far below any frame interval, above float64 rounding."""


class MediaError(FileError):
    """Error for an unusable media file; the message contains path and cause."""


@dataclass(frozen=True)
class Probe:
    """Properties of a clip, obtained without decoding all frames.

    Height and width are those of the displayed frame: after rotation, and with square pixels.
    """

    frames: int
    fps: Fraction | None
    """Frame rate; longer frames do not lower it. None without timestamps (images, arrays without `fps`)."""
    height: int
    width: int
    duration: float
    """Seconds, including the duration of the last frame; 0 for clips without timestamps."""
    interval: float = 0.0
    """Median time between frames, in seconds."""
    variable: bool = False
    """True if frame intervals vary by more than the rounding of the container's timestamps."""
    first: float = 0.0
    """Timestamp of the first frame, in seconds; the start of a window is relative to this time."""
    codec: str = ""
    pix_fmt: str = ""
    transparent: bool = False
    """True with an alpha channel, which `read_frames` composites over white."""
    opaque: bool = False
    """True if that channel is opaque in every frame that was decoded: the first and the last ones."""
    premultiplied: bool = False
    """Guess: color is multiplied by alpha."""
    conversions: str = ""
    """What is done to the pixels for display, separated by semicolons, such as `deinterlaced; mirrored`."""
    orientation: str = ""
    """How the stored frames are turned for display; empty if they are not."""
    untagged: bool = False
    """True if the YUV matrix is unspecified: BT.709 is assumed from 1280x720 on, else BT.601."""

    @property
    def hdr(self) -> bool:
        """True with an HDR transfer function (PQ or HLG), which is tone-mapped."""
        return "(HDR)" in self.conversions


def media_kind(path: Path) -> Kind:
    """Return the kind of a media file by its suffix: video, image or array.

    Raises:
        MediaError: if the suffix is not supported.
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


def frames_on_show(
    stamps: Sequence[float] | np.ndarray, wanted: Sequence[float] | np.ndarray, fps: float
) -> np.ndarray:
    """Return the index of the frame that is displayed at each wanted time.

    A frame is on show until the next one starts. Because timestamps are rounded and rates differ, the next
    frame is already taken half an interval before its start: half the frame interval or half the sampling
    interval, whichever is shorter. For a constant rate this is the nearest frame, in a tie the earlier
    one; a frame that is held longer stays until the next is due.

    Args:
        stamps: ascending times in seconds, at least one.
        wanted: times in seconds.
        fps: sampling rate in frames per second.
    """
    stamps, wanted = np.asarray(stamps, np.float64), np.asarray(wanted, np.float64)
    step = 1 / float(fps)
    until = np.where(np.diff(stamps) <= step, (stamps[1:] + stamps[:-1]) / 2, stamps[1:] - step / 2)
    return np.searchsorted(until, wanted - EPSILON / 2, side="left")


def available_frames(probe: Probe, fps: float) -> int:
    """Return the number of frames that a clip provides when sampled at `fps`.

    Sampling ends at most half a frame interval after the clip's last frame. A clip without timestamps
    provides every frame in the file.
    """
    if probe.fps is None:
        return probe.frames
    span = probe.duration - probe.interval
    return int((span + probe.interval / 2) * float(fps) + 1e-3) + 1
