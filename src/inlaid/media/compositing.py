"""Operations on straight and premultiplied RGBA: compositing, resizing and color cleanup."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image

from inlaid.config.sections import ALPHA_EPS

SEEN = 64
"""Alpha (0 to 255) above which a pixel counts as visible when a written file is read back and compared."""

NEAR = 4
"""Maximum width of a soft edge, in pixels. Nearly transparent pixels farther from visible pixels are not part
of an edge; they are counted as residue of lossy compression."""

# --- straight and premultiplied -----------------------------------------------------------------------------


def to_float(pixels: np.ndarray) -> np.ndarray:
    """Convert uint8 values to float32 in [0, 1]."""
    return pixels.astype(np.float32) / 255


def to_uint8(values: np.ndarray) -> np.ndarray:
    """Convert float values in [0, 1] to uint8."""
    return (values * 255).round().clip(0, 255).astype(np.uint8)


def premultiply(rgba: np.ndarray) -> np.ndarray:
    """Multiply the color of straight float RGBA (..., 4) by its alpha."""
    return np.concatenate([rgba[..., :3] * rgba[..., 3:], rgba[..., 3:]], -1)


def unpremultiply(rgba: np.ndarray, under: np.ndarray | None = None) -> np.ndarray:
    """Convert premultiplied float RGBA (..., 4) to straight RGBA, float32.

    Transparent pixels get the color of `under` (..., 3), or black. Premultiplied color that was stored with
    8 bits has low precision at low alpha; the lost precision cannot be restored.
    """
    alpha = rgba[..., 3:]
    there = alpha > 1e-4
    color = np.where(there, rgba[..., :3] / np.where(there, alpha, 1), 0 if under is None else under)
    return np.concatenate([color.clip(0, 1), alpha], -1).astype(np.float32)


def resize(
    rgba: np.ndarray, size: tuple[int, int], *, sar: float = 1.0, premultiplied: bool = False
) -> np.ndarray:
    """Scale RGBA frames to cover `size`, and center-crop them; the result has straight alpha.

    Color is weighted by alpha, so that the color of transparent pixels does not bleed into edges. Where the
    result is fully transparent, there is no weighted color. Such pixels get color that is scaled without
    weights, or black if `rgba` is premultiplied. The filter is bicubic; overshoot is clipped.

    Args:
        rgba: uint8 (t, h, w, 4).
        size: height and width of the result.
        sar: pixel aspect ratio, width / height.
        premultiplied: True if `rgba` is premultiplied, False if it is straight. Premultiplied frames are
            scaled first, and then converted to straight alpha in float.
    """
    height, width = rgba.shape[1:3]
    if (height, width) == tuple(size) and sar == 1:
        if not premultiplied:
            return rgba
        return np.stack([to_uint8(unpremultiply(to_float(frame))) for frame in rgba])
    scale = max(size[0] / height, size[1] / (width * sar))
    h, w = size[0] / scale, size[1] / scale / sar
    box = ((width - w) / 2, (height - h) / 2, (width + w) / 2, (height + h) / 2)
    box = (max(box[0], 0.0), max(box[1], 0.0), min(box[2], width), min(box[3], height))

    def scaled(plane: np.ndarray) -> np.ndarray:
        image = Image.fromarray(np.ascontiguousarray(plane, np.float32))
        return np.asarray(image.resize((size[1], size[0]), Image.Resampling.BICUBIC, box=box)).clip(0, 1)

    out = []
    for frame in rgba:
        straight = to_float(frame)
        weighted = straight if premultiplied else premultiply(straight)
        planes = np.stack([scaled(weighted[..., i]) for i in range(4)], -1)
        under = None if premultiplied else np.stack([scaled(straight[..., i]) for i in range(3)], -1)
        out.append(to_uint8(unpremultiply(planes, under)))
    return np.stack(out)


# --- cleanup ------------------------------------------------------------------------------------------------


def fill(color: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Extrapolate color smoothly from pixels of weight 1 to all other pixels.

    The method is the push-pull algorithm on an image pyramid. Downsampling averages color by weight;
    upsampling blends this color into pixels of low weight. Pixels of weight 1 do not change.

    Args:
        color: float (h, w, 3).
        weight: float (h, w, 1), 0 to 1.
    """
    planes = [np.ascontiguousarray(color[..., i], np.float32) for i in range(color.shape[-1])]
    return np.stack(_fill(planes, np.ascontiguousarray(weight[..., 0], np.float32)), -1)


def _fill(color: list[np.ndarray], weight: np.ndarray) -> list[np.ndarray]:
    """Compute `fill` for separate color planes (h, w).

    This takes a third of the time that an array (h, w, 3) would take.
    """
    h, w = weight.shape
    if min(h, w) <= 1 or weight.min() >= 1:
        total = weight.sum()
        means = [(x * weight).sum() / total if total else np.float32(0) for x in color]
        return [x * weight + (1 - weight) * mean for x, mean in zip(color, means, strict=True)]
    weighted = [x * weight for x in color]
    *sums, halved = (_quarter(x) for x in (*weighted, weight))
    divisor = np.where(halved > 0, halved, 1)
    small = _fill([np.where(halved > 0, x / divisor, 0) for x in sums], halved.clip(0, 1))
    rest = 1 - weight
    return [x + rest * _enlarge(plane, (h, w)) for x, plane in zip(weighted, small, strict=True)]


def _quarter(plane: np.ndarray) -> np.ndarray:
    """Sum each 2 x 2 cell of a plane (h, w); if a side is odd, the last row or column is repeated."""
    h, w = plane.shape
    if h % 2 or w % 2:
        plane = np.pad(plane, ((0, h % 2), (0, w % 2)), "edge")
    return plane[::2, ::2] + plane[1::2, ::2] + plane[::2, 1::2] + plane[1::2, 1::2]


def _enlarge(plane: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    image = Image.fromarray(np.ascontiguousarray(plane, np.float32))
    return np.asarray(image.resize((size[1], size[0]), Image.Resampling.BILINEAR))


def _each(rgba: np.ndarray, change: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> np.ndarray:
    """Replace the color of every frame by `change(color, alpha)`, computed in float."""
    frames = (to_float(frame) for frame in rgba)
    return np.stack(
        [to_uint8(np.concatenate([change(f[..., :3], f[..., 3:]), f[..., 3:]], -1)) for f in frames]
    )


def decontaminate(rgba: np.ndarray, opaque: float = 0.95) -> np.ndarray:
    """Remove background color from soft edges.

    The color of every pixel that is not opaque is replaced by color extrapolated from opaque pixels.

    Args:
        rgba: straight uint8 (t, h, w, 4).
        opaque: minimum alpha of an opaque pixel, 0 to 1. A frame without opaque pixels is unchanged.
    """

    def change(color: np.ndarray, alpha: np.ndarray) -> np.ndarray:
        pure = (alpha >= opaque).astype(np.float32)
        return fill(color, pure) if pure.any() else color

    return _each(rgba, change)


def grow(rgba: np.ndarray, eps: float = ALPHA_EPS) -> np.ndarray:
    """Replace the color of transparent pixels by color extrapolated from visible pixels.

    Lossy encoding then mixes no unrelated color into the edges.

    Args:
        rgba: straight uint8 (t, h, w, 4).
        eps: maximum alpha of a transparent pixel, 0 to 1.
    """

    def change(color: np.ndarray, alpha: np.ndarray) -> np.ndarray:
        seen = (alpha > eps).astype(np.float32)
        return fill(color, seen) if seen.any() else color

    return _each(rgba, change)


def blur_background(rgba: np.ndarray, radius: float = 8) -> np.ndarray:
    """Fill transparent pixels with blurred foreground color; visible pixels do not change.

    Args:
        rgba: straight uint8 (t, h, w, 4).
        radius: radius of the Gaussian blur in pixels.
    """
    from PIL import ImageFilter

    out = []
    for frame, grown in zip(rgba, grow(rgba), strict=True):
        soft = Image.fromarray(grown[..., :3]).filter(ImageFilter.GaussianBlur(radius))
        seen = frame[..., 3:] > 255 * ALPHA_EPS
        out.append(np.concatenate([np.where(seen, frame[..., :3], np.asarray(soft)), frame[..., 3:]], -1))
    return np.stack(out)


def snap(alpha: np.ndarray, eps: float = ALPHA_EPS) -> np.ndarray:
    """Set alpha (uint8) values up to 255 * `eps` to 0, and values from 255 * (1 - `eps`) to 255."""
    level = round(255 * eps)
    return np.where(alpha <= level, 0, np.where(alpha >= 255 - level, 255, alpha)).astype(np.uint8)


# --- compositing --------------------------------------------------------------------------------------------


def checkerboard(height: int, width: int, cell: int = 16) -> np.ndarray:
    """Return a white and gray checkerboard to show transparency: uint8 (h, w, 3)."""
    y, x = np.mgrid[:height, :width] // cell
    return np.where(((x + y) % 2)[..., None], 255, 204).astype(np.uint8).repeat(3, -1)


def composite(
    rgba: np.ndarray, background: np.ndarray, *, premultiplied: bool = False, linear: bool = False
) -> np.ndarray:
    """Composite a foreground over a background, and return uint8 (t, h, w, 3).

    The result is rgb * a + (1 - a) * background for straight color, and rgb + (1 - a) * background for
    premultiplied color.

    Args:
        rgba: foreground, uint8 (t, h, w, 4).
        background: uint8; a color (3,), an image (h, w, 3) or a video (t, h, w, 3).
        premultiplied: True if `rgba` is premultiplied.
        linear: blend in linear light (decoded sRGB) instead of gamma-encoded values. This is physically
            correct, but uncommon.
    """
    out = []
    for i, frame in enumerate(rgba):
        color, alpha = to_float(frame[..., :3]), to_float(frame[..., 3:])
        back = to_float(background[i] if background.ndim == 4 else background)
        if linear:
            if premultiplied:
                color = unpremultiply(np.concatenate([color, alpha], -1))[..., :3]
            mixed = _encode(_decode(color) * alpha + (1 - alpha) * _decode(back))
        else:
            mixed = (color if premultiplied else color * alpha) + (1 - alpha) * back
        out.append(to_uint8(mixed))
    return np.stack(out)


def preview(rgba: np.ndarray) -> np.ndarray:
    """Return preview frames of a clip with alpha.

    The upper half shows the clip over a checkerboard. The lower half shows alpha in gray.

    Args:
        rgba: straight uint8 (t, h, w, 4).

    Returns:
        uint8 (t, 2 h, w, 3).
    """
    height, width = rgba.shape[1:3]
    board = checkerboard(height, width, max(2, min(16, min(height, width) // 12)))
    return np.concatenate([composite(rgba, board), rgba[..., 3:].repeat(3, -1)], 1)


def _decode(value: np.ndarray) -> np.ndarray:
    """Convert gamma-encoded sRGB values to linear light (IEC 61966-2-1)."""
    return np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)


def _encode(light: np.ndarray) -> np.ndarray:
    return np.where(light <= 0.0031308, light * 12.92, 1.055 * np.maximum(light, 0) ** (1 / 2.4) - 0.055)
