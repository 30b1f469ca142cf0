"""Cut-outs: clips with alpha on disk, as one file, as a folder of images, or as colour and matte.

What belongs together is found by name (`Pairs`), looked at (`look`) and read by time (`read`), straight RGBA.
Colour and matte are cut by the same frame numbers and scaled as one picture; a pair that does not match is
refused, never cut to the shorter one.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, ImageOps

from inlaid import config, media, rgba
from inlaid.media import MediaError, Probe

READER = 1
"""Version of what `read` returns for the same files and arguments; part of the cache's identity."""

KNOWN = (*media.KNOWN, *media.ANIMATED, ".zip")
"""Suffixes that are looked for in transparent runs."""

COLORS, MATTES = ("_rgb", "_fgr"), ("_alpha", "_pha", "_matte", "_seg")
"""Ends of names without suffix. `dog_alpha.mp4` is the matte of `dog_rgb.mp4`, `dog_fgr.mp4` or `dog.mp4`."""

COLOR_FOLDERS, MATTE_FOLDERS = ("rgb", "fgr"), ("alpha", "pha", "matte", "seg")
"""How names of folders begin: `pha/07.mp4` is the matte of `fgr/07.mp4`."""

FRAMES = (*media.IMAGES, ".tif", ".tiff")
"""Images that the frames of a folder may be."""

CHANNELS = (4, 3)
"""Of arrays, the likelier number first."""

FAR = 24
"""Frames between two that are read, from which seeking is worth it."""

LOOKED_AT, LONG = 8, 512
"""Frames that are measured of a clip, and pixels of their longer side."""

Kind = media.Kind | Literal["frames"]


# --- what belongs together ----------------------------------------------------------------------------------


def kind(path: Path) -> Kind:
    """Whether a cut-out is read as a video, an image (maybe an animated one), an array, or as frames.

    Raises:
        MediaError: for other names.
    """
    if path.suffix.lower() == ".zip" or path.is_dir():
        return "frames"
    return media.kind(path)


def frames_in(folder: Path) -> list[Path]:
    """The images of a folder that is a clip, in natural order: 9 before 10. Empty where it is none."""
    try:
        there = [f for f in folder.iterdir() if f.suffix.lower() in FRAMES and not f.name.startswith(".")]
    except OSError:
        return []
    return sorted((f for f in there if f.is_file()), key=rgba.natural)


def entries(folder: Path) -> list[Path]:
    """Files below a folder that may be clips, and in place of its images each folder of frames.

    A folder below is a clip where none of its images has a caption of its own.
    """
    found: list[Path] = []
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        here = Path(parent)
        shown = [here / f for f in sorted(files) if not f.startswith(".") and f.lower().endswith(KNOWN)]
        images = set(frames_in(here)) if here != folder else set()
        if images and not any(f.with_suffix(".txt").is_file() for f in images):
            found.append(here)
            shown = [f for f in shown if f not in images]
        found += shown
    return sorted(found)


def stem(path: Path) -> str:
    """A clip's name without its suffix; a folder's is its name."""
    return path.stem if path.suffix.lower() in KNOWN else path.name


def captions(path: Path) -> list[Path]:
    """Where a clip's caption may be: `dog_rgb.txt` or `dog.txt` beside `dog_rgb.mp4`."""
    own = stem(path)
    ends = [own.removesuffix(e) for e in COLORS if own.endswith(e)]
    return [path.with_name(f"{name}.txt") for name in (own, *ends)]


def files(path: Path) -> list[Path]:
    """The files whose content is a clip's: itself, or the images of a folder."""
    return frames_in(path) if path.is_dir() else [path]


class Pairs:
    """Finds mattes and their colour below a root."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._known: dict[Path, dict[str, list[Path]]] = {}

    def matte(self, color: Path) -> list[Path]:
        """The mattes that go with a colour file or folder; none where it is alone."""
        own = stem(color)
        if own.endswith(MATTES):
            return []
        base = next((own.removesuffix(e) for e in COLORS if own.endswith(e)), own)
        beside = self._there(color.parent)
        found = [p for end in MATTES for p in beside.get(base + end, [])]
        return found or self._across(color, COLOR_FOLDERS, MATTE_FOLDERS)

    def color(self, matte: Path) -> list[Path]:
        """What a matte is the matte of; empty where it is none, or where that is not there."""
        own, beside = stem(matte), self._there(matte.parent)
        bases = [own.removesuffix(e) for e in MATTES if own.endswith(e)]
        found = [p for b in bases for end in ("", *COLORS) for p in beside.get(b + end, [])]
        return found or self._across(matte, MATTE_FOLDERS, COLOR_FOLDERS)

    def named(self, path: Path) -> list[Path]:
        """The colour that is meant by a path without an ending: `clips/dog` for `clips/dog_rgb.mp4`."""
        beside = self._there(path.parent)
        return [p for end in (*COLORS, "") for p in beside.get(path.name + end, [])]

    def _across(self, path: Path, here: tuple[str, ...], there: tuple[str, ...]) -> list[Path]:
        """What has the same name in a folder beside one of those that the path is in."""
        for folder in path.parents:
            if folder == self._root or not folder.is_relative_to(self._root):
                break
            if folder.name.lower().startswith(here):
                rest = path.parent.relative_to(folder)
                others = [d for d in sorted(folder.parent.iterdir()) if d.name.lower().startswith(there)]
                return [p for d in others if d.is_dir() for p in self._there(d / rest).get(stem(path), [])]
        return []

    def _there(self, folder: Path) -> dict[str, list[Path]]:
        """What a folder holds, by name without suffix."""
        if folder not in self._known:
            found: dict[str, list[Path]] = {}
            for p in sorted(folder.iterdir()) if folder.is_dir() else ():
                clip = p.suffix.lower() in KNOWN if p.is_file() else bool(frames_in(p))
                if clip and not p.name.startswith("."):
                    found.setdefault(stem(p), []).append(p)
            self._known[folder] = found
        return self._known[folder]


# --- looking ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Look:
    """What is known of a cut-out without reading all of it."""

    probe: Probe
    alpha: rgba.Alpha
    """Measured on `LOOKED_AT` frames."""


def look(path: Path, matte: Path | None = None) -> Look:
    """Probes a cut-out and measures its alpha.

    Raises:
        MediaError: when it cannot be read (`unreadable`, `truncated`), has no alpha (`no-alpha`), the same
            everywhere (`constant-alpha`), or is a pair of two that do not match (`pair`).
    """
    probe = _probe(path)
    if matte is not None:
        try:
            other = _probe(matte)
        except MediaError as error:
            raise MediaError(path, f"its matte {matte.name}: {error.cause}", error.code) from None
        _match(path, probe, matte, other)
    elif not probe.transparent:
        raise MediaError(path, _lonely(path), "no-alpha")
    some = np.unique(np.linspace(0, probe.frames - 1, LOOKED_AT).round().astype(int))
    alpha = rgba.measure(_few(path, matte, some))
    if alpha.constant:
        every = _few(path, matte, np.arange(probe.frames))
        alpha = rgba.measure(every)
    if alpha.constant:
        how = {0: "clear", 255: "opaque"}.get(alpha.lowest, "the same")
        raise MediaError(
            path, f"{alpha.lowest} of 255 in every pixel: it is {how} everywhere", "constant-alpha"
        )
    return Look(replace(probe, transparent=True), alpha)


def _few(path: Path, matte: Path | None, indices: np.ndarray) -> np.ndarray:
    """Some frames, with pixels left out and none mixed: what is measured should be what is there."""
    out = []
    for pixels, _ in _joined(path, matte, indices):
        step = -(-max(pixels.shape[:2]) // LONG)
        out.append(pixels[::step, ::step])
    return np.stack(out)


def _lonely(path: Path) -> str:
    own = stem(path)
    if own.endswith(MATTES):
        base = next(own.removesuffix(e) for e in MATTES if own.endswith(e))
        return f"a matte without its colour: {base}_rgb or {base} is not beside it"
    base = next((own.removesuffix(e) for e in COLORS if own.endswith(e)), own)
    return f"no alpha channel in it ({_format(path)}), and no matte such as {base}_alpha.mp4 beside it"


def _format(path: Path) -> str:
    probe = _probe(path)
    return " ".join(x for x in (probe.codec, probe.pix_fmt) if x)


def _match(path: Path, probe: Probe, matte: Path, other: Probe) -> None:
    """Refuses a matte that was not cut as its colour."""
    wrong = []
    if probe.frames != other.frames:
        wrong.append(f"{probe.frames} frames and {other.frames} in {matte.name}")
    if (probe.height, probe.width) != (other.height, other.width):
        sizes = [f"{p.width}x{p.height}" for p in (probe, other)]
        wrong.append(f"{sizes[0]} and {sizes[1]} in {matte.name}")
    if probe.fps and other.fps and abs(float(probe.fps / other.fps) - 1) > 0.01:
        wrong.append(f"{float(probe.fps):g} fps and {float(other.fps):g} in {matte.name}")
    if wrong:
        raise MediaError(path, ", ".join(wrong), "pair")


def _probe(path: Path) -> Probe:
    """`media.probe` for all that a cut-out can be; folders and archives of frames have no clock."""
    what = kind(path)
    if what == "frames":
        names = _names(path)
        if not names:
            raise MediaError(path, "holds no images")
        first = next(_frames(path, [0], grey=False))
        sizes = {_size(path, name) for name in names}
        if len(sizes) > 1:
            shown = " and ".join(f"{w}x{h}" for w, h in sorted(sizes)[:2])
            raise MediaError(path, f"its images differ in size ({shown})")
        next(_frames(path, [len(names) - 1], grey=False))
        height, width, channels = first.shape
        return Probe(len(names), None, height, width, 0.0, codec="frames", transparent=channels == 4)
    if what == "image":
        return _probe_image(path)
    if what == "array":
        return media.probe_array(path, CHANNELS)
    return media.probe(path)


def _probe_image(path: Path) -> Probe:
    """Of a still or animated image; every frame is decoded, which shows whether the file is whole."""
    if not path.is_file():
        raise MediaError(path, "no such file")
    times = _times(path)
    with Image.open(path) as image:
        codec, mode = image.format or "", image.mode
    first = next(_animated(path, [0], grey=False))
    step = float(np.diff(times).min())
    return Probe(
        len(times) - 1,
        Fraction(1 / step).limit_denominator(1001) if step else None,
        first.shape[0],
        first.shape[1],
        float(times[-1]),
        step,
        codec=codec,
        pix_fmt=mode,
        transparent=first.shape[-1] == 4,
    )


# --- reading ------------------------------------------------------------------------------------------------


def read(
    path: Path,
    matte: Path | None,
    start: float,
    frames: int,
    fps: float,
    size: tuple[int, int],
    how: config.Matte,
) -> np.ndarray:
    """Reads a window of a cut-out: straight uint8 (t, h, w, 4), scaled to cover `size` and cropped.

    Args:
        path: a file, or a folder of images; colour where there is a matte.
        matte: white where the clip is opaque.
        start: seconds after the clip's first frame.
        frames: how many; frame k is the one shown nearest to start + k / fps.
        fps: frames per second at which the clip is sampled, and its own where it has no clock.
        size: height and width.
        how: of the recipe, with `premultiplied` decided.

    Raises:
        MediaError: naming the file, when it cannot be read to the window's end.
    """
    wanted = start + np.arange(frames) / float(fps)
    out = []
    for pixels, sar in _joined(path, matte, _chosen(path, wanted, fps)):
        alpha = pixels[..., 3]
        if how.limited:
            alpha = ((alpha.astype(np.float32) - 16) * (255 / 219)).round().clip(0, 255).astype(np.uint8)
        if how.invert:
            alpha = 255 - alpha
        pixels = np.concatenate([pixels[..., :3], alpha[..., None]], -1)[None]
        out.append(rgba.resize(pixels, size, sar=sar, premultiplied=how.premultiplied is True)[0])
    return rgba.mend(np.stack(out), how)


def _joined(
    path: Path, matte: Path | None, indices: Sequence[int] | np.ndarray
) -> Iterator[tuple[np.ndarray, float]]:
    """RGBA frames by number, as stored: uint8 (h, w, 4), and a pixel's width by its height."""
    colors = _pick(path, indices, grey=False)
    if matte is None:
        for pixels, sar in colors:
            if pixels.shape[-1] != 4:
                raise MediaError(path, "has no alpha", "no-alpha")
            yield pixels, sar
        return
    for (pixels, sar), (grey, _) in zip(colors, _pick(matte, indices, grey=True), strict=True):
        if pixels.shape[:2] != grey.shape[:2]:
            raise MediaError(path, f"differs in size from {matte.name}", "pair")
        yield np.concatenate([pixels[..., :3], grey], -1), sar


def _pick(
    path: Path, indices: Sequence[int] | np.ndarray, *, grey: bool
) -> Iterator[tuple[np.ndarray, float]]:
    """Frames by ascending number: uint8 (h, w, 1) or (h, w, 3 or 4), and a pixel's width by its height."""
    what = kind(path)
    if what == "video":
        times, numbers = media.stamps(path), np.asarray(indices)
        for part in np.split(numbers, np.flatnonzero(np.diff(numbers) > FAR) + 1):
            yield from media.native(path, times[part], grey=grey)
    elif what == "array":
        pixels, _ = media.load_array(path, CHANNELS)
        for i in indices:
            yield (pixels[i][..., :1] if grey else pixels[i]), 1.0
    else:
        for pixels in (_frames if what == "frames" else _animated)(path, indices, grey=grey):
            yield pixels, 1.0


def _chosen(path: Path, wanted: np.ndarray, fps: float) -> np.ndarray:
    """The number of the frame for each wanted time; what has no clock has the rate `fps`.

    Raises:
        MediaError: when the clip ends before.
    """
    what = kind(path)
    if what == "image" and (ends := _times(path))[-1]:
        # Equal frames are stored as one that is held: the one that is shown then, not the nearest beginning.
        step = float(np.diff(ends).min())
        last, times = float(ends[-1]) - step, ends[:-1]
        chosen = np.searchsorted(times, wanted + step / 2 - media.EPSILON, side="right") - 1
    else:
        times = media.stamps(path) if what == "video" else _even(path, fps)
        step = float(np.median(np.diff(times))) if len(times) > 1 else 0.0
        last, chosen = float(times[-1]), media.nearest(times, wanted)
    if wanted[-1] > last + max(step, 1 / fps) / 2 + media.EPSILON:
        told = f"{len(times)} frames, before the window of {len(wanted)} frames from {wanted[0]:.3f} s does"
        raise MediaError(path, f"ends after {told}", "truncated")
    return chosen


def _even(path: Path, fps: float) -> np.ndarray:
    """When the frames of what is no video are shown, evenly, at an array's own rate or at `fps`."""
    if kind(path) == "array":
        probe = media.probe_array(path, CHANNELS)
        return np.arange(probe.frames) / float(probe.fps or fps)
    return np.arange(len(_names(path)) if kind(path) == "frames" else len(_times(path)) - 1) / fps


def _pixels(image: Image.Image, *, grey: bool) -> np.ndarray:
    """An image, upright: (h, w, 1), or (h, w, 4) where it has alpha, else (h, w, 3)."""
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow would cut off at 255
        level = (np.asarray(image).astype(np.int64).clip(0, 65535) + 128) // 257
        return level.astype(np.uint8)[..., None].repeat(1 if grey else 3, -1)
    if image.mode == "F":
        raise ValueError("its pixels are floats: save it as 8-bit")
    upright = ImageOps.exif_transpose(image)
    alpha = "A" in image.getbands() or "transparency" in image.info
    made = upright.convert("L" if grey else "RGBA" if alpha else "RGB")
    return np.asarray(made).reshape(made.height, made.width, -1)


def _names(path: Path) -> list[str]:
    """The images of a folder or a `.zip`, in natural order."""
    if path.is_dir():
        return [f.name for f in frames_in(path)]
    try:
        with zipfile.ZipFile(path) as archive:
            inside = [n for n in archive.namelist() if n.lower().endswith(FRAMES)]
    except (zipfile.BadZipFile, OSError) as error:
        raise MediaError(path, f"cannot be read ({error})") from None
    return sorted(inside, key=lambda n: rgba.natural(Path(n)))


def _opened(path: Path, name: str) -> Image.Image:
    """An image of a folder or a `.zip`, loaded."""
    try:
        if path.is_dir():
            image = Image.open(path / name)
        else:
            with zipfile.ZipFile(path) as archive, archive.open(name) as file:
                image = Image.open(file)
                image.load()
        image.load()
        return image
    except (OSError, SyntaxError, ValueError, zipfile.BadZipFile) as error:
        raise MediaError(path, f"its {name} cannot be read ({error})") from None


def _size(path: Path, name: str) -> tuple[int, int]:
    if not path.is_dir():
        return _opened(path, name).size
    try:
        with Image.open(path / name) as image:  # the header only
            return image.size
    except (OSError, SyntaxError, ValueError) as error:
        raise MediaError(path, f"its {name} cannot be read ({error})") from None


def _frames(path: Path, indices: Sequence[int] | np.ndarray, *, grey: bool) -> Iterator[np.ndarray]:
    names = _names(path)
    for i in indices:
        try:
            yield _pixels(_opened(path, names[i]), grey=grey)
        except ValueError as error:
            raise (
                error if isinstance(error, MediaError) else MediaError(path, f"{names[i]}: {error}")
            ) from None


def _times(path: Path) -> np.ndarray:
    """When the frames of a still or animated image begin, and the last one's end, in seconds.

    All 0 where the file does not say, and for a still.
    """
    try:
        with Image.open(path) as image:
            durations = []
            for i in range(getattr(image, "n_frames", 1)):
                image.seek(i)
                image.load()  # only then is its duration known
                durations.append(float(image.info.get("duration", 0)))
    except (OSError, SyntaxError, EOFError, ValueError, Image.DecompressionBombError) as error:
        cause = "is not an image" if "cannot identify" in str(error) else f"cannot be read ({error})"
        raise MediaError(path, cause, "truncated" if "truncated" in str(error) else "unreadable") from None
    return np.concatenate([[0.0], np.cumsum(durations)]) / 1000 * (len(durations) > 1 and min(durations) > 0)


def _animated(path: Path, indices: Sequence[int] | np.ndarray, *, grey: bool) -> Iterator[np.ndarray]:
    """Frames of a still or animated image, which FFmpeg may not read."""
    try:
        with Image.open(path) as image:
            for i in indices:
                image.seek(int(i))
                yield _pixels(image, grey=grey)
    except (OSError, SyntaxError, EOFError, ValueError) as error:
        raise (
            error if isinstance(error, MediaError) else MediaError(path, f"cannot be read ({error})")
        ) from None
