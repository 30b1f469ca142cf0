"""Small transparent clips, a tiny transparent family, and writers for what rgba.write does not write."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.video.reformatter import VideoReformatter
from PIL import Image

from inlaid.alpha.composed import Composed
from inlaid.media import compositing

T, H, W = 9, 32, 64


def clip(seed: int = 0, frames: int = T, size: tuple[int, int] = (H, W)) -> np.ndarray:
    """A soft disc that moves over textured color: straight uint8 (t, h, w, 4), clear outside."""
    height, width = size
    y, x = np.mgrid[:height, :width].astype(np.float32)
    out = []
    for k in range(frames):
        far = np.hypot(x - width * (0.3 + 0.03 * k), y - height / 2)
        alpha = ((height * 0.35 - far) / 4).clip(0, 1)
        color = np.stack(
            [0.4 + 0.6 * x / width, 0.3 + 0.7 * y / height, 0.6 + 0.4 * np.sin(x / 9 + seed)], -1
        )
        out.append(compositing.to_uint8(np.concatenate([color.clip(0, 1), alpha[..., None]], -1)))
    return np.stack(out)


def video(
    path: Path, frames: np.ndarray, fps: float = 16, codec: str = "ffv1", pix_fmt: str = "", **options: str
) -> Path:
    """Writes RGBA, RGB or gray frames with a codec and pixel format, exact by default."""
    kinds = {1: ("gray", "gray"), 3: ("rgb24", "bgr0"), 4: ("rgba", "bgra")}
    source, default = kinds[frames.shape[-1]]
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(codec, rate=Fraction(fps).limit_denominator(1001))
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt, stream.options = pix_fmt or default, options
        stream.codec_context.thread_count, scaler = 1, VideoReformatter()
        for pixels in frames:
            pixels = np.ascontiguousarray(pixels[..., 0] if source == "gray" else pixels)
            frame = av.VideoFrame.from_ndarray(pixels, format=source)
            frame = scaler.reformat(frame, format=pix_fmt or default, threads=1)
            frame.pts = None
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def pair(folder: Path, name: str, frames: np.ndarray, ends: Sequence[str] = ("_rgb", "_alpha")) -> Path:
    """Writes color and matte as two exact videos, and a caption; returns the color."""
    folder.mkdir(parents=True, exist_ok=True)
    color = video(folder / f"{name}{ends[0]}.mkv", frames[..., :3])
    video(folder / f"{name}{ends[1]}.mkv", frames[..., 3:])
    (folder / f"{name}.txt").write_text(f"caption {name}", "utf-8")
    return color


def images(folder: Path, frames: np.ndarray) -> Path:
    """Writes a folder of PNGs whose numbers have no leading zeros."""
    folder.mkdir(parents=True)
    for k, pixels in enumerate(frames):
        Image.fromarray(pixels.squeeze()).save(folder / f"f{k + 5}.png")
    return folder


def animated(path: Path, frames: np.ndarray, duration: float = 62.5, **options: Any) -> Path:
    """Writes an animated WebP or PNG."""
    first, *rest = [Image.fromarray(f) for f in frames]
    first.save(path, save_all=True, append_images=rest, duration=duration, loop=0, **options)
    return path


class Glass(Composed):
    """Stands before a family and makes it transparent without learning anything: light is opaque."""

    def __init__(self, opaque: Any, section: Any) -> None:
        super().__init__(opaque)

    def encode_media(self, encoder: Any, frames: np.ndarray) -> dict[str, Any]:
        assert frames.shape[-1] == 4
        over = compositing.composite(frames, np.zeros(3, np.uint8))
        return self.opaque.encode_media(encoder, over)

    def sample(self, *args: Any, **kwargs: Any) -> np.ndarray:
        video = self.opaque.sample(*args, **kwargs)
        light = video.mean(-1, keepdims=True)
        low, high = np.percentile(light, [40, 70])
        alpha = compositing.to_uint8(((light - low) / (high - low + 1)).clip(0, 1))
        return np.concatenate([video, alpha], -1)


def transparent(raw: dict[str, Any], folder: Path, n: int = 4) -> dict[str, Any]:
    """A recipe on transparent clips, in pairs; for families that `Glass` stands before."""
    if not folder.is_dir():
        for i in range(n):
            pair(folder, f"{i:02d}", clip(i, size=(32, 32)))
    return raw | {"data": raw["data"] | {"sources": str(folder), "cache": None}, "alpha": {"kind": "joint"}}
