"""Read frames, with or without alpha, from image sequences, archives, and still or animated images.

A sequence is a folder of images, or a set of numbered images such as `shots/a.0001.png`. A set is given by a
path such as `shots/a.####.png`, where `####` stands for the frame number.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from inlaid.media import color
from inlaid.media.images import checked_image, load_image
from inlaid.media.kinds import IMAGES, MediaError
from inlaid.reading import check_member, reading, require_file

FRAMES = (*IMAGES, ".tif", ".tiff")
"""Suffixes of image files that are read as frames from a folder or archive."""

_PATTERN = re.compile(r"([^#]*)#+(\.[^.#]+)")
"""Pattern of sequence names such as `a.####.png`: text, `#` signs, file suffix."""

_NUMBERED = re.compile(r"(.*?)(\d+)(\.[^.]+)")
"""Pattern of frame names such as `a.0001.png`: text, frame number, file suffix."""


def natural(path: Path) -> list[Any]:
    """Return a sort key for the natural order of file names: f9 before f10."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", path.name)]


def frame_pattern(path: Path) -> re.Pattern[str] | None:
    """Return a regular expression for the frame names of a sequence such as `a.####.png`.

    Returns None for other paths, such as an existing file whose name contains `#`.
    """
    found = _PATTERN.fullmatch(path.name)
    if not found or not path.name.lower().endswith(FRAMES) or path.exists():
        return None
    return re.compile(rf"{re.escape(found[1])}\d+{re.escape(found[2])}")


def is_sequence(path: Path) -> bool:
    """Return True for a folder, and for a path that names numbered images, such as `a.####.png`."""
    return path.is_dir() or frame_pattern(path) is not None


def frames_in(path: Path) -> list[Path]:
    """Return the images of a sequence in natural order (9 before 10); empty if there are none.

    Args:
        path: a folder, or a path such as `shots/a.####.png`.
    """
    wanted = frame_pattern(path)
    try:
        there = [
            f
            for f in (path.parent if wanted else path).iterdir()
            if (wanted.fullmatch(f.name) if wanted else f.name.lower().endswith(FRAMES))
            and not f.name.startswith(".")
        ]
    except OSError:
        return []
    return sorted((f for f in there if f.is_file()), key=natural)


def numbered(names: Iterable[str]) -> dict[str, list[str]]:
    """Group file names that differ only in their frame number.

    Returns:
        File names by sequence name, such as `a.####.png` for `a.1001.png` and `a.1002.png`. Single images,
        and names without text before the number, such as `0001.png`, are left out.
    """
    groups: dict[tuple[str, str], list[str]] = {}
    for name in names:
        found = _NUMBERED.fullmatch(name)
        if found and found[1].strip("._- ") and "#" not in name:
            groups.setdefault((found[1], found[3]), []).append(name)
    out = {}
    for (head, tail), members in groups.items():
        width = min(len(n) for n in members) - len(head) - len(tail)
        if len(members) > 1:
            out[f"{head}{'#' * width}{tail}"] = members
    return out


def frame_numbers(names: Sequence[str]) -> list[int]:
    """Return the frame numbers in the file names of images; empty if a name contains no number."""
    found = [int(m[2]) for n in names if (m := _NUMBERED.fullmatch(n)) and len(m[2]) < 12]
    return found if len(found) == len(names) else []


def sequence_name(path: Path) -> str:
    """Return the name of an image sequence without frame number and suffix: `a` for `a.####.png`."""
    return path.name.partition("#")[0].rstrip("._- ")


def _pixels(image: Image.Image, *, gray: bool) -> np.ndarray:
    """Return the pixels of an image as uint8 after EXIF rotation.

    The shape is (h, w, 1) if `gray` is True, (h, w, 4) if the image has alpha, else (h, w, 3).
    """
    upright = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16-bit gray, which Pillow would clip at 255
        level = (np.asarray(upright).astype(np.int64).clip(0, 65535) + 128) // 257
        return level.astype(np.uint8)[..., None].repeat(1 if gray else 3, -1)
    if image.mode == "F":
        raise ValueError("pixels are floating-point: save the image as 8-bit")
    alpha = "A" in image.getbands() or "transparency" in image.info
    made = upright.convert("L") if gray else color.image_to_srgb(upright).convert("RGBA" if alpha else "RGB")
    return np.asarray(made).reshape(made.height, made.width, -1)


def image_names(path: Path) -> list[str]:
    """Return the names of the images in an image sequence or a `.zip`, in natural order (9 before 10).

    Raises:
        MediaError: if the `.zip` cannot be read.
    """
    if is_sequence(path):
        return [f.name for f in frames_in(path)]
    with reading(path, MediaError):
        require_file(path, MediaError)
        with zipfile.ZipFile(path) as archive:
            inside = [n for n in archive.namelist() if n.lower().endswith(FRAMES)]
        return sorted(inside, key=lambda n: natural(Path(n)))


@contextmanager
def _opened(path: Path, name: str) -> Iterator[Image.Image]:
    """Context manager that opens the image `name` in an image sequence or `.zip`.

    The size that the file declares is checked first.
    """

    def unreadable(path: Path, cause: str, code: str) -> MediaError:
        return MediaError(path, f"image {name} {cause}", code)

    with reading(path, unreadable):
        if is_sequence(path):
            file = (path if path.is_dir() else path.parent) / name
            require_file(file, MediaError)
            with checked_image(file, path, name) as image:
                yield image
            return
        with zipfile.ZipFile(path) as archive:
            check_member(path, archive.getinfo(name), MediaError)
            with archive.open(name) as file, checked_image(file, path, name) as image:
                yield image


def named_size(path: Path, name: str) -> tuple[int, int]:
    """Return the width and height of the image `name` in an image sequence or `.zip`."""
    with _opened(path, name) as image:  # the header only
        return image.size


def read_named(
    path: Path, indices: Sequence[int] | np.ndarray, *, gray: bool = False
) -> Iterator[np.ndarray]:
    """Yield the images at `indices` in a sequence or `.zip`, as pixels in the format of `read_animated`.

    An index is a position in the natural order of the image names.
    """
    names = image_names(path)
    for i in indices:
        with _opened(path, names[i]) as image:
            pixels = _pixels(image, gray=gray)
        yield pixels


def frame_times(path: Path) -> np.ndarray:
    """Return the start time of each frame of an image and the end time of the last frame, in seconds.

    All times are 0 if the image is not animated or if a frame has no duration.
    """
    with load_image(path, animated=True) as image:
        durations = []
        for i in range(getattr(image, "n_frames", 1)):
            image.seek(i)
            image.load()  # Pillow sets the duration only on load
            durations.append(float(image.info.get("duration", 0)))
    return np.concatenate([[0.0], np.cumsum(durations)]) / 1000 * (len(durations) > 1 and min(durations) > 0)


def read_animated(
    path: Path, indices: Sequence[int] | np.ndarray, *, gray: bool = False
) -> Iterator[np.ndarray]:
    """Yield the frames at `indices` of a still or animated image.

    Frames are uint8 after EXIF rotation: (h, w, 1) if `gray`, (h, w, 4) if the image has alpha, else
    (h, w, 3). They are read with Pillow, because FFmpeg does not support all formats.
    """
    with load_image(path, animated=True) as image:
        for i in indices:
            image.seek(int(i))
            yield _pixels(image, gray=gray)
