"""RGBA clips on disk: a file with alpha, a folder of images, or a color file with an alpha matte.

`Pairs` matches color files and alpha mattes by name. `inspect_clip` probes a clip and measures its alpha.
`read_rgba_clip` reads the frames at given times, with straight (not premultiplied) alpha. Color and alpha
matte are read at the same frame numbers and scaled together. If they differ in length, an error is raised;
the longer file is never trimmed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Literal

import numpy as np

from inlaid import config
from inlaid.media import compositing, kinds, rgba, rgba_images, video
from inlaid.media.arrays import load_array, probe_array
from inlaid.media.images import load_image
from inlaid.media.kinds import ANIMATED, EPSILON, MediaError, Probe, frames_on_show, media_kind
from inlaid.media.rgba import AlphaStats

READER = 1
"""Version of the decoded pixels, which is part of cache keys. Increase it when a file gives different
pixels."""

KNOWN = (*kinds.KNOWN, *ANIMATED, ".zip")
"""File suffixes of clips in runs that train on alpha."""

COLORS, ALPHA_NAMES = ("_rgb", "_fgr"), ("_alpha", "_pha", "_matte", "_seg")
"""Name endings of color files and of alpha mattes, before the suffix. For example, `dog_alpha.mp4` is the
alpha matte of `dog_rgb.mp4`, `dog_fgr.mp4` or `dog.mp4`."""

COLOR_FOLDERS, ALPHA_FOLDERS = ("rgb", "fgr"), ("alpha", "pha", "matte", "seg")
"""Name prefixes of color folders and of alpha matte folders. For example, `pha/07.mp4` is the alpha matte of
`fgr/07.mp4`."""

CHANNELS = (4, 3)
"""Accepted channel counts of arrays, in order of preference."""

FAR = 24
"""If two requested frames are more than this many frames apart, the video reader seeks instead of decoding
the frames between them."""

FRAMES_INSPECTED, LONG = 8, 512
"""Number of frames in which alpha is measured, and maximum length of their longer side in pixels. Larger
frames are subsampled."""

Kind = kinds.Kind | Literal["frames"]

# --- file names and pairs -----------------------------------------------------------------------------------


def rgba_kind(path: Path) -> Kind:
    """Return the kind of a clip: video, image (still or animated), array, or frames.

    Frames are a folder of images, numbered images (`a.####.png`), or a `.zip` of images.

    Raises:
        MediaError: if the file type is unknown.
    """
    if path.suffix.lower() == ".zip" or rgba_images.is_sequence(path):
        return "frames"
    return media_kind(path)


def stem(path: Path) -> str:
    """Return the name of a clip without its file suffix and frame number, or the whole name of a folder."""
    if rgba_images.frame_pattern(path):
        return rgba_images.sequence_name(path)
    return path.stem if path.suffix.lower() in KNOWN else path.name


def captions(path: Path) -> list[Path]:
    """Return the possible paths of a clip's caption file.

    For the clip `dog_rgb.mp4`, these are `dog_rgb.txt` and `dog.txt` in the same folder. For a folder `shot`
    that contains the frames of a clip, these are `shot.txt`, `shot/shot.txt` and `shot/caption.txt`.
    """
    own = stem(path)
    ends = [own.removesuffix(e) for e in COLORS if own.endswith(e)]
    inside = [path / f"{own}.txt", path / "caption.txt"] if path.suffix.lower() not in KNOWN else []
    return [*(path.with_name(f"{name}.txt") for name in (own, *ends)), *inside]


def files(path: Path) -> list[Path]:
    """Return the files of a clip: all images if it is an image sequence, else the file itself."""
    return rgba_images.frames_in(path) if rgba_images.is_sequence(path) else [path]


class Pairs:
    """Index of the clips below a root folder. It finds the alpha mattes of a color file, and vice versa."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._known: dict[Path, dict[str, list[Path]]] = {}

    def matte(self, color: Path) -> list[Path]:
        """Return the alpha mattes of a color file or folder; empty if there are none."""
        own = stem(color)
        if own.endswith(ALPHA_NAMES):
            return []
        base = next((own.removesuffix(e) for e in COLORS if own.endswith(e)), own)
        beside = self._there(color.parent)
        if own == base and any(base + end in beside for end in COLORS):
            return []  # `dog_alpha.mp4` belongs to `dog_rgb.mp4`, and `dog.mp4` is a preview of both
        found = [p for end in ALPHA_NAMES for p in beside.get(base + end, [])]
        return found or self._across(color, COLOR_FOLDERS, ALPHA_FOLDERS)

    def color(self, matte: Path) -> list[Path]:
        """Return the color files that belong to an alpha matte.

        The list is empty if neither the file name nor a folder name marks `matte` as an alpha matte.
        """
        own, beside = stem(matte), self._there(matte.parent)
        bases = [own.removesuffix(e) for e in ALPHA_NAMES if own.endswith(e)]
        found = [p for b in bases for end in COLORS for p in beside.get(b + end, [])]
        found = found or [p for b in bases for p in beside.get(b, [])]
        return found or self._across(matte, ALPHA_FOLDERS, COLOR_FOLDERS)

    def named(self, path: Path) -> list[Path]:
        """Return the clips that match a path without file suffix.

        For example, `clips/dog` matches `clips/dog_rgb.mp4` and `clips/dog.mp4`.
        """
        beside = self._there(path.parent)
        return [p for end in (*COLORS, "") for p in beside.get(path.name + end, [])]

    def _across(self, path: Path, here: tuple[str, ...], there: tuple[str, ...]) -> list[Path]:
        """Return the files with the same name in parallel folders, such as `pha/07.mp4` for `fgr/07.mp4`.

        Args:
            path: a file, below a folder whose name starts with one of `here`.
            here: name prefixes of this folder, in lower case.
            there: name prefixes of the parallel folders, which are beside this folder.
        """
        for folder in path.parents:
            if folder == self._root or not folder.is_relative_to(self._root):
                break
            if folder.name.lower().startswith(here):
                rest = path.parent.relative_to(folder)
                others = [d for d in sorted(folder.parent.iterdir()) if d.name.lower().startswith(there)]
                return [p for d in others if d.is_dir() for p in self._there(d / rest).get(stem(path), [])]
        return []

    def _there(self, folder: Path) -> dict[str, list[Path]]:
        """Return the clips in a folder by name, without file suffix and frame number.

        Several clips can have the same name, such as `dog.mp4` and `dog.webm`.
        """
        if folder not in self._known:
            found: dict[str, list[Path]] = {}
            there = sorted(folder.iterdir()) if folder.is_dir() else []
            images = [p.name for p in there if p.name.lower().endswith(rgba_images.FRAMES)]
            for name in rgba_images.numbered(images):
                found.setdefault(stem(folder / name), []).append(folder / name)
            for p in there:
                clip = p.suffix.lower() in KNOWN if p.is_file() else bool(rgba_images.frames_in(p))
                if clip and not p.name.startswith("."):
                    found.setdefault(stem(p), []).append(p)
            self._known[folder] = found
        return self._known[folder]


# --- probing ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ClipInspection:
    """Properties and alpha statistics of an RGBA clip."""

    probe: Probe
    alpha: AlphaStats
    """Alpha statistics of at most `FRAMES_INSPECTED` frames. If alpha is constant in these frames, all frames
    are measured."""


def inspect_clip(path: Path, matte: Path | None = None) -> ClipInspection:
    """Return the properties and alpha statistics of an RGBA clip.

    Raises:
        MediaError: if the clip cannot be used. Its `code` is `unreadable`, `truncated`, `no-alpha`,
            `constant-alpha` (the same alpha in all pixels), or `pair` (color and alpha matte do not match).
    """
    probe = _probe(path)
    if matte is not None:
        try:
            other = _probe(matte)
        except MediaError as error:
            raise MediaError(path, f"its alpha matte {matte.name}: {error.cause}", error.code) from None
        _match(path, probe, matte, other)
    elif not probe.transparent:
        raise MediaError(path, _lonely(path), "no-alpha")
    some = np.unique(np.linspace(0, probe.frames - 1, FRAMES_INSPECTED).round().astype(int))
    alpha = rgba.measure_alpha(_few(path, matte, some))
    if alpha.constant:
        every = _few(path, matte, np.arange(probe.frames))
        alpha = rgba.measure_alpha(every)
    if alpha.constant:
        how = {0: "transparent", 255: "opaque"}.get(alpha.lowest, "neither transparent nor opaque")
        raise MediaError(path, f"alpha is {alpha.lowest} of 255 in every pixel ({how})", "constant-alpha")
    return ClipInspection(replace(probe, transparent=True), alpha)


def _few(path: Path, matte: Path | None, indices: np.ndarray) -> np.ndarray:
    """Read frames and subsample their pixels without interpolation, so that alpha values do not change."""
    out = []
    for pixels, _ in _joined(path, matte, indices):
        step = -(-max(pixels.shape[:2]) // LONG)
        out.append(pixels[::step, ::step])
    return np.stack(out)


def _lonely(path: Path) -> str:
    own = stem(path)
    if own.endswith(ALPHA_NAMES):
        base = next(own.removesuffix(e) for e in ALPHA_NAMES if own.endswith(e))
        return f"an alpha matte without color file: {base}_rgb or {base} is missing beside it"
    base = next((own.removesuffix(e) for e in COLORS if own.endswith(e)), own)
    return f"no alpha channel ({_format(path)}) and no alpha matte such as {base}_alpha.mp4 beside it"


def _format(path: Path) -> str:
    probe = _probe(path)
    return " ".join(x for x in (probe.codec, probe.pix_fmt) if x)


def _match(path: Path, probe: Probe, matte: Path, other: Probe) -> None:
    """Raise a `MediaError` if color and alpha matte differ in frame count, size, frame rate or rotation."""
    wrong = []
    if probe.frames != other.frames:
        wrong.append(f"{probe.frames} frames and {other.frames} in {matte.name}")
    if (probe.height, probe.width) != (other.height, other.width):
        sizes = [f"{p.width}x{p.height}" for p in (probe, other)]
        wrong.append(f"{sizes[0]} and {sizes[1]} in {matte.name}")
    if probe.fps and other.fps and abs(float(probe.fps / other.fps) - 1) > 0.01:
        wrong.append(f"{float(probe.fps):g} fps and {float(other.fps):g} in {matte.name}")
    if probe.orientation != other.orientation:
        turned = [p.orientation or "not rotated" for p in (probe, other)]
        wrong.append(f"{turned[0]}, and {matte.name} is {turned[1]}")
    if wrong:
        raise MediaError(path, ", ".join(wrong), "pair")


def _probe(path: Path) -> Probe:
    """Return the properties of any kind of RGBA clip. Sequences and archives of frames have no timestamps."""
    what = rgba_kind(path)
    if what == "frames":
        return probe_frames(path)
    if what == "image":
        return _probe_image(path)
    if what == "array":
        return probe_array(path, CHANNELS)
    return video.probe(path)


def probe_frames(path: Path) -> Probe:
    """Return the properties of an image sequence in a folder or `.zip`.

    The first and the last image are decoded. Of the other images, only the size is read.

    Raises:
        MediaError: if there are no images, or if the images differ in size or cannot be read.
    """
    names = rgba_images.image_names(path)
    if not names:
        raise MediaError(path, "contains no images")
    first = next(rgba_images.read_named(path, [0]))
    sizes = {rgba_images.named_size(path, name) for name in names}
    if len(sizes) > 1:
        listed = " and ".join(f"{w}x{h}" for w, h in sorted(sizes)[:2])
        raise MediaError(path, f"its images differ in size ({listed})")
    next(rgba_images.read_named(path, [len(names) - 1]))
    height, width, channels = first.shape
    return Probe(len(names), None, height, width, 0.0, codec="frames", transparent=channels == 4)


def _probe_image(path: Path) -> Probe:
    """Return the properties of a still or animated image.

    Every frame is decoded, so that truncated files are detected.
    """
    times = rgba_images.frame_times(path)
    with load_image(path, animated=True) as image:
        codec, mode = image.format or "", image.mode
    first = next(rgba_images.read_animated(path, [0], gray=False))
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


def read_rgba_clip(
    path: Path,
    matte: Path | None,
    start: float,
    frames: int,
    fps: float,
    size: tuple[int, int],
    how: config.Matte,
    *,
    rate: float | None = None,
) -> np.ndarray:
    """Read a range of frames of an RGBA clip: uint8 (t, h, w, 4) with straight alpha.

    Frames are scaled to cover `size` and center-cropped.

    Args:
        path: a video, an image, or a folder of images. If there is an alpha matte, `path` is the color part.
        matte: the alpha matte, in which white means opaque unless `how.invert` is set.
        start: start of the range, in seconds from the clip's first frame.
        frames: number of frames; frame k shows the clip at the time start + k / fps.
        fps: sampling rate in frames per second.
        size: height and width in pixels.
        how: the recipe's `data.matte` section, with `premultiplied` resolved to a bool.
        rate: frame rate of a clip without timestamps. Default: `fps`.

    Raises:
        MediaError: if the file cannot be read to the end of the range; the message names the file.
    """
    wanted = start + np.arange(frames) / float(fps)
    out = []
    for pixels, sar in _joined(path, matte, _chosen(path, wanted, fps, rate)):
        alpha = pixels[..., 3]
        if how.limited:
            alpha = ((alpha.astype(np.float32) - 16) * (255 / 219)).round().clip(0, 255).astype(np.uint8)
        if how.invert:
            alpha = 255 - alpha
        pixels = np.concatenate([pixels[..., :3], alpha[..., None]], -1)[None]
        out.append(compositing.resize(pixels, size, sar=sar, premultiplied=how.premultiplied is True)[0])
    return rgba.fix_alpha(np.stack(out), how)


def _joined(
    path: Path, matte: Path | None, indices: Sequence[int] | np.ndarray
) -> Iterator[tuple[np.ndarray, float]]:
    """Yield the frames at `indices` with alpha, each with its pixel aspect ratio (width / height).

    Frames are uint8 (h, w, 4) at their stored size. Alpha comes from the file `matte` or, if it is None, from
    `path`.

    Raises:
        MediaError: if a frame has no alpha, or if color and alpha matte differ in size.
    """
    colors = _pick(path, indices, gray=False)
    if matte is None:
        for pixels, sar in colors:
            if pixels.shape[-1] != 4:
                raise MediaError(path, "has no alpha", "no-alpha")
            yield pixels, sar
        return
    for (pixels, sar), (gray, _) in zip(colors, _pick(matte, indices, gray=True), strict=True):
        if pixels.shape[:2] != gray.shape[:2]:
            raise MediaError(path, f"differs in size from {matte.name}", "pair")
        yield np.concatenate([pixels[..., :3], gray], -1), sar


def _pick(
    path: Path, indices: Sequence[int] | np.ndarray, *, gray: bool
) -> Iterator[tuple[np.ndarray, float]]:
    """Yield each requested frame and its pixel aspect ratio (width / height).

    `indices` are ascending frame numbers. Frames are uint8 (h, w, 1) if `gray`, else (h, w, 3) or (h, w, 4).
    """
    what = rgba_kind(path)
    if what == "video":
        times, numbers = video.frame_times(path), np.asarray(indices)
        for part in np.split(numbers, np.flatnonzero(np.diff(numbers) > FAR) + 1):
            yield from video.native_frames(path, times[part], gray=gray)
    elif what == "array":
        pixels, _ = load_array(path, CHANNELS)
        for i in indices:
            yield (pixels[i][..., :1] if gray else pixels[i]), 1.0
    else:
        read = rgba_images.read_named if what == "frames" else rgba_images.read_animated
        for pixels in read(path, indices, gray=gray):
            yield pixels, 1.0


def _chosen(path: Path, wanted: np.ndarray, fps: float, rate: float | None = None) -> np.ndarray:
    """Return the frame number for each requested time in seconds.

    A clip without timestamps runs at `rate`, or at `fps` if `rate` is None.

    Raises:
        MediaError: if the clip ends before the last requested time.
    """
    what = rgba_kind(path)
    if what == "image" and (ends := rgba_images.frame_times(path))[-1]:
        # Animated images store repeated frames as one long frame: select the frame displayed at the wanted
        # time, not the frame with the nearest start.
        step = float(np.diff(ends).min())
        last, times = float(ends[-1]) - step, ends[:-1]
        chosen = np.searchsorted(times, wanted + step / 2 - EPSILON, side="right") - 1
    else:
        if what == "video":
            ends = video.frame_times(path)
            times, held = ends[:-1], float(ends[-1] - ends[-2])
        else:
            times, held = _even(path, rate or fps), 0.0
        step = float(np.median(np.diff(times))) if len(times) > 1 else 0.0
        last, chosen = (
            float(times[-1]) + max(0.0, held - max(step, 1 / fps)),
            frames_on_show(times, wanted, fps),
        )
    if wanted[-1] > last + max(step, 1 / fps) / 2 + EPSILON:
        cause = f"{len(times)} frames, the window needs {len(wanted)} frames from {wanted[0]:.3f} s"
        raise MediaError(path, f"ends after {cause}", "truncated")
    return chosen


def _even(path: Path, fps: float) -> np.ndarray:
    """Return the time of each frame in seconds, for a clip without timestamps.

    Frames are evenly spaced. If an array file stores a frame rate, it is used instead of `fps`.
    """
    if rgba_kind(path) == "array":
        probe = probe_array(path, CHANNELS)
        return np.arange(probe.frames) / float(probe.fps or fps)
    named = rgba_kind(path) == "frames"
    count = len(rgba_images.image_names(path)) if named else len(rgba_images.frame_times(path)) - 1
    return np.arange(count) / fps
