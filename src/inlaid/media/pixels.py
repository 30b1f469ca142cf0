"""Meaning of decoded pixels: color matrix, range, orientation, alpha; scaled and cropped to RGB."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from inlaid.media.arrays import fit_array
from inlaid.media.kinds import MediaError

PIXEL_LIMIT = 200_000_000
"""Maximum pixels of a scaled frame before cropping; only extreme aspect ratios reach it."""

UNTAGGED = 2
"""FFmpeg's code for an unspecified YUV matrix."""

HDR = (16, 18)
"""FFmpeg's codes for the transfer functions PQ and HLG."""

SCALE_FLAGS = 0x4 | 0x40000 | 0x2000
"""FFmpeg's BICUBIC | ACCURATE_RND | FULL_CHR_H_INT; PyAV has names for the flags only since version 18."""


def color_matrix(frame: Any) -> Any:
    """Return the assumed YUV matrix of an untagged frame; None for a tagged one."""
    from av.video.reformatter import Colorspace

    if frame.colorspace != UNTAGGED:
        return None
    return Colorspace.ITU601 if frame.height < 720 else Colorspace.ITU709


def has_alpha(frame: Any) -> bool:
    """Return True if the format of a decoded frame has alpha."""
    """Report whether the pixel format of a decoded frame has an alpha channel."""
    return any(c.is_alpha for c in frame.format.components)


def fit_frame(path: Path, frame: Any, scaler: Any, size: tuple[int, int], sar: float) -> np.ndarray:
    """Rotate, scale to cover and center-crop one decoded frame: uint8 (h, w, 3)."""
    turns = round(frame.rotation / 90) % 4
    if has_alpha(frame):
        pixels = frame.to_ndarray(format="rgba")
        return fit_array(np.rot90(over_white(pixels), turns), size, sar if turns % 2 == 0 else 1 / sar)
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
        src_colorspace=color_matrix(frame),
        interpolation=SCALE_FLAGS,
        threads=1,
    )
    top, left = (h - height) // 2, (w - width) // 2
    return np.rot90(scaled.to_ndarray()[top : top + height, left : left + width], turns)


def over_white(rgba: np.ndarray) -> np.ndarray:
    """Composite straight RGBA over white; both uint8."""
    alpha = rgba[..., 3:].astype(np.uint16)
    return ((rgba[..., :3] * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)


def to_rgb(path: Path, image: Image.Image) -> np.ndarray:
    """Return the pixels of an image, with EXIF orientation applied, over white: uint8 (h, w, 3)."""
    if image.mode.startswith(("I", "F")):
        raise MediaError(path, f"has more than 8 bits per channel ({image.mode}): save it as 8-bit RGB")
    alpha = "A" in image.getbands() or "transparency" in image.info
    upright = ImageOps.exif_transpose(image)
    return over_white(np.asarray(upright.convert("RGBA"))) if alpha else np.asarray(upright.convert("RGB"))
