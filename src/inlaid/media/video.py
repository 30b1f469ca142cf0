"""Functions that read the properties and frames of video clips, and write H.264 video.

Pixels are uint8 RGB (t, h, w, 3). Frames are selected by time, never by index, because a container may round
timestamps to milliseconds, start after time 0, and have a variable frame rate. Each frame is scaled when it
is decoded, so that memory never holds a whole window at source size. PyAV, which contains FFmpeg, is imported
when the first video is opened. Training from a complete cache never imports it.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterable, Iterator
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from inlaid.files import atomic
from inlaid.media.arrays import fit_array, load_array, probe_array
from inlaid.media.containers import cut_off
from inlaid.media.decoding import UNSTAMPED, WHOLE, decode_frames, opened
from inlaid.media.images import load_image, probe_image
from inlaid.media.kinds import EPSILON, MediaError, Probe, frames_on_show, media_kind
from inlaid.media.pixels import (
    SCALE_FLAGS,
    UNTAGGED,
    conversions,
    decoded,
    fit_frame,
    has_alpha,
    multiplied,
    orientation,
    over_white,
    to_rgb,
)

INDEXED = ("mov", "matroska", "avi")
"""Formats whose files contain an index. Seeking is exact in these formats, so missing frames at the end prove
that the file is damaged."""

# --- probing ------------------------------------------------------------------------------------------------


def probe(path: str | Path) -> Probe:
    """Return the properties of a clip.

    A video is demuxed completely, but decoded only at its first frame and from its last key frame to the end.

    Raises:
        MediaError: if the file is unreadable or truncated; the message contains path and cause.
    """
    path = Path(path)
    if not path.is_file():
        raise MediaError(path, "no such file")
    if not path.stat().st_size:
        raise MediaError(path, "the file is empty")
    if media_kind(path) == "image":
        return probe_image(path)
    return probe_array(path, (3, 4)) if media_kind(path) == "array" else _probe_video(path)


def _probe_video(path: Path) -> Probe:
    if missing := cut_off(path):
        raise MediaError(path, f"is incomplete: {missing}", "truncated")
    with opened(path) as (container, stream):
        kind = container.format.name
        found = _demux(container, stream)
        base = float(stream.time_base or 0)
        rate, sar, codec = stream.average_rate, stream.sample_aspect_ratio, stream.codec_context.name
    if not found.stamps or not base:
        raise MediaError(path, "has no frames")
    frames = decode_frames(path, raw=True)
    head = next(frames, None)
    if head is None or head.pts is None:
        raise MediaError(path, "no frame can be decoded")
    if kind == "gif":
        found = found._replace(damaged=found.damaged or path.read_bytes().rstrip(b"\0")[-1:] != b";")
    look = _Look(path)
    look.at(head)
    if found.last_key == found.stamps[0]:  # one key frame: its frames are also the end
        lost, broken = _missing_at_the_end(path, found, look, kind, chain([head], frames))
    else:
        frames.close()
        lost, broken = _missing_at_the_end(path, found, look, kind)
    if (
        found.damaged
        or broken
        or lost > 1
        or len(found.stamps) < found.promised - max(2, 0.02 * found.promised)
    ):
        of = f" of {found.promised}" if found.promised > len(found.stamps) - lost else ""
        there = f"{len(found.stamps) - lost}{of} frames"
        raise MediaError(path, f"is incomplete or damaged at its end: {there} can be decoded", "truncated")
    times = np.array([s for s in found.stamps if s >= head.pts], np.float64) * base
    steps = np.diff(times)
    mean = float(times[-1] - times[0]) / len(steps) if len(steps) else 0.0
    interval = float(np.median(steps)) if len(steps) else float(1 / rate) if rate else 0.0
    typical = mean
    if mean > 1.2 * interval:  # a held frame does not make a clip slow
        typical = float(steps[steps <= 1.5 * interval].mean())
    exact = rate and (not typical or abs(float(rate) * typical - 1) < 0.005)
    turn = orientation(path, head)
    height, width = head.height, round(head.width * float(sar or 1))
    return Probe(
        frames=len(times),
        fps=rate if exact else Fraction(1 / typical).limit_denominator(1001) if typical else Fraction(0),
        height=width if turn.transposed else height,
        width=height if turn.transposed else width,
        duration=float(times[-1] - times[0]) + _held(found.last * base, interval),
        interval=interval,
        variable=bool(len(steps))
        and bool(np.abs(steps - interval).max() > max(0.002, 1.1 * base, 0.1 * interval)),
        first=float(times[0]),
        codec=codec,
        pix_fmt=head.format.name,
        transparent=has_alpha(head),
        opaque=look.opaque and has_alpha(head),
        premultiplied=look.premultiplied,
        conversions="; ".join(look.conversions),
        orientation=turn.name,
        untagged=head.colorspace in UNTAGGED and not head.format.is_rgb and len(head.format.components) > 2,
    )


class _Look:
    """Properties of a video, collected from decoded frames.

    They are the color conversions, whether alpha is opaque, and whether color is premultiplied.
    """

    def __init__(self, path: Path) -> None:
        from av.video.reformatter import VideoReformatter

        self._path, self._scaler = path, VideoReformatter()
        self.conversions: list[str] = []
        self.opaque, self.premultiplied = True, False
        self._same: list[bool] = []
        self._seen: set[tuple[Any, ...]] = set()

    def at(self, frame: Any) -> None:
        """Collect the properties of a decoded frame.

        Raises:
            MediaError: if the frame cannot be converted to RGB.
        """
        color = (frame.colorspace, frame.color_primaries, frame.color_trc)
        kind = (frame.format.name, frame.width, frame.height, *color, frame.interlaced_frame)
        new = kind not in self._seen
        self._seen.add(kind)
        if new:
            self.conversions += [c for c in conversions(self._path, frame) if c not in self.conversions]
        if has_alpha(frame):
            pixels = decoded(self._path, frame, self._scaler, 4)
            self.opaque = self.opaque and bool((pixels[..., 3] == 255).all())
            if not self.opaque:
                self._same.append(multiplied(pixels) == "premultiplied")
                self.premultiplied = all(self._same)
        elif new:
            small = (min(frame.height, 64), min(frame.width, 64))
            decoded(self._path, frame, self._scaler, 3, small)


def _missing_at_the_end(
    path: Path, found: _Demuxed, look: _Look, kind: str, tail: Iterable[Any] | None = None
) -> tuple[int, bool]:
    """Decode a video from its last key frame to the end, and count the missing frames.

    In formats without an index, such as MPEG-TS, seeking is inexact. If frames seem to be missing in such a
    format, the whole file is decoded to confirm the loss. `tail` is the
    frames from the last key frame on, if they are decoded already.

    Returns:
        Number of missing frames, and True if decoding failed.
    """
    lost, broken = len(found.stamps), True
    starts = [found.last_key] if kind in WHOLE or kind.startswith(INDEXED) else [found.last_key, None]
    for start in starts:
        there, broken = 0, False
        try:
            for frame in tail or decode_frames(path, start, raw=True):
                if frame.pts is not None and frame.pts >= found.last_key:
                    there += 1
                    look.at(frame)
        except MediaError as error:
            broken = True
            if error.code == "unreadable" and "cannot be converted" in error.cause:
                raise
        tail = None
        lost = max(0, sum(s >= found.last_key for s in found.stamps) - there)
        if lost <= 1 and not broken:
            break
    return lost, broken


def _held(last: float, interval: float) -> float:
    """Return the display time of the last frame in seconds.

    Args:
        last: duration of the last frame in the file.
        interval: time between frames.

    Returns:
        `last` if it exceeds 1.5 times `interval`, else `interval`.
    """
    return last if last > 1.5 * interval else interval


class _Demuxed(NamedTuple):
    """Properties of a video stream, read without decoding. Times are in units of the stream's time base."""

    stamps: list[int]
    """Sorted timestamps of the displayed frames, without the frames that an edit list hides."""
    last_key: int
    """Timestamp of the last key frame."""
    last: int
    """Duration of the last frame; 0 if unknown."""
    promised: int
    """Number of frames that the header declares; 0 if unknown, and for mp4, mov and Matroska, whose index is
    more reliable."""
    damaged: bool


def _demux(container: Any, stream: Any) -> _Demuxed:
    """Read the packets of a stream without decoding them."""
    unstamped = container.format.name in UNSTAMPED
    durations: dict[int, int] = {}
    last_key, damaged = 0, False
    for packet in container.demux(stream):
        stamp = packet.dts if packet.pts is None or unstamped else packet.pts
        if packet.size and stamp is not None and not packet.is_discard:
            durations[stamp] = packet.duration or 0
            last_key = stamp if packet.is_keyframe else last_key
            damaged = damaged or packet.is_corrupt
    stamps = sorted(durations)
    promised = 0 if container.format.name.startswith(("mov", "matroska")) else stream.frames
    return _Demuxed(stamps, last_key, durations[stamps[-1]] if stamps else 0, promised, damaged)


# --- reading ------------------------------------------------------------------------------------------------


def read_frames(
    path: str | Path,
    start: float,
    frames: int,
    fps: float,
    size: tuple[int, int],
    *,
    premultiplied: bool = False,
    rate: float | None = None,
) -> np.ndarray:
    """Read a window of a clip, scaled to cover `size` and center-cropped: uint8 (t, h, w, 3).

    A clip with alpha is composited over white.

    Args:
        path: video, image (one frame) or `.npz`.
        start: seconds from the clip's first frame.
        frames: number of frames. Frame k is the one that the clip displays at the time start + k / fps.
        fps: sampling rate in frames per second.
        size: height and width of the result.
        premultiplied: True if the color of a clip with alpha is already multiplied by alpha.
        rate: frame rate of an `.npz` that does not store its frame rate. Default: the sampling rate.

    Raises:
        MediaError: if the clip ends before the end of the window, or if the decoder reports damage. H.264
            decoders usually report damage; HEVC and VP9 decoders often do not.
    """
    path = Path(path)
    wanted = start + np.arange(frames) / float(fps)
    if media_kind(path) == "video":
        return _read_video(path, wanted, size, fps, premultiplied)
    if media_kind(path) == "image":
        with load_image(path) as image:
            pixels = to_rgb(path, image)[None]
        times = np.zeros(1)
    else:
        pixels, stored = load_array(path, (3, 4))
        times = np.arange(len(pixels)) / float(stored or rate or fps)
    step = max(1 / fps, float(times[-1] - times[-2]) if len(times) > 1 else 0.0)
    if wanted[-1] > times[-1] + step / 2 + EPSILON:
        raise MediaError(path, _too_short(len(pixels), wanted), "truncated")
    shown = (pixels[i] for i in frames_on_show(times, wanted, fps))
    flat = (over_white(p, premultiplied) if p.shape[-1] == 4 else p for p in shown)
    return np.stack([fit_array(p, size) for p in flat])


def _too_short(there: int, wanted: np.ndarray) -> str:
    return f"ends after {there} frames, but the window is {len(wanted)} frames from {wanted[0]:.3f} s"


def _read_video(
    path: Path, wanted: np.ndarray, size: tuple[int, int], fps: float, premultiplied: bool
) -> np.ndarray:
    from av.video.reformatter import VideoReformatter

    out = np.empty((len(wanted), *size, 3), np.uint8)
    scaler, previous = VideoReformatter(), None
    for i, (frame, sar) in enumerate(_at(path, wanted, fps)):
        if frame is previous:
            out[i] = out[i - 1]
            continue
        out[i], previous = fit_frame(path, frame, scaler, size, sar, premultiplied), frame
    return out


def _at(path: Path, wanted: np.ndarray, fps: float | None = None) -> Iterator[tuple[Any, float]]:
    """Yield the frame for each wanted time, and its pixel aspect ratio, which is width / height.

    If a frame is repeated, the same object is yielded again.

    Args:
        path: a video.
        wanted: ascending times in seconds from the first frame.
        fps: sampling rate in frames per second. With a rate, the frame that is displayed at each time is
            yielded. With None, it is the frame whose start is nearest.

    Raises:
        MediaError: if the video ends before the last wanted time.
    """
    with opened(path) as (_, stream):
        base, sar = float(stream.time_base), float(stream.sample_aspect_ratio or 1)
    head = next(decode_frames(path), None)
    if head is None or head.pts is None:
        raise MediaError(path, "no frame can be decoded")
    wanted_pts = head.pts + wanted / base
    step = 1 / float(fps) / base if fps else math.inf
    done = 0
    for frame in _pick(_from(path, wanted_pts[0]), wanted_pts, base, step):
        done += 1
        yield frame, sar
    if done < len(wanted):
        raise MediaError(path, _too_short(done, wanted), "truncated")


def native_frames(
    path: Path, wanted: np.ndarray, *, gray: bool = False
) -> Iterator[tuple[np.ndarray, float]]:
    """Yield pairs (frame, pixel aspect ratio); the frames are those nearest to the wanted times.

    Frames are uint8 (h, w, c). They have the size of the source, and are rotated for display. The pixel
    aspect ratio is width / height.

    Args:
        path: a video.
        wanted: ascending times in seconds from the first frame.
        gray: yield one channel, which ranges from 0 to 255 even if the video has limited range. Otherwise,
            frames are RGB, or RGBA as stored if the video has alpha.

    Raises:
        MediaError: if the video ends before the last wanted time or is damaged.
    """
    from av.video.reformatter import VideoReformatter

    scaler, previous, out = VideoReformatter(), None, (np.empty(0), 1.0)
    for frame, sar in _at(path, wanted):
        if frame is not previous:
            turn = orientation(path, frame)
            channels = 1 if gray else 4 if has_alpha(frame) else 3
            pixels = turn.apply(decoded(path, frame, scaler, channels))
            out, previous = (pixels, 1 / sar if turn.transposed else sar), frame
        yield out


def frame_times(path: Path) -> np.ndarray:
    """Return the start time of each frame of a video and the end time of the last frame.

    Times are in seconds from the first frame.

    Raises:
        MediaError: if no frame can be decoded.
    """
    with opened(path) as (container, stream):
        found = _demux(container, stream)
        base = float(stream.time_base or 0)
    head = next(decode_frames(path), None)
    if head is None or head.pts is None:
        raise MediaError(path, "no frame can be decoded")
    times = np.array([s for s in found.stamps if s >= head.pts], np.float64) * base
    interval = float(np.median(np.diff(times))) if len(times) > 1 else 0.0
    return np.append(times - times[0], times[-1] - times[0] + _held(found.last * base, interval))


def _from(path: Path, pts: float) -> Generator[Any, None, None]:
    """Yield decoded frames, starting at the key frame at or before `pts`.

    If seeking overshoots `pts`, frames are decoded from the start of the file.
    """
    frames = decode_frames(path, int(pts))
    first = next(frames, None)
    if first is None or first.pts is None or first.pts > pts:
        frames.close()
        yield from decode_frames(path)
        return
    yield first
    yield from frames


def _pick(frames: Iterator[Any], wanted: np.ndarray, base: float, step: float) -> Iterator[Any]:
    """Yield the frame that is displayed at each wanted timestamp, by the rule of `frames_on_show`.

    The generator stops at the first timestamp that is too late for the last frame. The limit is the start of
    this frame plus the larger of two durations. One is the frame's own duration. The other is half the
    longest frame interval plus the mean interval between the wanted timestamps.

    Args:
        frames: decoded frames in presentation order.
        wanted: ascending timestamps, in units of `base`.
        base: time base of the stream, in seconds.
        step: sampling interval, in units of `base`.
    """
    last, longest, done = None, 0.0, 0
    for frame in frames:
        if frame.pts is None or (last is not None and frame.pts <= last.pts):
            continue
        if last is not None:
            gap = frame.pts - last.pts
            longest = max(longest, gap)
            until = (last.pts + frame.pts) / 2 if gap <= step else frame.pts - step / 2
            while done < len(wanted) and wanted[done] - EPSILON / 2 / base <= until:
                yield last
                done += 1
        if done == len(wanted):
            return
        last = frame
    beyond = longest / 2 + (wanted[-1] - wanted[0]) / max(len(wanted) - 1, 1)
    if last is not None:
        beyond = max(beyond, last.duration or 0)
    while last is not None and done < len(wanted) and wanted[done] <= last.pts + beyond:
        yield last
        done += 1


# --- writing ------------------------------------------------------------------------------------------------


def write_video(
    path: str | Path,
    frames: np.ndarray,
    fps: float | Fraction,
    *,
    crf: int = 17,
    preset: str | None = None,
    threads: int = 0,
    pix_fmt: Literal["yuv420p", "yuv444p"] = "yuv420p",
) -> None:
    """Write an H.264 mp4 file (tagged as BT.709), atomically.

    Args:
        path: output file, which must end in `.mp4`.
        frames: uint8 (t, h, w, 3), even height and width.
        fps: frames per second.
        crf: constant rate factor, 0 (lossless) to 51; 17 is visually lossless.
        preset: x264 preset, from `ultrafast` to `veryslow`. Default: x264's default.
        threads: threads of the encoder; 0 uses all cores.
        pix_fmt: `yuv420p` has chroma at half the height and width; every player supports it. `yuv444p` has
            chroma at full resolution. Programs based on FFmpeg support `yuv444p`; many others do not.

    Raises:
        ValueError: if the frames cannot be stored as H.264, or `path` does not end in `.mp4`.
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
        stream.width, stream.height, stream.pix_fmt = width, height, pix_fmt
        stream.options = {"crf": str(crf), **({"preset": preset} if preset else {})}
        context = stream.codec_context
        context.thread_count = threads
        context.colorspace = context.color_primaries = context.color_trc = context.color_range = 1
        scaler = VideoReformatter()
        for pixels in frames:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            frame = scaler.reformat(
                frame,
                format=pix_fmt,
                dst_colorspace=Colorspace.ITU709,
                interpolation=SCALE_FLAGS,
                threads=1,
            )
            frame.pts = None
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
