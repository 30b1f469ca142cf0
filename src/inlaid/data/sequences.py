"""Clips in a folder: media files, and image sequences, folders whose images are the frames of a clip.

`shot_014/shot_014.1001.png` and the frames after it are one clip with the name `shot_014`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from inlaid.data import rgba_clips
from inlaid.media import kinds, rgba_images
from inlaid.media.arrays import fit_array
from inlaid.media.kinds import MediaError, Probe, frames_on_show
from inlaid.paths import Root

_NUMBERED = re.compile(r"(.*?)(\d+)(\.[^.]+)")

_MARKS = ("", "frame", "f")
"""Prefixes of frame numbers that say nothing about the content of an image."""


def caption_file(root: Root, clip: Path) -> Path | None:
    """Return the existing caption file of a clip, or None; its suffix may be in capitals."""
    found = (root.beside(place, ".txt") for place in rgba_clips.captions(clip))
    return next((f for f in found if f is not None and f.is_file()), None)


def find_entries(root: Root, channels: int) -> list[Path]:
    """Return the clips below a root: files, and folders of frames.

    A subfolder with images is a folder of frames, and thus one clip, unless one of the images has a caption
    file. In an opaque run (3 channels), where photos are more usual, its images must also be numbered.
    """
    known = rgba_clips.KNOWN if channels == 4 else kinds.KNOWN
    found: list[Path] = []
    for here, _, names in root.walk():
        visible = [here / n for n in names if n.lower().endswith(known)]
        images = {here / n for n in names if n.lower().endswith(rgba_images.FRAMES)}
        images = images if here != root.folder else set()
        if images and _is_sequence(root, here, images, channels):
            found.append(here)
            visible = [f for f in visible if f not in images]
        found += visible
    return sorted(found)


def _is_sequence(root: Root, folder: Path, images: set[Path], channels: int) -> bool:
    if any(root.beside(f.with_suffix(".txt"), ".txt") for f in images):
        return False
    if channels == 4:
        return True
    parts = [_NUMBERED.fullmatch(f.name) for f in images]
    stems = {(m[1], m[3].lower()) for m in parts if m}
    if len(images) < 2 or not all(parts) or len(stems) > 1:
        return False
    prefix = next(iter(stems))[0].rstrip("._- ").lower()
    return prefix in (*_MARKS, folder.name.lower()) or caption_file(root, folder) is not None


def probe_sequence(folder: Path) -> Probe:
    """Return the properties of a folder of frames, which has no timestamps.

    Raises:
        MediaError: if an image cannot be read, or the images differ in size.
    """
    probe = rgba_clips.probe_frames(folder)
    if not probe.transparent:
        return probe
    ends = rgba_images.read_named(folder, [0, probe.frames - 1])
    return replace(probe, opaque=all(bool((f[..., 3] == 255).all()) for f in ends))


def missing_frames(names: Sequence[str]) -> int:
    """Return how many frame numbers are missing between the first and the last image of a sequence."""
    numbers = [int(m[2]) for n in names if (m := _NUMBERED.fullmatch(n)) and len(m[2]) < 12]
    return max(numbers) - min(numbers) + 1 - len(numbers) if len(numbers) == len(names) > 1 else 0


def read_sequence(folder: Path, start: float, frames: int, fps: float, size: tuple[int, int]) -> np.ndarray:
    """Read a window of a folder of frames, scaled to cover `size` and center-cropped: uint8 (t, h, w, 3).

    Alpha is composited over white.

    Args:
        folder: folder of images.
        start: seconds from the first frame.
        frames: number of frames.
        fps: sampling rate, which is also the rate of the images.
        size: height and width.

    Raises:
        MediaError: if an image cannot be read, or the sequence ends before the window.
    """
    there = len(rgba_images.image_names(folder))
    wanted = start + np.arange(frames) / float(fps)
    chosen = frames_on_show(np.arange(there) / fps, wanted, fps)
    if not there or wanted[-1] * fps > there - 0.5 + 1e-3:
        raise MediaError(
            folder, f"has {there} frames, the window needs {frames} from {start:.3f} s", "truncated"
        )
    out = []
    for pixels in rgba_images.read_named(folder, chosen):
        if pixels.shape[-1] == 4:
            alpha = pixels[..., 3:].astype(np.float32) / 255
            pixels = (pixels[..., :3] * alpha + 255 * (1 - alpha)).round().astype(np.uint8)
        out.append(fit_array(pixels, size))
    return np.stack(out)
