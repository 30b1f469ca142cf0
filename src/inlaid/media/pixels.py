"""Conversion of decoded frames to RGB: YUV matrix, range, primaries, transfer, orientation, alpha, scaling.

The rules and their sources are:

* YUV matrix and range are used as tagged in the file (ITU-T H.273). An untagged frame is treated as BT.709 if
  it has at least 1280 columns or 720 rows, else as BT.601. Video players do the same.
* Primaries and transfer function: BT.709, BT.601 and sRGB are not converted. Wide gamut and HDR are converted
  to sRGB (module `color`).
* Orientation follows the display matrix of the file (ISO/IEC 14496-12, 8.3.2), including mirroring. For
  images, it follows EXIF.
* Interlaced frames are deinterlaced when they are decoded (`decoding.decode_frames`).
* Frames with alpha are composited over white in runs without alpha. The function `multiplied` estimates
  whether their color is straight or premultiplied.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from PIL import Image, ImageOps

from inlaid.media import color
from inlaid.media.arrays import fit_array
from inlaid.media.kinds import MediaError

PIXEL_LIMIT = 200_000_000
"""Maximum number of pixels of a scaled frame before it is cropped; only extreme aspect ratios exceed it."""

UNTAGGED = (2, 3)
"""FFmpeg's codes for an unspecified YUV matrix."""

MATRICES = {
    0: "identity (a wrong tag)",
    8: "YCgCo",
    10: "BT.2020 constant luminance",
    11: "SMPTE 2085",
    12: "chromaticity-derived",
    13: "chromaticity-derived constant luminance",
    14: "ICtCp",
    15: "IPT-PQ-C2",
    16: "YCgCo-R even",
    17: "YCgCo-R odd",
}
"""Names of the YUV matrices that FFmpeg's scaler cannot convert to RGB, by code (ITU-T H.273, table 4)."""

SCALE_FLAGS = 0x4 | 0x40000 | 0x2000
"""Flags of FFmpeg's scaler: BICUBIC | ACCURATE_RND | FULL_CHR_H_INT. They are numbers, because PyAV has names
for them only since version 18."""


class Orientation(NamedTuple):
    """Transform of decoded pixels for display: pixels are first transposed, then mirrored."""

    transposed: bool = False
    mirror_x: bool = False
    mirror_y: bool = False

    def apply(self, pixels: np.ndarray) -> np.ndarray:
        """Transpose and mirror pixels (h, w, c) for display."""
        pixels = pixels.swapaxes(0, 1) if self.transposed else pixels
        return pixels[:: -1 if self.mirror_y else 1, :: -1 if self.mirror_x else 1]

    @property
    def name(self) -> str:
        """Description for messages, such as `rotated by 90 degrees`; empty if the pixels do not change."""
        if self == Orientation():
            return ""
        turns = {(False, True, True): "180", (True, True, False): "90", (True, False, True): "270"}
        angle = turns.get((self.transposed, self.mirror_x, self.mirror_y))
        return f"rotated by {angle} degrees" if angle else "mirrored"


def orientation(path: Path, frame: Any) -> Orientation:
    """Return the orientation from the display matrix of a decoded frame.

    Raises:
        MediaError: if the display angle is not a multiple of 90 degrees.
    """
    for data in frame.side_data:
        if data.type.name == "DISPLAYMATRIX":
            matrix = np.frombuffer(bytes(data), np.int32).astype(np.int64)
            a, b, c, d = (int(matrix[i]) for i in (0, 1, 3, 4))
            small = max(map(abs, (a, b, c, d))) // 100
            if max(abs(b), abs(c)) <= small:
                return Orientation(False, a < 0, d < 0)
            if max(abs(a), abs(d)) <= small:
                return Orientation(True, c < 0, b < 0)
            angle = np.degrees(np.arctan2(b, a))
            raise MediaError(
                path, f"is displayed at an angle of {angle:.0f} degrees: turn it by multiples of 90"
            )
    return Orientation()


def color_matrix(path: Path, frame: Any) -> Any:
    """Return the YUV matrix to assume for an untagged frame; None if the frame is tagged, RGB or gray.

    Raises:
        MediaError: if the matrix cannot be converted to RGB; the message names the matrix.
    """
    from av.video.reformatter import Colorspace

    if frame.format.is_rgb or len(frame.format.components) < 3:
        return None
    if frame.colorspace in MATRICES:
        raise MediaError(
            path,
            f"its YUV matrix {MATRICES[frame.colorspace]} cannot be converted to RGB: convert it to BT.709",
        )
    if frame.colorspace not in UNTAGGED:
        return None
    return Colorspace.ITU709 if frame.height >= 720 or frame.width >= 1280 else Colorspace.ITU601


def has_alpha(frame: Any) -> bool:
    """Return True if the pixel format of a decoded frame has an alpha channel."""
    return any(c.is_alpha for c in frame.format.components)


def conversions(path: Path, frame: Any) -> list[str]:
    """List the conversions that are needed to display a decoded frame in sRGB.

    Raises:
        MediaError: if the frame cannot be converted.
    """
    color_matrix(path, frame)
    found = color.conversion(frame.color_primaries, frame.color_trc)
    return [
        *([f"{found} converted to sRGB"] if found else []),
        *(["deinterlaced"] if frame.interlaced_frame else []),
        *([name] if (name := orientation(path, frame).name) else []),
    ]


def decoded(
    path: Path, frame: Any, scaler: Any, channels: int, size: tuple[int, int] | None = None
) -> np.ndarray:
    """Convert a decoded frame to sRGB pixels, uint8 (h, w, channels), without rotating it for display.

    Args:
        path: file, for error messages.
        frame: PyAV frame.
        scaler: PyAV reformatter, reused between frames.
        channels: 1 for gray, 3 for RGB, 4 for RGBA. Gray ranges from 0 to 255 even if the video has limited
            range.
        size: height and width to scale to; None keeps the size.

    Raises:
        MediaError: if the frame cannot be converted to RGB.
    """
    import av.error

    height, width = size or (frame.height, frame.width)
    wide = channels > 1 and color.conversion(frame.color_primaries, frame.color_trc)
    formats = {1: "gray", 3: "rgb48le" if wide else "rgb24", 4: "rgba64le" if wide else "rgba"}
    matrix = color_matrix(path, frame) if channels > 1 else None
    try:
        made = scaler.reformat(
            frame,
            width=width,
            height=height,
            format=formats[channels],
            src_colorspace=matrix,
            interpolation=SCALE_FLAGS,
            threads=1,
        )
    except (av.error.FFmpegError, ValueError, MemoryError) as error:
        raise MediaError(path, f"cannot be converted to RGB ({error})") from None
    pixels = made.to_ndarray().reshape(height, width, channels)
    return color.to_srgb(pixels, frame.color_primaries, frame.color_trc) if wide else pixels


def fit_frame(
    path: Path, frame: Any, scaler: Any, size: tuple[int, int], sar: float, premultiplied: bool = False
) -> np.ndarray:
    """Convert a decoded frame to RGB, uint8 (h, w, 3): rotate it, scale it to cover `size`, center-crop it.

    Args:
        path: file, for error messages.
        frame: PyAV frame; alpha is composited over white.
        scaler: PyAV reformatter, reused between frames.
        size: height and width of the result.
        sar: pixel aspect ratio, width / height.
        premultiplied: True if color is already multiplied by alpha.

    Raises:
        MediaError: if the frame's aspect ratio differs too much from `size`, or the frame cannot be
            converted.
    """
    turn = orientation(path, frame)
    if has_alpha(frame):
        pixels = over_white(decoded(path, frame, scaler, 4), premultiplied)
        return fit_array(turn.apply(pixels), size, 1 / sar if turn.transposed else sar)
    height, width = size[::-1] if turn.transposed else size
    scale = max(height / frame.height, width / (frame.width * sar))
    h, w = max(height, round(frame.height * scale)), max(width, round(frame.width * sar * scale))
    if h * w > PIXEL_LIMIT:
        raise MediaError(path, f"{frame.width}x{frame.height} is too extreme a shape for {size[1]}x{size[0]}")
    scaled = decoded(path, frame, scaler, 3, (h, w))
    top, left = (h - height) // 2, (w - width) // 2
    return turn.apply(scaled[top : top + height, left : left + width])


def over_white(rgba: np.ndarray, premultiplied: bool = False) -> np.ndarray:
    """Composite uint8 RGBA (..., 4) over white, and return uint8 RGB (..., 3).

    `premultiplied` is True if the color is premultiplied by alpha.
    """
    alpha = rgba[..., 3:].astype(np.uint16)
    if premultiplied:
        return np.minimum(rgba[..., :3] + (255 - alpha), 255).astype(np.uint8)
    return ((rgba[..., :3] * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)


Multiplied = Literal["straight", "premultiplied", "unclear"]
"""Whether color is multiplied by alpha; `unclear` if the pixels are consistent with both."""

NOISE = 8
"""Maximum error of color values (0 to 255) that is attributed to lossy compression."""


def multiplied(rgba: np.ndarray) -> Multiplied:
    """Estimate whether the color of uint8 RGBA pixels (..., 4) is premultiplied by alpha.

    Premultiplied color is never brighter than alpha. Color is therefore straight if many semi-transparent
    pixels are brighter than their alpha, or if many transparent pixels are not black. Otherwise, brightness
    is fitted as a power of alpha. The exponent is about 1 for premultiplied color, and about 0 for straight
    color. The fit also works without opaque pixels, as in clips of smoke. The result is `unclear` if the
    evidence is ambiguous, or if alpha hardly varies. If a division by alpha would hardly change the color, as
    for black, the result is `straight`.
    """
    alpha, brightest = rgba[..., 3].ravel(), rgba[..., :3].max(-1).ravel()
    soft, transparent = (alpha > 2) & (alpha < 253), alpha == 0
    seen = soft | (alpha >= 253)
    if soft.sum() < 50 or (brightest[soft] * (255 / alpha[soft].astype(float) - 1)).mean() < NOISE:
        return "straight"  # division by alpha would change little
    brighter = brightest[soft].astype(int) - alpha[soft]
    if (brighter > 3 * NOISE).mean() > 0.005:
        return "straight"
    if transparent.any() and (brightest[transparent] > 2 * NOISE).mean() > 0.02:
        return "straight"
    step = 8
    count = np.bincount(alpha[seen] // step, minlength=256 // step)
    levels, values = (
        np.bincount(alpha[seen] // step, x[seen].astype(float), 256 // step) / np.maximum(count, 1)
        for x in (alpha, brightest)
    )
    there = (count >= max(20, seen.sum() // 1000)) & (levels >= 2 * step)
    levels, values = np.log(levels[there]), np.log(np.maximum(values[there], 1))
    coarse = (brighter > NOISE).mean() > 0.005  # straight, or premultiplied and strongly compressed
    if not there.any() or np.ptp(levels) < math.log(1.5):
        return "unclear"
    exponent = np.polyfit(levels, values, 1)[0]
    if exponent < 0.3 or (coarse and exponent < 0.7):
        return "straight"
    return "premultiplied" if exponent > 0.7 and not coarse else "unclear"


def to_rgb(path: Path, image: Image.Image) -> np.ndarray:
    """Convert an image to RGB, uint8 (h, w, 3), after EXIF rotation and conversion from its ICC profile.

    Alpha is composited over white.

    Raises:
        MediaError: if the image has more than 8 bits per channel, or an ICC profile that cannot be applied.
    """
    if image.mode.startswith(("I", "F")):
        raise MediaError(path, f"has more than 8 bits per channel ({image.mode}): save it as 8-bit RGB")
    alpha = "A" in image.getbands() or "transparency" in image.info
    try:
        upright = color.image_to_srgb(ImageOps.exif_transpose(image))
    except ValueError as error:
        raise MediaError(path, str(error)) from None
    return over_white(np.asarray(upright.convert("RGBA"))) if alpha else np.asarray(upright.convert("RGB"))
