"""Clips in a folder: media files, and image sequences.

An image sequence is a subfolder whose images are the frames of one clip. For example,
`shot_014/shot_014.1001.png` and the frames after it are the clip `shot_014`. Several sequences may also be in
one folder: `a.1001.png` and `b.1001.png` are the first frames of the clips `a.####.png` and `b.####.png`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from inlaid.data import rgba_clips
from inlaid.media import kinds, rgba_images
from inlaid.media.arrays import fit_array
from inlaid.media.kinds import MediaError, Probe, frames_on_show
from inlaid.paths import Root

_MARKS = ("", "frame", "f")
"""Generic words at the start of frame file names, such as `frame` in `frame_0001.png`."""


def caption_file(root: Root, clip: Path) -> Path | None:
    """Return the caption file of a clip, or None if there is none. The suffix may be `.txt` or `.TXT`."""
    found = (root.beside(place, ".txt") for place in rgba_clips.captions(clip))
    return next((f for f in found if f is not None and f.is_file()), None)


def find_entries(root: Root, channels: int) -> list[Path]:
    """Return the clips below a root folder: media files and image sequences.

    A subfolder with images is one clip. There are two exceptions: one of the images has its own caption file,
    or the images form several numbered sequences. If the run trains without alpha (3 channels), the images
    must also be numbered frames of one sequence, because the folder may contain photos.

    In every other folder, images are one clip if their names differ only in the number. There are two
    exceptions: an image in the folder has its own caption file, or the images are probably photos. Probable
    photos are one clip only if there is a caption file for the sequence.
    """
    known = rgba_clips.KNOWN if channels == 4 else kinds.KNOWN
    found: list[Path] = []
    for here, _, names in root.walk():
        visible = {here / n for n in names if n.lower().endswith(known)}
        images = {here / n for n in names if n.lower().endswith(rgba_images.FRAMES)}
        captioned = any(root.beside(f.with_suffix(".txt"), ".txt") for f in images)
        groups = {} if captioned else rgba_images.numbered(sorted(f.name for f in images))
        apart = len(groups) > 1 and sum(map(len, groups.values())) == len(images)
        whole = images and here != root.folder and not captioned and not apart
        if whole and (channels == 4 or _is_sequence(root, here, groups, images)):
            found.append(here)
            visible -= images
        else:
            for name, members in groups.items():
                if caption_file(root, here / name) or _are_frames(name, members, channels):
                    found.append(here / name)
                    visible.difference_update(here / n for n in members)
        found += visible
    return sorted(found)


def _is_sequence(root: Root, folder: Path, groups: dict[str, list[str]], images: set[Path]) -> bool:
    """Return True if the images of a folder are numbered frames of one clip."""
    names = [f.name for f in images]
    if len(images) < 2 or not rgba_images.frame_numbers(names) or len({f.suffix.lower() for f in images}) > 1:
        return False
    if groups and sum(map(len, groups.values())) < len(names):
        return False
    prefix = rgba_images.sequence_name(folder / next(iter(groups), "#")).lower()
    return prefix in (*_MARKS, folder.name.lower()) or caption_file(root, folder) is not None


def _are_frames(name: str, members: Sequence[str], channels: int) -> bool:
    """Return True if numbered images without captions are frames of a clip, not photos.

    A clip has at least three images, and more images than missing numbers. In a run without alpha, JPEG files
    are photos, with two exceptions: a period precedes the number, as in `a.1001.jpg`, or the text before the
    number is empty, `f` or `frame`.
    """
    if len(members) < 3 or missing_frames(members) >= len(members):
        return False
    if channels == 4 or not name.lower().endswith((".jpg", ".jpeg")):
        return True
    return name.partition("#")[0].endswith(".") or rgba_images.sequence_name(Path(name)).lower() in _MARKS


def probe_sequence(path: Path) -> Probe:
    """Return the properties of an image sequence, which has no timestamps.

    Raises:
        MediaError: if an image cannot be read, or the images differ in size.
    """
    probe = rgba_clips.probe_frames(path)
    if not probe.transparent:
        return probe
    ends = rgba_images.read_named(path, [0, probe.frames - 1])
    return replace(probe, opaque=all(bool((f[..., 3] == 255).all()) for f in ends))


def missing_frames(names: Sequence[str]) -> int:
    """Return the number of missing frame numbers between the first and the last image of a sequence."""
    numbers = rgba_images.frame_numbers(names)
    return max(numbers) - min(numbers) + 1 - len(numbers) if len(numbers) > 1 else 0


def read_sequence(
    path: Path,
    start: float,
    frames: int,
    fps: float,
    size: tuple[int, int],
    *,
    rate: float | None = None,
) -> np.ndarray:
    """Read a range of frames from an image sequence: uint8 (t, h, w, 3).

    Frames are scaled to cover `size` and center-cropped. Alpha is composited over white.

    Args:
        path: a folder of images, or a path such as `a.####.png`.
        start: seconds from the first frame.
        frames: number of frames.
        fps: sampling rate in frames per second.
        size: height and width in pixels.
        rate: frame rate of the images. Default: `fps`.

    Raises:
        MediaError: if an image cannot be read, or if the images end before the range does.
    """
    there = len(rgba_images.image_names(path))
    wanted = start + np.arange(frames) / float(fps)
    rate = rate or fps
    chosen = frames_on_show(np.arange(there) / rate, wanted, fps)
    if not there or wanted[-1] > (there - 1) / rate + 0.5 / min(rate, fps) + 1e-3 / fps:
        raise MediaError(
            path, f"has {there} frames, the window needs {frames} from {start:.3f} s", "truncated"
        )
    out = []
    for pixels in rgba_images.read_named(path, chosen):
        if pixels.shape[-1] == 4:
            alpha = pixels[..., 3:].astype(np.float32) / 255
            pixels = (pixels[..., :3] * alpha + 255 * (1 - alpha)).round().astype(np.uint8)
        out.append(fit_array(pixels, size))
    return np.stack(out)
