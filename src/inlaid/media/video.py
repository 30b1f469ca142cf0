"""Clips: probing, reading a time window, and writing H.264 video.

Pixels are uint8 RGB (t, h, w, 3). Frames are selected by time, never by index, because a container may round
timestamps to milliseconds, start after time 0, and have a variable frame rate. Each frame is scaled when
decoded, so that memory never holds a whole window at source size. FFmpeg (25 MB) is imported when the first
video is opened; training from a complete cache never imports it.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from inlaid.files import atomic
from inlaid.media.arrays import fit_array, load_array, probe_array
from inlaid.media.images import load_image, probe_image
from inlaid.media.kinds import EPSILON, MediaError, Probe, media_kind, nearest_frames
from inlaid.media.pixels import HDR, SCALE_FLAGS, UNTAGGED, color_matrix, fit_frame, has_alpha, to_rgb

WHOLE = (".gif", ".apng")
"""Suffixes of formats without seeking: every frame is marked as a key frame but depends on earlier frames."""

UNSTAMPED = (".avi",)
"""Suffixes of formats whose packets may lack presentation times; frames get the decoding times in order."""

# --- probing ------------------------------------------------------------------------------------------------


def probe(path: str | Path) -> Probe:
    """Return the properties of a clip.

    Demuxes the whole file, but decodes only the first frame and the frames from the last key frame on.

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
    return probe_array(path) if media_kind(path) == "array" else _probe_video(path)


def _probe_video(path: Path) -> Probe:
    if _no_index(path):
        raise MediaError(path, "is incomplete: its index (moov) is missing", "truncated")
    with _opened(path) as (container, stream):
        stamps, last_key, promised, cut = _demux(container, stream, path.suffix.lower() in UNSTAMPED)
        base = float(stream.time_base or 0)
        rate, sar, codec = stream.average_rate, stream.sample_aspect_ratio, stream.codec_context.name
    if not stamps or not base:
        raise MediaError(path, "has no frames")
    head = next(decode_frames(path), None)
    if head is None or head.pts is None:
        raise MediaError(path, "no frame can be decoded")
    times = np.array([s for s in stamps if s >= head.pts], np.float64) * base
    if path.suffix.lower() == ".gif":
        cut = cut or path.read_bytes().rstrip(b"\0")[-1:] != b";"
    tail = 0
    try:
        for frame in decode_frames(path, last_key):
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
        transparent=has_alpha(head),
        hdr=head.color_trc in HDR,
        untagged=head.colorspace == UNTAGGED and not head.format.is_rgb,
    )


def _demux(container: Any, stream: Any, unstamped: bool) -> tuple[list[int], int, int, bool]:
    """Return sorted timestamps, the last key frame's timestamp, the promised frame count, and a damage flag.

    The promised frame count is that of the header, or follows from its duration; 0 if unknown.
    """
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


def read_frames(path: str | Path, start: float, frames: int, fps: float, size: tuple[int, int]) -> np.ndarray:
    """Read a window of a clip, scaled to cover `size` and center-cropped: uint8 (t, h, w, 3).

    Args:
        path: video, image (one frame) or `.npz`.
        start: seconds from the clip's first frame.
        frames: number of frames; frame k is the one nearest in time to start + k / fps.
        fps: sampling rate in frames per second.
        size: height and width.

    Raises:
        MediaError: if the clip ends before the end of the window, or if the decoder reports damage (H.264
            decoders usually do; HEVC and VP9 decoders often do not).
    """
    path = Path(path)
    wanted = start + np.arange(frames) / float(fps)
    if media_kind(path) == "video":
        return _read_video(path, wanted, size)
    if media_kind(path) == "image":
        with load_image(path) as image:
            pixels = to_rgb(path, image)[None]
        times = np.zeros(1)
    else:
        pixels, rate = load_array(path)
        times = np.arange(len(pixels)) / float(rate or fps)
    if wanted[-1] > times[-1] + 0.5 / fps + EPSILON:
        raise MediaError(path, _too_short(len(pixels), wanted), "truncated")
    return np.stack([fit_array(pixels[i], size) for i in nearest_frames(times, wanted)])


def _too_short(there: int, wanted: np.ndarray) -> str:
    return f"ends after {there} frames, but the window is {len(wanted)} frames from {wanted[0]:.3f} s"


def _read_video(path: Path, wanted: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    from av.video.reformatter import VideoReformatter

    out = np.empty((len(wanted), *size, 3), np.uint8)
    scaler, previous = VideoReformatter(), None
    for i, (frame, sar) in enumerate(_at(path, wanted)):
        if frame is previous:
            out[i] = out[i - 1]
            continue
        out[i], previous = fit_frame(path, frame, scaler, size, sar), frame
    return out


def _at(path: Path, wanted: np.ndarray) -> Iterator[tuple[Any, float]]:
    """Yield the decoded frame nearest to each wanted time, and its pixel aspect ratio (width / height).

    A repeated frame is yielded as the same object.

    Raises:
        MediaError: if the video ends before the last wanted time.
    """
    with _opened(path) as (_, stream):
        base, sar = float(stream.time_base), float(stream.sample_aspect_ratio or 1)
    head = next(decode_frames(path), None)
    if head is None or head.pts is None:
        raise MediaError(path, "no frame can be decoded")
    wanted_pts = head.pts + wanted / base
    done = 0
    for frame in _pick(_from(path, wanted_pts[0]), wanted_pts, base):
        done += 1
        yield frame, sar
    if done < len(wanted):
        raise MediaError(path, _too_short(done, wanted), "truncated")


def native_frames(
    path: Path, wanted: np.ndarray, *, gray: bool = False
) -> Iterator[tuple[np.ndarray, float]]:
    """Yield pairs of a frame at source size, uint8 (h, w, c), and its pixel aspect ratio (width / height).

    Frames are rotated as displayed.

    Args:
        path: a video.
        wanted: ascending times in seconds from the first frame.
        gray: yield one channel, 0 to 255 also for limited-range video; otherwise RGB, or straight RGBA if
            the video has alpha.

    Raises:
        MediaError: if the video ends before the last wanted time or is damaged.
    """
    from av.video.reformatter import VideoReformatter

    scaler, previous, out = VideoReformatter(), None, (np.empty(0), 1.0)
    for frame, sar in _at(path, wanted):
        if frame is not previous:
            turns, yuv = round(frame.rotation / 90) % 4, not frame.format.is_rgb
            to = "gray" if gray else "rgba" if has_alpha(frame) else "rgb24"
            matrix = color_matrix(frame) if yuv and not gray else None
            made = scaler.reformat(
                frame, format=to, src_colorspace=matrix, interpolation=SCALE_FLAGS, threads=1
            )
            pixels = np.rot90(made.to_ndarray().reshape(frame.height, frame.width, -1), turns)
            out, previous = (pixels, sar if turns % 2 == 0 else 1 / sar), frame
        yield out


def timestamps(path: Path) -> np.ndarray:
    """Return the timestamps of a video's frames, in seconds from the first frame.

    Raises:
        MediaError: if no frame can be decoded.
    """
    with _opened(path) as (container, stream):
        found, _, _, _ = _demux(container, stream, path.suffix.lower() in UNSTAMPED)
        base = float(stream.time_base or 0)
    head = next(decode_frames(path), None)
    if head is None or head.pts is None:
        raise MediaError(path, "no frame can be decoded")
    times = np.array([s for s in found if s >= head.pts], np.float64) * base
    return times - times[0]


def _from(path: Path, pts: float) -> Generator[Any, None, None]:
    """Yield decoded frames from the key frame at or before `pts`, or from the start if seeking overshoots."""
    frames = decode_frames(path, int(pts))
    first = next(frames, None)
    if first is None or first.pts is None or first.pts > pts:
        frames.close()
        yield from decode_frames(path)
        return
    yield first
    yield from frames


def _pick(frames: Iterator[Any], wanted: np.ndarray, base: float) -> Iterator[Any]:
    """Yield the frame nearest to each wanted timestamp; in a tie, the earlier frame, as in `nearest_frames`.

    At the end of the clip, the limit is less strict than in `available_formats`: a wanted time may be up to
    half the longest frame interval plus one output interval after the last frame.

    Args:
        frames: decoded frames in presentation order.
        wanted: ascending timestamps, in units of `base`.
        base: time base of the stream, in seconds.
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


def decode_frames(path: Path, pts: int | None = None) -> Generator[Any, None, None]:
    """Yield decoded frames in presentation order, from the key frame at or before `pts`, or from the start.

    Raises:
        MediaError: if the file cannot be read or a frame is damaged.
    """
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
                # After a seek, frames before the first key frame may lack references: ignore their damage.
                keyed = keyed or frame.key_frame
                if keyed and frame.is_corrupt:
                    raise MediaError(path, f"is damaged at {frame.time or 0:.2f} s")
                yield frame


# --- writing ------------------------------------------------------------------------------------------------


def write_video(path: str | Path, frames: np.ndarray, fps: float | Fraction, *, crf: int = 17) -> None:
    """Write an H.264 mp4 (yuv420p, tagged BT.709) atomically.

    Args:
        path: ends in `.mp4`.
        frames: uint8 (t, h, w, 3), even height and width.
        fps: frames per second.
        crf: constant rate factor, 0 (lossless) to 51; 17 is visually lossless.

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
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.options = {"crf": str(crf)}
        context = stream.codec_context
        context.colorspace = context.color_primaries = context.color_trc = context.color_range = 1
        scaler = VideoReformatter()
        for pixels in frames:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            frame = scaler.reformat(
                frame,
                format="yuv420p",
                dst_colorspace=Colorspace.ITU709,
                interpolation=SCALE_FLAGS,
                threads=1,
            )
            frame.pts = None
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
