"""Decodes the frames of a video with FFmpeg. FFmpeg (25 MB) is imported when the first video is opened."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from inlaid.media.kinds import MediaError

WHOLE = ("gif", "apng")
"""Formats that are always decoded from the start: every frame is marked as a key frame, but depends on
earlier frames."""

UNSTAMPED = ("avi",)
"""Formats whose packets may lack presentation timestamps. Frames get the decoding timestamps of the packets
in order."""


@contextmanager
def opened(path: Path) -> Iterator[tuple[Any, Any]]:
    """Context manager that opens a container and its default video stream.

    FFmpeg errors are converted to `MediaError`.
    """
    import av
    import av.error
    from av.stream import Disposition

    try:
        with av.open(str(path.absolute()), options={"protocol_whitelist": "file"}) as container:
            streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
            if not streams:
                raise MediaError(path, "has no video stream")
            default = [s for s in streams if s.disposition & Disposition.default]
            stream = (default or streams)[0]
            if stream.codec_context is None:
                raise MediaError(path, "its video stream has an unknown codec")
            stream.codec_context.thread_count = 1
            yield container, stream
    except av.error.FFmpegError as error:
        raise MediaError(path, f"cannot be read ({error.strerror})") from None


def decode_frames(path: Path, pts: int | None = None, *, raw: bool = False) -> Generator[Any, None, None]:
    """Yield decoded frames in presentation order, starting at the key frame at or before `pts`.

    Args:
        path: a video.
        pts: timestamp in the stream's time base; None starts at the beginning.
        raw: yield interlaced frames as they are stored; by default they are deinterlaced.

    Raises:
        MediaError: if the file cannot be read or a frame is damaged.
    """
    with opened(path) as (container, stream):
        frames = _stored(path, container, stream, pts)
        yield from frames if raw else _deinterlaced(path, frames, stream)


def _stored(path: Path, container: Any, stream: Any, pts: int | None) -> Iterator[Any]:
    from av import CodecContext

    decoder: Any = stream.codec_context
    if stream.metadata.get("alpha_mode") == "1" and decoder.name in ("vp8", "vp9"):
        # FFmpeg's native VP8 and VP9 decoders silently drop alpha.
        decoder = CodecContext.create({"vp8": "libvpx", "vp9": "libvpx-vp9"}[decoder.name], "r")
    unstamped = container.format.name in UNSTAMPED
    if pts is not None and not unstamped and container.format.name not in WHOLE:
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


def _deinterlaced(path: Path, frames: Iterator[Any], stream: Any) -> Iterator[Any]:
    """Deinterlace frames with FFmpeg's filter bwdif if they are marked as interlaced.

    The number of frames does not change.
    """
    import av.error
    from av.filter import Graph

    graph: Any = None

    def ready() -> Iterator[Any]:
        while True:
            try:
                made = graph.pull()
            except (av.error.BlockingIOError, av.error.EOFError):
                return
            if made.pts is not None:
                scale = made.time_base / stream.time_base
                made.pts, made.duration = round(made.pts * scale), round((made.duration or 0) * scale)
                made.time_base = stream.time_base
            yield made

    for frame in frames:
        if graph is None and not frame.interlaced_frame:
            yield frame
            continue
        if graph is None:
            graph = Graph()
            source = graph.add_buffer(
                width=frame.width,
                height=frame.height,
                format=frame.format,
                time_base=stream.time_base,
            )
            graph.link_nodes(
                source, graph.add("bwdif", "mode=send_frame:deint=interlaced"), graph.add("buffersink")
            )
            graph.configure()
        frame.time_base = stream.time_base
        graph.push(frame)
        yield from ready()
    if graph is not None:
        graph.push(None)
        yield from ready()
