"""Media files: probing clips, reading a time window, writing previews.

Pixels are uint8 (t, h, w, 3) RGB at rest. Frames are selected by time, never by index, because containers
round timestamps to milliseconds, start late and change rate. Each frame is scaled as soon as it is decoded,
so a window at source size is never held in memory. FFmpeg (25 MB) is imported when the first video is opened;
training from a complete cache never imports it.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from inlaid.files import atomic

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

WHOLE = (".gif", ".apng")
"""Suffixes that must not be seeked: every frame is marked as a key frame but depends on the one before."""

UNSTAMPED = (".avi",)
"""Suffixes whose packets may lack presentation times; decoded frames take their times in order."""

PIXEL_LIMIT = 200_000_000
"""Maximum pixels of a scaled frame before cropping; only extreme aspect ratios reach it."""

UNTAGGED = 2
"""FFmpeg's code for an unspecified YUV matrix."""

HDR = (16, 18)
"""FFmpeg's codes for the transfer functions PQ and HLG."""

_FILTER = 0x4 | 0x40000 | 0x2000
"""FFmpeg's BICUBIC | ACCURATE_RND | FULL_CHR_H_INT; PyAV has names for the flags only since version 18."""


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


def kind(path: Path) -> Kind:
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


def nearest(stamps: Sequence[float] | np.ndarray, wanted: Sequence[float] | np.ndarray) -> np.ndarray:
    """Return the index of the timestamp nearest to each wanted time; the earlier one of a tie.

    Args:
        stamps: ascending times in seconds, at least one.
        wanted: times in seconds.
    """
    stamps, wanted = np.asarray(stamps, np.float64), np.asarray(wanted, np.float64)
    middles = (stamps[1:] + stamps[:-1]) / 2
    return np.searchsorted(middles, wanted - EPSILON / 2, side="left")


def available(probe: Probe, fps: float) -> int:
    """Return the number of frames of a clip at `fps`; none is over half an interval past the last frame.

    For frames without times it is the number of frames in the file.
    """
    if probe.fps is None:
        return probe.frames
    span = probe.duration - probe.interval
    return int((span + probe.interval / 2) * float(fps) + 1e-3) + 1


# --- probing ------------------------------------------------------------------------------------------------


def probe(path: str | Path) -> Probe:
    """Return the properties of a clip, by demuxing all of it and decoding its first and last frames.

    Raises:
        MediaError: (a ValueError) with path and cause: the file is unreadable or truncated.
    """
    path = Path(path)
    if not path.is_file():
        raise MediaError(path, "no such file")
    if not path.stat().st_size:
        raise MediaError(path, "the file is empty")
    if kind(path) == "image":
        return _probe_image(path)
    return probe_array(path) if kind(path) == "array" else _probe_video(path)


def _probe_image(path: Path) -> Probe:
    with _image(path) as image:
        turned = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)
        height, width = (image.width, image.height) if turned else (image.height, image.width)
        alpha = "A" in image.getbands() or "transparency" in image.info
        _rgb(path, image)
        return Probe(
            1, None, height, width, 0.0, codec=image.format or "", pix_fmt=image.mode, transparent=alpha
        )


def probe_array(path: Path, channels: Sequence[int] = (3,)) -> Probe:
    """Return the properties of an `.npz` clip with one of the given channel counts; four channels are RGBA.

    Raises:
        MediaError: the file has no such frames.
    """
    (t, h, w), (_, c), fps = _header(path, channels)
    interval, names = float(1 / fps) if fps else 0.0, "rgba" if c == 4 else "rgb24"
    return Probe(t, fps, h, w, t * interval, interval, codec="npz", pix_fmt=names, transparent=c == 4)


def _probe_video(path: Path) -> Probe:
    if _no_index(path):
        raise MediaError(path, "is incomplete: its index (moov) is missing", "truncated")
    with _opened(path) as (container, stream):
        stamps, last_key, promised, cut = _demux(container, stream, path.suffix.lower() in UNSTAMPED)
        base = float(stream.time_base or 0)
        rate, sar, codec = stream.average_rate, stream.sample_aspect_ratio, stream.codec_context.name
    if not stamps or not base:
        raise MediaError(path, "has no frames")
    head = next(decode(path), None)
    if head is None or head.pts is None:
        raise MediaError(path, "no frame can be decoded")
    times = np.array([s for s in stamps if s >= head.pts], np.float64) * base
    if path.suffix.lower() == ".gif":
        cut = cut or path.read_bytes().rstrip(b"\0")[-1:] != b";"
    tail = 0
    try:
        for frame in decode(path, last_key):
            tail += frame.pts is not None and frame.pts >= last_key
    except MediaError:
        cut = True
    lost = max(0, sum(s >= last_key for s in stamps) - tail)
    if cut or lost > 1 or len(stamps) < promised - max(2, 0.02 * promised):
        there = f"{len(stamps) - lost}{f' of {promised}' if promised else ''} frames"
        raise MediaError(path, f"is incomplete or damaged at its end: {there} can be decoded", "truncated")
    steps = np.diff(times)
    mean = float(times[-1] - times[0]) / len(steps) if len(steps) else 0.0
    interval = float(np.median(steps)) if len(steps) else float(1 / rate) if rate else 0.0
    exact = rate and (not mean or abs(float(rate) * mean - 1) < 0.005)
    sideways = round(head.rotation / 90) % 2 == 1
    height, width = head.height, round(head.width * float(sar or 1))
    return Probe(
        frames=len(times),
        fps=rate if exact else Fraction(1 / mean).limit_denominator(1001) if mean else Fraction(0),
        height=width if sideways else height,
        width=height if sideways else width,
        duration=float(times[-1] - times[0]) + interval,
        interval=interval,
        variable=bool(len(steps))
        and bool(np.abs(steps - interval).max() > max(0.002, 1.1 * base, 0.1 * interval)),
        first=float(times[0]),
        codec=codec,
        pix_fmt=head.format.name,
        transparent=_has_alpha(head),
        hdr=head.color_trc in HDR,
        untagged=head.colorspace == UNTAGGED and not head.format.is_rgb,
    )


def _demux(container: Any, stream: Any, unstamped: bool) -> tuple[list[int], int, int, bool]:
    """Return ascending timestamps, the last key frame's, the header's frame count, and a damage flag."""
    stamps: list[int] = []
    last_key, cut = 0, False
    for packet in container.demux(stream):
        stamp = packet.dts if packet.pts is None or unstamped else packet.pts
        if packet.size and stamp is not None and not packet.is_discard:
            stamps.append(stamp)
            last_key = stamp if packet.is_keyframe else last_key
            cut = cut or packet.is_corrupt
    stamps.sort()
    promised = stream.frames
    clock = stream.metadata.get("DURATION", "")
    if not promised and clock.count(":") == 2 and len(stamps) > 1:
        hours, minutes, seconds = clock.split(":")
        whole = int(hours) * 3600 + int(minutes) * 60 + float(seconds)
        steps = np.diff(stamps) * float(stream.time_base)
        missing = whole - stamps[-1] * float(stream.time_base) - float(steps.mean())
        if missing > max(3 * steps.max(), 0.05 * whole):
            promised = len(stamps) + round(missing / float(steps.mean()))
    return stamps, last_key, promised, cut


# --- reading ------------------------------------------------------------------------------------------------


def read(path: str | Path, start: float, frames: int, fps: float, size: tuple[int, int]) -> np.ndarray:
    """Read a window of a clip, scaled to cover `size` and center-cropped: uint8 (t, h, w, 3).

    Args:
        path: video, image (one frame) or `.npz`.
        start: seconds after the clip's first frame.
        frames: number of frames; frame k is the one nearest in time to start + k / fps.
        fps: sampling rate in frames per second.
        size: height and width.

    Raises:
        MediaError: (a ValueError) with path and cause: the clip ends before the window, or the decoder
            reports damage (H.264 decoders usually do; HEVC and VP9 decoders often do not detect it).
    """
    path = Path(path)
    wanted = start + np.arange(frames) / float(fps)
    if kind(path) == "video":
        return _read_video(path, wanted, size)
    if kind(path) == "image":
        with _image(path) as image:
            pixels = _rgb(path, image)[None]
        shown = np.zeros(1)
    else:
        pixels, rate = load_array(path)
        shown = np.arange(len(pixels)) / float(rate or fps)
    if wanted[-1] > shown[-1] + 0.5 / fps + EPSILON:
        raise MediaError(path, _too_short(len(pixels), wanted), "truncated")
    return np.stack([_fit_array(pixels[i], size) for i in nearest(shown, wanted)])


def _too_short(there: int, wanted: np.ndarray) -> str:
    return f"ends after {there} frames, but the window is {len(wanted)} frames from {wanted[0]:.3f} s"


def _read_video(path: Path, wanted: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    from av.video.reformatter import VideoReformatter

    out = np.empty((len(wanted), *size, 3), np.uint8)
    scaler, shown = VideoReformatter(), None
    for i, (frame, sar) in enumerate(_at(path, wanted)):
        if frame is shown:
            out[i] = out[i - 1]
            continue
        out[i], shown = _fit(path, frame, scaler, size, sar), frame
    return out


def _at(path: Path, wanted: np.ndarray) -> Iterator[tuple[Any, float]]:
    """Yield the decoded frame nearest to each wanted time, and its pixel aspect ratio (width / height).

    A repeated frame is the same object.

    Raises:
        MediaError: the video ends before the last wanted time.
    """
    with _opened(path) as (_, stream):
        base, sar = float(stream.time_base), float(stream.sample_aspect_ratio or 1)
    head = next(decode(path), None)
    if head is None or head.pts is None:
        raise MediaError(path, "no frame can be decoded")
    wanted_pts = head.pts + wanted / base
    done = 0
    for frame in _pick(_from(path, wanted_pts[0]), wanted_pts, base):
        done += 1
        yield frame, sar
    if done < len(wanted):
        raise MediaError(path, _too_short(done, wanted), "truncated")


def native(path: Path, wanted: np.ndarray, *, grey: bool = False) -> Iterator[tuple[np.ndarray, float]]:
    """Yield frames at source size, rotated: uint8 (h, w, c), and the pixel aspect ratio (width / height).

    Args:
        path: a video.
        wanted: ascending seconds after the first frame.
        grey: return one channel, 0 to 255 for full and limited range; else RGB, or straight RGBA if the
            video has alpha.

    Raises:
        MediaError: the video ends before the last wanted time, or is damaged.
    """
    from av.video.reformatter import VideoReformatter

    scaler, shown, out = VideoReformatter(), None, (np.empty(0), 1.0)
    for frame, sar in _at(path, wanted):
        if frame is not shown:
            turns, yuv = round(frame.rotation / 90) % 4, not frame.format.is_rgb
            to = "gray" if grey else "rgba" if _has_alpha(frame) else "rgb24"
            matrix = _matrix(frame) if yuv and not grey else None
            made = scaler.reformat(frame, format=to, src_colorspace=matrix, interpolation=_FILTER, threads=1)
            pixels = np.rot90(made.to_ndarray().reshape(frame.height, frame.width, -1), turns)
            out, shown = (pixels, sar if turns % 2 == 0 else 1 / sar), frame
        yield out


def stamps(path: Path) -> np.ndarray:
    """Return the timestamps of a video's frames, in seconds after the first.

    Raises:
        MediaError: no frame can be decoded.
    """
    with _opened(path) as (container, stream):
        found, _, _, _ = _demux(container, stream, path.suffix.lower() in UNSTAMPED)
        base = float(stream.time_base or 0)
    head = next(decode(path), None)
    if head is None or head.pts is None:
        raise MediaError(path, "no frame can be decoded")
    times = np.array([s for s in found if s >= head.pts], np.float64) * base
    return times - times[0]


def _matrix(frame: Any) -> Any:
    """Return the assumed YUV matrix of an untagged frame; None for a tagged one."""
    from av.video.reformatter import Colorspace

    if frame.colorspace != UNTAGGED:
        return None
    return Colorspace.ITU601 if frame.height < 720 else Colorspace.ITU709


def _from(path: Path, pts: float) -> Generator[Any, None, None]:
    """Yield decoded frames from the key frame at or before `pts`, or from the start if seeking overshoots."""
    frames = decode(path, int(pts))
    first = next(frames, None)
    if first is None or first.pts is None or first.pts > pts:
        frames.close()
        yield from decode(path)
        return
    yield first
    yield from frames


def _pick(frames: Iterator[Any], wanted: np.ndarray, base: float) -> Iterator[Any]:
    """Yield the frame nearest to each wanted timestamp, by the rule of `nearest`, as frames arrive in order.

    `available` is strict about the end of a clip; here a wanted time may be at most one frame past it.
    """
    last, longest, done = None, 0.0, 0
    for frame in frames:
        if frame.pts is None or (last is not None and frame.pts <= last.pts):
            continue
        if last is not None:
            longest = max(longest, frame.pts - last.pts)
            while done < len(wanted) and wanted[done] - EPSILON / 2 / base <= (last.pts + frame.pts) / 2:
                yield last
                done += 1
        if done == len(wanted):
            return
        last = frame
    beyond = longest / 2 + (wanted[-1] - wanted[0]) / max(len(wanted) - 1, 1)
    while last is not None and done < len(wanted) and wanted[done] <= last.pts + beyond:
        yield last
        done += 1


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, Any]]:
    """Open a container and its first video stream; FFmpeg errors become `MediaError`."""
    import av
    import av.error
    from av.stream import Disposition

    try:
        with av.open(str(path.absolute()), options={"protocol_whitelist": "file"}) as container:
            streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
            if not streams:
                raise MediaError(path, "has no video stream")
            streams[0].codec_context.thread_count = 1
            yield container, streams[0]
    except av.error.FFmpegError as error:
        raise MediaError(path, f"cannot be read ({error.strerror})") from None


def _no_index(path: Path) -> bool:
    """Return True for an mp4 or mov file that ends before its index (moov) is complete."""
    whole, at, end = [], 0, path.stat().st_size
    with path.open("rb") as file:
        while len(head := file.read(16)) >= 8:
            size = int.from_bytes(head[:4], "big")
            size = int.from_bytes(head[8:], "big") if size == 1 else size
            at += size
            if size < 8 or at > end:
                break
            whole.append(head[4:8])
            file.seek(at)
    return whole[:1] == [b"ftyp"] and b"moov" not in whole


def decode(path: Path, pts: int | None = None) -> Generator[Any, None, None]:
    """Yield decoded frames in presentation order, from the key frame at or before `pts`."""
    from av import CodecContext

    with _opened(path) as (container, stream):
        decoder: Any = stream.codec_context
        if stream.metadata.get("alpha_mode") == "1" and decoder.name in ("vp8", "vp9"):
            # FFmpeg's native VP8 and VP9 decoders silently drop alpha.
            decoder = CodecContext.create({"vp8": "libvpx", "vp9": "libvpx-vp9"}[decoder.name], "r")
        unstamped = path.suffix.lower() in UNSTAMPED
        if pts is not None and not unstamped and path.suffix.lower() not in WHOLE:
            container.seek(pts, stream=stream)
        stamps: list[int] = []
        keyed = False
        for packet in container.demux(stream):
            if packet.size and packet.dts is not None:
                stamps.append(packet.dts)
            if not packet.size and decoder is not stream.codec_context:
                packet = None
            for frame in decoder.decode(packet):
                if unstamped and stamps:
                    frame.pts = stamps.pop(0)
                # After a seek, frames before the first key frame may lack their reference frames: skip them.
                keyed = keyed or frame.key_frame
                if keyed and frame.is_corrupt:
                    raise MediaError(path, f"is damaged at {frame.time or 0:.2f} s")
                yield frame


def _has_alpha(frame: Any) -> bool:
    return any(c.is_alpha for c in frame.format.components)


def _fit(path: Path, frame: Any, scaler: Any, size: tuple[int, int], sar: float) -> np.ndarray:
    """Rotate, scale to cover and center-crop one decoded frame: uint8 (h, w, 3)."""
    turns = round(frame.rotation / 90) % 4
    if _has_alpha(frame):
        pixels = frame.to_ndarray(format="rgba")
        return _fit_array(np.rot90(_on_white(pixels), turns), size, sar if turns % 2 == 0 else 1 / sar)
    height, width = size if turns % 2 == 0 else size[::-1]
    scale = max(height / frame.height, width / (frame.width * sar))
    h, w = max(height, round(frame.height * scale)), max(width, round(frame.width * sar * scale))
    if h * w > PIXEL_LIMIT:
        raise MediaError(path, f"{frame.width}x{frame.height} is too extreme a shape for {size[1]}x{size[0]}")
    scaled = scaler.reformat(
        frame,
        width=w,
        height=h,
        format="rgb24",
        src_colorspace=_matrix(frame),
        interpolation=_FILTER,
        threads=1,
    )
    top, left = (h - height) // 2, (w - width) // 2
    return np.rot90(scaled.to_ndarray()[top : top + height, left : left + width], turns)


def _fit_array(pixels: np.ndarray, size: tuple[int, int], sar: float = 1.0) -> np.ndarray:
    """Scale RGB pixels (h, w, 3) to cover `size` and center-crop them: antialiased bicubic."""
    height, width = pixels.shape[:2]
    scale = max(size[0] / height, size[1] / (width * sar))
    h, w = size[0] / scale, size[1] / scale / sar
    box = ((width - w) / 2, (height - h) / 2, (width + w) / 2, (height + h) / 2)
    box = (max(box[0], 0.0), max(box[1], 0.0), min(box[2], width), min(box[3], height))
    image = Image.fromarray(np.ascontiguousarray(pixels))
    return np.asarray(image.resize((size[1], size[0]), Image.Resampling.BICUBIC, box=box))


def _on_white(rgba: np.ndarray) -> np.ndarray:
    """Composite straight RGBA over white; both uint8."""
    alpha = rgba[..., 3:].astype(np.uint16)
    return ((rgba[..., :3] * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)


# --- images and arrays --------------------------------------------------------------------------------------


@contextmanager
def _image(path: Path) -> Iterator[Image.Image]:
    try:
        with Image.open(path) as image:
            if getattr(image, "n_frames", 1) > 1:
                raise MediaError(path, f"is an animated {image.format}: convert it to mp4 or gif")
            yield image
    except MediaError:
        raise
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        code = "truncated" if "truncated" in str(error) else "unreadable"
        cause = "is not an image" if "cannot identify" in str(error) else f"cannot be read ({error})"
        raise MediaError(path, cause, code) from None


def _rgb(path: Path, image: Image.Image) -> np.ndarray:
    """Return the pixels of an image, with EXIF orientation applied, over white: uint8 (h, w, 3)."""
    if image.mode.startswith(("I", "F")):
        raise MediaError(path, f"has more than 8 bits per channel ({image.mode}): save it as 8-bit RGB")
    alpha = "A" in image.getbands() or "transparency" in image.info
    upright = ImageOps.exif_transpose(image)
    return _on_white(np.asarray(upright.convert("RGBA"))) if alpha else np.asarray(upright.convert("RGB"))


def _header(
    path: Path, channels: Sequence[int]
) -> tuple[tuple[int, int, int], tuple[int, int], Fraction | None]:
    """Return (t, h, w), the channel axis and count, and `fps` of an `.npz`, without loading its frames."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = [n.removesuffix(".npy") for n in archive.namelist()]
            if "frames" not in names:
                raise MediaError(path, f"has no array `frames`; its arrays are: {', '.join(names) or 'none'}")
            with archive.open("frames.npy") as file:
                version = np.lib.format.read_magic(file)
                reader = (
                    np.lib.format.read_array_header_1_0
                    if version == (1, 0)
                    else np.lib.format.read_array_header_2_0
                )
                shape, _, dtype = reader(file)
        fps = None
        if "fps" in names:
            with np.load(path, allow_pickle=False) as arrays:
                fps = Fraction(float(arrays["fps"])).limit_denominator(1001)
    except MediaError:
        raise
    except (OSError, ValueError, zipfile.BadZipFile, EOFError, TypeError) as error:
        raise MediaError(path, f"is not an npz clip ({error})") from None
    places = [(i, n) for n in channels for i in (3, 0, 1) if len(shape) == 4 and shape[i] == n]
    if dtype != np.uint8 or not places or 0 in shape:
        wants = " or ".join(f"(t, h, w, {n}), ({n}, t, h, w) or (t, {n}, h, w)" for n in channels)
        wants = f"uint8 and {wants}"
        raise MediaError(path, f"`frames` is {dtype} {tuple(shape)}; it must be {wants}")
    if fps is not None and fps <= 0:
        raise MediaError(path, f"`fps` is {fps}; it must be positive")
    t, h, w = (n for i, n in enumerate(shape) if i != places[0][0])
    return (t, h, w), places[0], fps


def load_array(path: Path, channels: Sequence[int] = (3,)) -> tuple[np.ndarray, Fraction | None]:
    """Return the frames of an `.npz`, uint8 (t, h, w, c), and its frame rate.

    Args:
        path: the `.npz` file.
        channels: accepted channel counts, the preferred one first.

    Raises:
        MediaError: the file has no such frames.
    """
    _, (axis, _), fps = _header(path, channels)
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return np.moveaxis(arrays["frames"], axis, -1), fps
    except (OSError, ValueError, zipfile.BadZipFile, EOFError, zlib.error) as error:
        raise MediaError(path, f"is damaged ({error})", "truncated") from None


# --- writing ------------------------------------------------------------------------------------------------


def write_video(path: str | Path, frames: np.ndarray, fps: float | Fraction, *, crf: int = 17) -> None:
    """Write an H.264 mp4 (yuv420p, tagged BT.709) atomically.

    Args:
        path: ends in `.mp4`.
        frames: uint8 (t, h, w, 3), even height and width.
        fps: frames per second.
        crf: constant rate factor, 0 (lossless) to 51; 17 is visually lossless.

    Raises:
        ValueError: the frames cannot be stored as H.264.
    """
    import av
    from av.video.reformatter import Colorspace, VideoReformatter

    path = Path(path)
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or not len(frames):
        raise ValueError(f"{path}: a video is uint8 (t, h, w, 3), got {frames.dtype} {frames.shape}")
    height, width = frames.shape[1:3]
    if height % 2 or width % 2:
        even = f"{height // 2 * 2}x{width // 2 * 2}"
        raise ValueError(
            f"{path}: H.264 needs an even height and width, got {height}x{width}: crop to {even}"
        )
    if path.suffix.lower() != ".mp4":
        raise ValueError(f"{path}: videos are written as .mp4: change the suffix")
    with (
        atomic(path) as part,
        av.open(str(part), "w", format="mp4", options={"movflags": "+faststart"}) as container,
    ):
        stream: Any = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.options = {"crf": str(crf)}
        context = stream.codec_context
        context.colorspace = context.color_primaries = context.color_trc = context.color_range = 1
        scaler = VideoReformatter()
        for pixels in frames:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            frame = scaler.reformat(
                frame, format="yuv420p", dst_colorspace=Colorspace.ITU709, interpolation=_FILTER, threads=1
            )
            frame.pts = None
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


@dataclass(frozen=True)
class SheetRow:
    """One clip on a contact sheet."""

    label: str
    caption: str
    frames: np.ndarray
    """uint8 (t, h, w, 3)."""
    note: str = ""
    """Gray text to the right of the label."""


WIDE_FONTS = ("NotoSansCJK-Regular.ttc", "msyh.ttc", "PingFang.ttc", "Arial Unicode.ttf", "DejaVuSans.ttf")
INK, GREY, PAPER, LINE = "#1d2128", "#6b7280", "#fafaf8", "#d9dade"


def contact_sheet(
    rows: Sequence[SheetRow], path: str | Path, *, title: str = "", columns: int = 6, width: int = 1440
) -> None:
    """Write a PNG with one strip of evenly spaced frames per clip, below its label and caption; atomic.

    Args:
        rows: the clips, at least one.
        path: ends in `.png`.
        title: header line.
        columns: maximum frames per strip.
        width: sheet width in pixels.
    """
    margin, gap, tallest = 32, 6, 240
    inner = width - 2 * margin
    head, body, small = _font(26, title), _font(18, "".join(r.label for r in rows)), _font(15, "")
    fonts = [_font(15, row.caption) for row in rows]
    strips = [_strip(row.frames, columns, inner, gap, tallest) for row in rows]
    texts = [_wrap(row.caption, font, inner, 2) for row, font in zip(rows, fonts, strict=True)]
    heights = [30 + 21 * len(text) + 8 + strip.height + 34 for text, strip in zip(texts, strips, strict=True)]
    top = margin + (58 if title else 0)
    sheet = Image.new("RGB", (width, top + sum(heights) + margin - 34), PAPER)
    draw = ImageDraw.Draw(sheet)
    if title:
        draw.text((margin, margin - 8), _wrap(title, head, inner, 1)[0], INK, font=head)
        draw.line((margin, margin + 36, width - margin, margin + 36), LINE, 2)
    for row, text, strip, font, height in zip(rows, texts, strips, fonts, heights, strict=True):
        note = draw.textlength(row.note, small)
        draw.text((margin, top), _wrap(row.label, body, inner - note - 24, 1)[0], INK, font=body)
        draw.text((width - margin - note, top + 3), row.note, GREY, font=small)
        for i, line in enumerate(text):
            draw.text((margin, top + 28 + 21 * i), line, GREY, font=font)
        sheet.paste(strip, (margin, top + 30 + 21 * len(text) + 8))
        top += height
    with atomic(Path(path)) as part:
        sheet.save(part, format="PNG")


def _strip(frames: np.ndarray, columns: int, width: int, gap: int, tallest: int) -> Image.Image:
    """Return evenly spaced frames side by side, without repeats, including the first and the last."""
    picked = np.unique(np.linspace(0, len(frames) - 1, min(columns, len(frames))).round().astype(int))
    scale = min((width - gap * (columns - 1)) / columns / frames.shape[2], tallest / frames.shape[1])
    w, h = max(1, int(frames.shape[2] * scale)), max(1, int(frames.shape[1] * scale))
    strip = Image.new("RGB", (width, h), PAPER)
    for i, k in enumerate(picked):
        strip.paste(Image.fromarray(frames[k]).resize((w, h), Image.Resampling.LANCZOS), (i * (w + gap), 0))
    return strip


def _font(size: int, text: str) -> Any:
    """Return Pillow's default font, or a system font for text beyond Latin letters."""
    if any(ord(c) > 0x24F for c in text):
        for name in (
            "NotoSansCJK-Regular.ttc",
            "msyh.ttc",
            "PingFang.ttc",
            "Arial Unicode.ttf",
            "DejaVuSans.ttf",
        ):
            try:
                return ImageFont.truetype(name, size)
            except OSError:
                continue
    return ImageFont.load_default(size)


def _wrap(text: str, font: Any, width: float, most: int) -> list[str]:
    """Wrap text to `width` pixels, breaking long words; an ellipsis marks text beyond `most` lines."""
    lines = [""]
    for word in " ".join(text.split()).split(" "):
        wider = f"{lines[-1]} {word}".strip()
        if font.getlength(wider) <= width:
            lines[-1] = wider
            continue
        lines += [""] if lines[-1] else []
        for letter in word:
            if font.getlength(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
    if len(lines) > most:
        lines = lines[:most]
        while lines[-1] and font.getlength(lines[-1] + " …") > width:
            lines[-1] = lines[-1][:-1]
        lines[-1] = lines[-1].rstrip() + " …"
    return lines
