"""Marked frames: four colors and a frame number, so that colors, orientation and choice can be read back."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.video.reformatter import Colorspace, VideoReformatter

COLORS = {"tl": (200, 40, 40), "tr": (40, 180, 60), "bl": (40, 60, 200), "br": (220, 200, 40)}
"""Colors of the quarters: top left, top right, bottom left, bottom right."""

SIZE = (96, 160)


def frame(number: int, size: tuple[int, int] = SIZE) -> np.ndarray:
    """Four quarters, and a band with the bits of the number, lowest first: uint8 (h, w, 3)."""
    h, w = size
    out = np.zeros((h, w, 3), np.uint8)
    for rows, columns, name in (
        (slice(0, h // 2), slice(0, w // 2), "tl"),
        (slice(0, h // 2), slice(w // 2, w), "tr"),
        (slice(h // 2, h), slice(0, w // 2), "bl"),
        (slice(h // 2, h), slice(w // 2, w), "br"),
    ):
        out[rows, columns] = COLORS[name]
    for bit in range(8):
        at = slice(w // 10 * (bit + 1), w // 10 * (bit + 2))
        out[h // 2 - h // 8 : h // 2 + h // 8, at] = 235 if number >> bit & 1 else 20
    return out


FRAMES = [frame(i) for i in range(96)]


def number(pixels: np.ndarray) -> int:
    """The number of a frame of `frame`."""
    h, w = pixels.shape[:2]
    return sum(int(pixels[h // 2, int(w / 10 * (b + 1.5))].mean() > 127) << b for b in range(8))


def numbers(clip: np.ndarray) -> list[int]:
    return [number(pixels) for pixels in clip]


def patches(pixels: np.ndarray) -> dict[str, tuple[float, ...]]:
    """Mean colors of the quarters, away from band and edges."""
    h, w = pixels.shape[:2]
    rows, columns = {"t": h // 6, "b": h - h // 6}, {"l": w // 4, "r": w - w // 4}
    out = {}
    for name in COLORS:
        y, x = rows[name[0]], columns[name[1]]
        out[name] = tuple(pixels[y - 3 : y + 3, x - 3 : x + 3].reshape(-1, 3).mean(0))
    return out


def off(pixels: np.ndarray, colors: dict[str, tuple[int, int, int]] = COLORS) -> float:
    """Largest error of the four colors, of 255."""
    found = patches(pixels)
    return max(float(np.abs(np.subtract(found[k], colors[k])).max()) for k in colors)


def write(
    path: Path,
    frames: Sequence[np.ndarray],
    *,
    fps: int = 16,
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    container: str | None = None,
    tags: tuple[int, int, int, int] | None = (1, 1, 1, 1),
    matrix: Any = Colorspace.ITU709,
    ticks: Sequence[int] | None = None,
    last: int | None = None,
    source: str = "",
    **options: Any,
) -> Path:
    """Encode frames.

    Args:
        path: output file.
        frames: uint8 (h, w, 3 or 4), or uint16 with a `source` format.
        fps: frame rate.
        codec: encoder.
        pix_fmt: format as encoded.
        container: format, if the suffix does not tell it.
        tags: matrix, primaries, transfer and range of the stream.
        matrix: YUV matrix that is really used.
        ticks: presentation times in 1/1600 s.
        last: duration of the last packet in 1/1600 s.
        source: format of the frames.
        options: of the encoder; underscores become dashes.
    """
    with av.open(str(path), "w", format=container) as out:
        stream: Any = out.add_stream(codec, rate=fps)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = pix_fmt
        stream.options = {
            k.replace("_", "-"): str(v) for k, v in {"crf": 8, **options}.items() if v is not None
        }
        context = stream.codec_context
        if tags:
            context.colorspace, context.color_primaries, context.color_trc, context.color_range = tags
        if ticks:
            context.time_base = Fraction(1, 1600)
        packets: list[Any] = []
        context.thread_count, scaler = 1, VideoReformatter()
        for i, pixels in enumerate(frames):
            kind = source or ("rgba" if pixels.shape[2] == 4 else "rgb24")
            made: Any = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format=kind)
            made = scaler.reformat(made, format=pix_fmt, dst_colorspace=matrix, threads=1)
            made.pts = ticks[i] if ticks else None
            if ticks:
                made.time_base = Fraction(1, 1600)
            packets += stream.encode(made)
        packets += stream.encode()
        end = max(p.pts for p in packets)
        for packet in packets:
            if last and packet.pts == end:
                packet.duration = last
            out.mux(packet)
    return path


def show_only(path: Path, start: float, seconds: float) -> None:
    """Let the edit list of an mp4 show only a part, as lossless trimming on a phone does."""
    raw = bytearray(path.read_bytes())

    def word(at: int) -> int:
        return struct.unpack(">I", raw[at : at + 4])[0]

    at = raw.find(b"elst")
    movie, media = word(raw.find(b"mvhd") + 16), word(raw.find(b"mdhd") + 16)
    before = struct.unpack(">i", raw[at + 16 : at + 20])[0]
    raw[at + 12 : at + 20] = struct.pack(">Ii", int(seconds * movie), before + int(start * media))
    path.write_bytes(raw)


def display(path: Path, matrix: Sequence[int]) -> None:
    """Replace the display matrix (a, b, c, d; 16.16 fixed point as integers) of an mp4."""
    raw = bytearray(path.read_bytes())
    at = raw.find(b"tkhd")
    start = at + 4 + (40 if raw[at + 4] == 0 else 52)
    a, b, c, d = (v << 16 for v in matrix)
    raw[start : start + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(raw)
