"""Read clips and surface points from NumPy files; headers are checked before values are read.

The size that a header declares is compared with the file size first, because a header of a few bytes can
declare terabytes. Frames are streamed: memory usually holds one frame at a time (exceptions: see `Frames`).
"""

from __future__ import annotations

import math
import zipfile
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from PIL import Image

from inlaid import limits
from inlaid.media.kinds import MediaError, Probe
from inlaid.reading import check_member, reading, require_file

FASTEST = 1000
"""Maximum accepted frame rate, in frames per second."""

# --- headers and bounded reading ----------------------------------------------------------------------------


class Header(NamedTuple):
    """Header of an array in an `.npy` file: shape, memory order and data type."""

    shape: tuple[int, ...]
    fortran: bool
    dtype: np.dtype

    @property
    def size(self) -> int:
        """Size of the array's values in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def read_header(file: IO[bytes]) -> Header:
    """Read the header of an open `.npy` file, and leave the file position at the first value.

    Raises:
        ValueError: if the header is missing, or its shape or data type is invalid.
    """
    version = np.lib.format.read_magic(file)
    old = version == (1, 0)
    reader: Any = np.lib.format.read_array_header_1_0 if old else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = reader(file)
    if not all(isinstance(n, int) and n >= 0 for n in shape):
        raise ValueError(f"shape {shape} is invalid")
    return Header(shape, fortran, dtype)


def read_values(file: IO[bytes], header: Header, available: int) -> np.ndarray:
    """Read the values of an array after its header.

    Args:
        file: open file, at the position of the first value.
        header: header of the array.
        available: size in bytes of the file, or of the archive member.

    Raises:
        ValueError: if the array contains Python objects, or if the size in its header exceeds `available` or
            `limits.ARRAY`.
        EOFError: if the file ends before the last value.
    """
    if header.dtype.hasobject:
        raise ValueError("contains objects: a pickle, which can run code")
    claim = f"its header claims {_by(header.shape)} values, {limits.as_size(header.size)}"
    if header.size > available:
        raise ValueError(f"{claim}, but the file has {limits.as_size(available)}")
    if large := limits.ARRAY.exceeded(header.size, claim):
        raise ValueError(large)
    raw = file.read(header.size)
    if len(raw) < header.size:
        raise EOFError("truncated")
    values = np.frombuffer(raw, header.dtype)
    return values.reshape(header.shape, order="F" if header.fortran else "C")


def load_arrays(path: Path, names: Sequence[str] | None = None) -> dict[str, np.ndarray]:
    """Read the arrays of an `.npz` or `.npy` file by name; the array of an `.npy` file has the name "".

    Args:
        path: the file.
        names: names of the arrays to read from an `.npz` file; missing names are ignored. Default: all.

    Raises:
        MediaError: if the file is damaged or contains a pickle, or if the size in a header exceeds the file
            or the limits.
    """
    with reading(path, MediaError):
        available = require_file(path, MediaError).st_size
        if not zipfile.is_zipfile(path):
            with path.open("rb") as file:
                return {"": read_values(file, read_header(file), available)}
        out = {}
        with zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                name = member.filename.removesuffix(".npy")
                if names is None or name in names:
                    check_member(path, member, MediaError)
                    with archive.open(member) as file:
                        out[name] = read_values(file, read_header(file), member.file_size)
        return out


# --- clips --------------------------------------------------------------------------------------------------


class _Clip(NamedTuple):
    """Properties of an `.npz` clip, read without its frames."""

    header: Header
    axis: int
    """Index of the channel axis."""
    channels: int
    fps: Fraction | None

    @property
    def extent(self) -> tuple[int, int, int]:
        """Number of frames, height and width."""
        t, h, w = (n for i, n in enumerate(self.header.shape) if i != self.axis)
        return t, h, w


def probe_array(path: Path, channels: Sequence[int] = (3,)) -> Probe:
    """Return the properties of an `.npz` clip, without loading its frames.

    Args:
        path: the `.npz` file.
        channels: accepted channel counts; a clip with four channels is RGBA.

    Raises:
        MediaError: if the file has no uint8 array `frames` with an accepted channel count.
    """
    clip = _clip(path, channels)
    (t, h, w), fps = clip.extent, clip.fps
    interval, names = float(1 / fps) if fps else 0.0, "rgba" if clip.channels == 4 else "rgb24"
    clear = clip.channels == 4
    return Probe(t, fps, h, w, t * interval, interval, codec="npz", pix_fmt=names, transparent=clear)


def fit_array(pixels: np.ndarray, size: tuple[int, int], sar: float = 1.0) -> np.ndarray:
    """Scale RGB pixels to cover `size`, and center-crop them.

    The filter is bicubic and antialiased.

    Args:
        pixels: uint8 (h, w, 3).
        size: height and width of the result.
        sar: pixel aspect ratio, width / height.
    """
    height, width = pixels.shape[:2]
    scale = max(size[0] / height, size[1] / (width * sar))
    h, w = size[0] / scale, size[1] / scale / sar
    box = ((width - w) / 2, (height - h) / 2, (width + w) / 2, (height + h) / 2)
    box = (max(box[0], 0.0), max(box[1], 0.0), min(box[2], width), min(box[3], height))
    image = Image.fromarray(np.ascontiguousarray(pixels))
    return np.asarray(image.resize((size[1], size[0]), Image.Resampling.BICUBIC, box=box))


def _clip(path: Path, channels: Sequence[int]) -> _Clip:
    """Read the header of the frames in an `.npz` clip, and the frame rate.

    Raises:
        MediaError: if the file has no uint8 array `frames` with a channel count in `channels`, if a frame has
            too many pixels, or if the array has less data than its header declares.
    """
    with reading(path, MediaError, "an npz clip"):
        require_file(path, MediaError)
        with zipfile.ZipFile(path) as archive:
            names = [n.removesuffix(".npy") for n in archive.namelist()]
            if "frames" not in names:
                there = ", ".join(names[:20]) or "none"
                raise MediaError(path, f"has no array `frames`; its arrays are: {there}")
            member = archive.getinfo("frames.npy")
            check_member(path, member, MediaError)
            with archive.open(member) as file:
                header = read_header(file)
                available = member.file_size - file.tell()
        shape = header.shape
        places = [(i, n) for i in (3, 0, 1) for n in channels if len(shape) == 4 and shape[i] == n]
        if header.dtype != np.uint8 or not places or 0 in shape:
            wants = " or ".join(f"(t, h, w, {n}), ({n}, t, h, w) or (t, {n}, h, w)" for n in channels)
            raise MediaError(path, f"`frames` is {header.dtype} {shape}; it must be uint8 and {wants}")
        if header.size > available:
            claim = f"`frames` is {shape}, {limits.as_size(header.size)}"
            cause = f"{claim}, but the file has {limits.as_size(available)} of it"
            raise MediaError(path, cause, "truncated")
        clip = _Clip(header, *places[0], _fps(path) if "fps" in names else None)
    pixels = clip.extent[1] * clip.extent[2]
    if large := limits.PIXELS.exceeded(pixels, f"a frame has {pixels / 1e6:.0f} megapixels"):
        raise MediaError(path, large)
    return clip


def _fps(path: Path) -> Fraction:
    value = load_arrays(path, ("fps",))["fps"]
    rate = float(value.reshape(())) if value.size == 1 else math.nan
    if not 1 / 1001 <= rate <= FASTEST:
        raise MediaError(
            path,
            f"`fps` is {value if value.size == 1 else value.shape}; it must be between 0.001 and {FASTEST:g}",
        )
    return Fraction(rate).limit_denominator(1001)


class Frames:
    """Lazy sequence of the frames of an `.npz` clip: indexing reads one frame, uint8 (h, w, c).

    The first access decompresses the whole array to verify its checksum, but keeps no frame in memory. After
    that, reading all frames in ascending order decompresses the array once more. Access to an earlier frame
    starts again from the first frame. If the array has shape (c, t, h, w) or Fortran order, the first access
    loads it into memory as a whole.
    """

    def __init__(self, path: Path, clip: _Clip) -> None:
        self._path, self._header, self._axis = path, clip.header, clip.axis
        self._count, self._height, self._width = clip.extent
        self._whole: np.ndarray | None = None
        self._file: IO[bytes] | None = None
        self._archive: zipfile.ZipFile | None = None
        self._next, self._last, self._verified = 0, np.empty(0), False

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> np.ndarray:
        index = int(index)
        if not -self._count <= index < self._count:
            raise IndexError(index)
        index %= self._count
        with reading(self._path, _damaged):
            if self._header.fortran or self._axis == 0:
                self._whole = self._read_whole() if self._whole is None else self._whole
                return self._whole[index]
            return self._forward(index)

    def _read_whole(self) -> np.ndarray:
        return np.moveaxis(load_arrays(self._path, ("frames",))["frames"], self._axis, -1)

    def _forward(self, index: int) -> np.ndarray:
        if index == self._next - 1:
            return self._last
        if self._file is None or index < self._next:
            self.close()
            self._archive = zipfile.ZipFile(self._path)
            if not self._verified:
                with self._archive.open("frames.npy") as file:
                    while file.read(1 << 20):
                        pass
                self._verified = True
            self._file, self._next = self._archive.open("frames.npy"), 0
            read_header(self._file)
        size = math.prod(self._header.shape[1:])
        while self._next <= index:
            raw = self._file.read(size)
            if len(raw) < size:
                raise EOFError(f"truncated after {self._next} of {self._count} frames")
            self._next += 1
        shape = [n for i, n in enumerate(self._header.shape) if i]
        self._last = np.moveaxis(np.frombuffer(raw, np.uint8).reshape(shape), self._axis - 1, -1)
        return self._last

    def close(self) -> None:
        """Close the file; a later access opens it again."""
        for each in (self._file, self._archive):
            if each is not None:
                each.close()
        self._file = self._archive = None

    def __del__(self) -> None:
        self.close()


def _damaged(path: Path, cause: str, code: str) -> MediaError:
    return MediaError(path, cause.replace("cannot be read", "is damaged"), "truncated")


def load_array(path: Path, channels: Sequence[int] = (3,)) -> tuple[Frames, Fraction | None]:
    """Return the frames and the frame rate of an `.npz` clip; the rate is None if the file has no `fps`.

    Each frame is uint8 (h, w, c). If the file is damaged, access to a frame raises `MediaError`.

    Args:
        path: the `.npz` file.
        channels: accepted channel counts, in order of preference.

    Raises:
        MediaError: if the file has no uint8 array `frames` with an accepted channel count.
    """
    clip = _clip(path, channels)
    return Frames(path, clip), clip.fps


def _by(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape)) or "1"
