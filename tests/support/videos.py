"""Makes small video files whose frames say their own number, for tests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.video.reformatter import VideoReformatter

BITS = 8
TICKS = 90_000


def numbered(k: int, size: tuple[int, int]) -> np.ndarray:
    """A frame that shows k as vertical bars, white for 1, lowest bit left; uint8 (h, w, 3)."""
    bits = np.array([255 * (k >> b & 1) for b in range(BITS)], np.uint8)
    row = bits[np.arange(size[1]) * BITS // size[1]]
    return np.repeat(np.repeat(row[None, :, None], size[0], 0), 3, 2)


def numbers(frames: np.ndarray) -> list[int]:
    """The numbers that frames (t, h, w, 3) show, at whatever size."""
    height, width = frames.shape[1:3]
    centers = ((np.arange(BITS) + 0.5) * width / BITS).astype(int)
    return [int(((f[height // 2, centers].mean(-1) > 127) << np.arange(BITS)).sum()) for f in frames]


def write(
    path: Path,
    n: int = 48,
    fps: float | Fraction = 24,
    size: tuple[int, int] = (64, 128),
    *,
    stamps: Sequence[float] | None = None,
    draw: Callable[[int, tuple[int, int]], np.ndarray] = numbered,
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    gop: int = 12,
    rotation: int = 0,
    sar: Fraction | None = None,
    matrix: int = 2,
    trc: int = 2,
    options: dict[str, str] | None = None,
) -> Path:
    """Encodes frames `draw(k, size)` at the given stamps in seconds (default k / fps).

    Args:
        path: its suffix chooses the container.
        n: frames.
        fps: of the header, and of the stamps where none are given.
        size: height and width.
        stamps: presentation times in seconds.
        draw: makes frame k, uint8 (h, w, 3 or 4).
        codec: encoder.
        pix_fmt: as encoded.
        gop: frames between key frames.
        rotation: counter-clockwise, in degrees, in the header.
        sar: sample aspect ratio.
        matrix: FFmpeg's number of the YUV matrix to convert with and tag; 2 is BT.601 without a tag.
        trc: FFmpeg's number of the transfer curve to tag.
        options: of the encoder.
    """
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(codec, rate=Fraction(fps).limit_denominator(1001))
        stream.width, stream.height, stream.pix_fmt = size[1], size[0], pix_fmt
        context = stream.codec_context
        context.gop_size, context.thread_count = gop, 1
        context.colorspace, context.color_trc = matrix, trc
        context.color_range = 0 if matrix == 2 else 1
        if sar:
            context.sample_aspect_ratio = sar
        if stamps is not None:
            context.time_base = stream.time_base = Fraction(1, TICKS)
        stream.options = options or {}
        if rotation:
            stream.set_display_rotation(rotation)
        scaler = VideoReformatter()  # a frame's own method would prepare the conversion for every frame
        for k in range(n):
            pixels = np.ascontiguousarray(draw(k, size))
            frame = av.VideoFrame.from_ndarray(pixels, format="rgba" if pixels.shape[-1] == 4 else "rgb24")
            frame = scaler.reformat(frame, format=pix_fmt, dst_colorspace=1 if matrix == 1 else 5, threads=1)
            if stamps is None:
                frame.pts, frame.time_base = k, 1 / Fraction(fps).limit_denominator(1001)
            else:
                frame.pts, frame.time_base = round(stamps[k] * TICKS), Fraction(1, TICKS)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def still(size: tuple[int, int] = (64, 128), color: tuple[int, ...] = (200, 60, 30)) -> np.ndarray:
    """One color everywhere; uint8 (h, w, c)."""
    return np.broadcast_to(np.array(color, np.uint8), (*size, len(color)))
