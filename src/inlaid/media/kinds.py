"""Kinds and properties of media files, selection of frames by time, and the error for unusable files."""

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
"""Additional suffixes of video files that are accepted only in runs with RGBA clips."""

READER = 2
"""Version of the decoding code, which is part of cache keys. Increase it when a code change makes a file
decode to different pixels."""

EPSILON = 1e-6
"""Tolerance for comparing times, in seconds: far below any frame interval, and above float64 rounding."""


class MediaError(FileError):
    """Error for an unusable media file; the message contains path and cause."""


@dataclass(frozen=True)
class Probe:
    """Properties of a clip, obtained without decoding all frames.

    Height and width are those of the displayed frame: after rotation, and with square pixels.
    """

    frames: int
    fps: Fraction | None
    """Frames per second; frames that are displayed longer than others do not lower this rate. None for images
    and for arrays without `fps`, which have no timestamps."""
    height: int
    width: int
    duration: float
    """Duration in seconds, including the display time of the last frame; 0 for clips without timestamps."""
    interval: float = 0.0
    """Median time between frames, in seconds."""
    variable: bool = False
    """True if frame intervals vary by more than the rounding of the container's timestamps."""
    first: float = 0.0
    """Timestamp of the first frame, in seconds. Start times of windows are relative to it."""
    codec: str = ""
    pix_fmt: str = ""
    transparent: bool = False
    """True if the clip has an alpha channel. `read_frames` composites such a clip over white."""
    opaque: bool = False
    """True if the clip has an alpha channel that is opaque in all decoded frames (the first and the last
    ones)."""
    premultiplied: bool = False
    """True if color is probably premultiplied by alpha, as estimated from the decoded frames."""
    conversions: str = ""
    """Conversions of decoded pixels for display, separated by semicolons, such as `deinterlaced;
    mirrored`."""
    orientation: str = ""
    """Rotation or mirroring of the stored frames for display, such as `mirrored`; empty if there is none."""
    untagged: bool = False
    """True if the file does not specify its YUV matrix. In this case, BT.709 is assumed for at least 1280
    columns or 720 rows, and BT.601 for smaller frames."""

    @property
    def hdr(self) -> bool:
        """True if the clip has an HDR transfer function (PQ or HLG) and is therefore tone-mapped."""
        return "(HDR)" in self.conversions


def media_kind(path: Path) -> Kind:
    """Return the kind of a media file (video, image or array) according to its suffix.

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
    """Return the index of the frame that is displayed at each wanted time, with a tolerance.

    Timestamps are rounded, and frame rates differ. Each frame is therefore selected from a time shortly
    before its start. This tolerance is half the interval to the previous frame or half the sampling interval,
    whichever is shorter. If no frame interval exceeds the sampling interval, the result is the nearest frame.
    In a tie, the result is the earlier frame.

    Args:
        stamps: start times of the frames in seconds, ascending, at least one.
        wanted: times in seconds.
        fps: sampling rate in frames per second.
    """
    stamps, wanted = np.asarray(stamps, np.float64), np.asarray(wanted, np.float64)
    step = 1 / float(fps)
    until = np.where(np.diff(stamps) <= step, (stamps[1:] + stamps[:-1]) / 2, stamps[1:] - step / 2)
    return np.searchsorted(until, wanted - EPSILON / 2, side="left")


def available_frames(probe: Probe, fps: float) -> int:
    """Return the number of frames that a clip provides when it is sampled at `fps`.

    The last sample lies at least half a frame interval before the end of the clip. A clip without timestamps
    provides every frame in the file.
    """
    if probe.fps is None:
        return probe.frames
    span = probe.duration - probe.interval
    return int((span + probe.interval / 2) * float(fps) + 1e-3) + 1
