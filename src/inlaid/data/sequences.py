"""Clips in a folder: media files, and image sequences.

An image sequence is a subfolder whose images are the frames of one clip. For example,
`shot_014/shot_014.1001.png` and the frames after it are the clip `shot_014`.
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
"""Generic beginnings of the file names of frames, such as `frame` in `frame_0001.png`."""


def caption_file(root: Root, clip: Path) -> Path | None:
    """Return the caption file of a clip, or None if there is none. The suffix may be `.txt` or `.TXT`."""
    found = (root.beside(place, ".txt") for place in rgba_clips.captions(clip))
    return next((f for f in found if f is not None and f.is_file()), None)


def find_entries(root: Root, channels: int) -> list[Path]:
    """Return the clips below a root folder: media files, and folders of frames.

    A subfolder with images is one clip, unless an image in it has a caption file. In a run that trains
    without alpha (3 channels), folders of photos are more usual. Therefore, the images must also be numbered
    frames of one sequence.
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
    """Return the number of missing frame numbers between the first and the last image of a sequence."""
    numbers = [int(m[2]) for n in names if (m := _NUMBERED.fullmatch(n)) and len(m[2]) < 12]
    return max(numbers) - min(numbers) + 1 - len(numbers) if len(numbers) == len(names) > 1 else 0


def read_sequence(folder: Path, start: float, frames: int, fps: float, size: tuple[int, int]) -> np.ndarray:
    """Read a range of frames from a folder of images: uint8 (t, h, w, 3).

    Frames are scaled to cover `size` and center-cropped. Alpha is composited over white.

    Args:
        folder: folder of images.
        start: seconds from the first frame.
        frames: number of frames.
        fps: sampling rate in frames per second; also the assumed frame rate of the images.
        size: height and width in pixels.

    Raises:
        MediaError: if an image cannot be read, or if the images end before the range does.
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
