"""Transparent video: reading, measuring, cleanup, compositing, and writing with verification.

Pixels at rest are straight RGBA, uint8 (t, h, w, 4). Computations use float32 in [0, 1].
"""

from __future__ import annotations

import io
import re
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from inlaid import config, media
from inlaid.files import atomic

SEEN = 64
"""Alpha above which the color of a pixel is compared."""

NEAR = 4
"""Distance in pixels from visible pixels within which nearly transparent ones belong to a soft edge."""

ALPHA_EPS = 2 / 255
"""Alpha up to which a pixel counts as transparent: lossy files leave small values in empty regions."""

# --- straight and premultiplied -----------------------------------------------------------------------------


def to_float(pixels: np.ndarray) -> np.ndarray:
    """Convert uint8 to float32 in [0, 1]."""
    return pixels.astype(np.float32) / 255


def to_uint8(values: np.ndarray) -> np.ndarray:
    """Convert float in [0, 1] to uint8."""
    return (values * 255).round().clip(0, 255).astype(np.uint8)


def premultiply(rgba: np.ndarray) -> np.ndarray:
    """Multiply the color of straight float RGBA (..., 4) by its alpha."""
    return np.concatenate([rgba[..., :3] * rgba[..., 3:], rgba[..., 3:]], -1)


def unpremultiply(rgba: np.ndarray, under: np.ndarray | None = None) -> np.ndarray:
    """Convert premultiplied float RGBA (..., 4) to straight; at alpha 0, color is that of `under`, or black.

    8-bit premultiplied color has low precision at low alpha; the lost precision cannot be restored.
    """
    alpha = rgba[..., 3:]
    there = alpha > 1e-4
    color = np.where(there, rgba[..., :3] / np.where(there, alpha, 1), 0 if under is None else under)
    return np.concatenate([color.clip(0, 1), alpha], -1).astype(np.float32)


def resize(
    rgba: np.ndarray, size: tuple[int, int], *, sar: float = 1.0, premultiplied: bool = False
) -> np.ndarray:
    """Scale uint8 (t, h, w, 4) to cover `size` and center-crop it; the result is straight.

    Color is weighted by alpha, so that the color of transparent pixels does not bleed into edges. The filter
    is bicubic with clipped overshoot, which neither fills empty regions nor makes holes. At alpha 0, color is
    scaled without weights.

    Args:
        rgba: straight, or premultiplied with `premultiplied`.
        size: height and width.
        sar: pixel aspect ratio, width / height.
        premultiplied: `rgba` is premultiplied; it is converted to straight after scaling, in float.
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


def mend(rgba: np.ndarray, how: config.Matte) -> np.ndarray:
    """Apply the cleanup of `data.matte` to straight uint8 (t, h, w, 4) at its final size."""
    if how.snap:
        rgba = np.concatenate([rgba[..., :3], snap(rgba[..., 3:], how.snap / 255)], -1)
    if how.decontaminate:
        rgba = decontaminate(rgba)
    behind = {"keep": lambda x: x, "grow": grow, "blur": blur_background}
    return behind[how.background](rgba)


# --- cleanup ------------------------------------------------------------------------------------------------


def fill(color: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Extrapolate color (h, w, 3) smoothly from pixels of weight (h, w, 1) 1 to all others.

    Push-pull on a pyramid: averages weighted by `weight` on the way down, blended on the way up. Pixels of
    weight 1 do not change.
    """
    h, w = weight.shape[:2]
    if min(h, w) <= 1 or weight.min() >= 1:
        total = weight.sum()
        mean = (color * weight).sum((0, 1)) / total if total else np.zeros(3, np.float32)
        return color * weight + (1 - weight) * mean
    padded = [np.pad(x, ((0, h % 2), (0, w % 2), (0, 0)), "edge") for x in (color * weight, weight)]
    half = [x[::2, ::2] + x[1::2, ::2] + x[::2, 1::2] + x[1::2, 1::2] for x in padded]
    there = half[1] > 0
    small = fill(np.where(there, half[0] / np.where(there, half[1], 1), 0), half[1].clip(0, 1))
    wide = np.stack([_enlarge(small[..., i], (h, w)) for i in range(3)], -1)
    return (color * weight + (1 - weight) * wide).astype(np.float32)


def _enlarge(plane: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    image = Image.fromarray(np.ascontiguousarray(plane, np.float32))
    return np.asarray(image.resize((size[1], size[0]), Image.Resampling.BILINEAR))


def _each(rgba: np.ndarray, change: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> np.ndarray:
    """Apply `change` to the color of every frame; it takes color and alpha as floats."""
    frames = (to_float(frame) for frame in rgba)
    return np.stack(
        [to_uint8(np.concatenate([change(f[..., :3], f[..., 3:]), f[..., 3:]], -1)) for f in frames]
    )


def decontaminate(rgba: np.ndarray, opaque: float = 0.95) -> np.ndarray:
    """Remove the background color from soft edges, by extrapolating the color of opaque pixels over them.

    Args:
        rgba: straight uint8 (t, h, w, 4).
        opaque: alpha from which a pixel counts as opaque. A frame without such pixels is unchanged.
    """

    def change(color: np.ndarray, alpha: np.ndarray) -> np.ndarray:
        pure = (alpha >= opaque).astype(np.float32)
        return fill(color, pure) if pure.any() else color

    return _each(rgba, change)


def grow(rgba: np.ndarray, eps: float = ALPHA_EPS) -> np.ndarray:
    """Extrapolate the color of visible pixels under transparent ones, so that edges have no foreign color."""

    def change(color: np.ndarray, alpha: np.ndarray) -> np.ndarray:
        seen = (alpha > eps).astype(np.float32)
        return fill(color, seen) if seen.any() else color

    return _each(rgba, change)


def blur_background(rgba: np.ndarray, radius: float = 8) -> np.ndarray:
    """Fill transparent pixels with a blur of the foreground colors; visible pixels do not change.

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
    """Set alpha (uint8) within `eps` of 0 or 1 to exactly 0 or 255."""
    level = round(255 * eps)
    return np.where(alpha <= level, 0, np.where(alpha >= 255 - level, 255, alpha)).astype(np.uint8)


def binarise(alpha: np.ndarray, eps: float = ALPHA_EPS) -> np.ndarray:
    """Return alpha (uint8) as 255 where it is above `eps` and 0 elsewhere, as in a hard render."""
    return np.where(alpha > round(255 * eps), 255, 0).astype(np.uint8)


# --- compositing --------------------------------------------------------------------------------------------


def checkerboard(height: int, width: int, cell: int = 16) -> np.ndarray:
    """Return a checkerboard, the usual background of transparency: uint8 (h, w, 3)."""
    y, x = np.mgrid[:height, :width] // cell
    return np.where(((x + y) % 2)[..., None], 255, 204).astype(np.uint8).repeat(3, -1)


def composite(
    rgba: np.ndarray, background: np.ndarray, *, premultiplied: bool = False, linear: bool = False
) -> np.ndarray:
    """Composite a foreground over a background: uint8 (t, h, w, 3).

    com = rgb a + (1 - a) background for straight color, com = rgb + (1 - a) background for premultiplied.

    Args:
        rgba: uint8 (t, h, w, 4).
        background: uint8, a color (3,), an image (h, w, 3) or a video (t, h, w, 3).
        premultiplied: `rgba` is premultiplied.
        linear: mix linear light (decoded sRGB) instead of code values; physically correct, but uncommon.
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


def shown(rgba: np.ndarray) -> np.ndarray:
    """Return the preview of straight uint8 (t, h, w, 4): over a checkerboard, with its alpha below.

    Returns:
        uint8 (t, 2 h, w, 3).
    """
    height, width = rgba.shape[1:3]
    board = checkerboard(height, width, max(2, min(16, min(height, width) // 12)))
    return np.concatenate([composite(rgba, board), rgba[..., 3:].repeat(3, -1)], 1)


def composite_file(
    foreground: Path,
    background: str,
    out: Path,
    *,
    premultiplied: bool = False,
    linear: bool = False,
    fps: float | None = None,
) -> Path:
    """Composite a transparent file over a color, an image or a video, and write an mp4.

    Args:
        foreground: any file that `read` supports.
        background: `#rrggbb`, a color name, `checkerboard`, or a file, which is scaled to cover.
        out: ends in `.mp4`.
        premultiplied: as in `composite`.
        linear: as in `composite`.
        fps: frames per second. Default: that of the foreground, or 16 if it has none.

    Raises:
        ValueError: a file cannot be read, the foreground is opaque, or the background is invalid.
    """
    if fps is not None and not fps > 0:
        raise ValueError(f"--fps: {fps:g} is not positive; omit it to use the foreground's frame rate")
    pixels = read(foreground)
    if measure(pixels).lowest == 255:
        raise ValueError(f"{foreground}: is fully opaque; composite needs a file with transparency")
    height, width = (n // 2 * 2 for n in pixels.shape[1:3])  # H.264 needs even sizes
    pixels = pixels[:, :height, :width]
    rate = fps or _rate(foreground)
    path = Path(background).expanduser()
    if background == "checkerboard":
        behind = checkerboard(height, width)
    elif path.is_file():
        frames = 1 if media.kind(path) == "image" else len(pixels)
        there = media.available(media.probe(path), rate)
        if there < frames:
            raise ValueError(
                f"{path}: has {there} frames at {rate:g} fps, but {foreground} has {frames}: use a longer "
                "video, an image or a color"
            )
        behind = media.read(path, 0.0, frames, rate, (height, width))
        behind = behind[0] if frames == 1 else behind
    else:
        from PIL import ImageColor

        try:
            behind = np.array(ImageColor.getrgb(background)[:3], np.uint8)
        except ValueError:
            raise ValueError(
                f"`{background}` is neither a file nor a color such as #20a040, red or checkerboard"
            ) from None
    video = composite(pixels, behind, premultiplied=premultiplied, linear=linear)
    media.write_video(out, video, rate)
    return out


def _rate(path: Path) -> float:
    """Return the frame rate of a file; 16 for still images and folders, which have none."""
    if path.is_dir() or path.suffix.lower() == ".zip":
        return 16.0
    if path.suffix.lower() in (".png", ".webp"):
        with Image.open(path) as image:
            n, total = getattr(image, "n_frames", 1), 0.0
            for i in range(n):
                image.seek(i)
                image.load()  # sets its duration
                total += image.info.get("duration", 0)
        return 1000 * n / total if total else 16.0
    return float(media.probe(path).fps or 16)


def _decode(value: np.ndarray) -> np.ndarray:
    """Convert sRGB code values to linear light (IEC 61966-2-1)."""
    return np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)


def _encode(light: np.ndarray) -> np.ndarray:
    return np.where(light <= 0.0031308, light * 12.92, 1.055 * np.maximum(light, 0) ** (1 / 2.4) - 0.055)


# --- measuring ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Alpha:
    """Alpha statistics of a clip; shares are of all pixels, in [0, 1], unless stated otherwise."""

    coverage: float
    """Mean alpha."""
    soft: float
    """Share of pixels between transparent and opaque."""
    residue: float
    """Share of nearly transparent pixels away from visible ones: residue of lossy coding."""
    lowest: int
    highest: int
    colored: float
    """Share of the transparent pixels whose color is not black."""
    premultiplied: bool
    """Estimate: no soft pixel is brighter than its alpha, and transparent pixels are black."""
    inverted: bool
    """Estimate: the border of the frame is opaque and its middle is not."""
    limited: bool
    """Estimate: no value outside 14 to 237, as if limited range was read as full range."""

    @property
    def looks(self) -> str:
        """Estimates in words: `straight`, or `premultiplied, inverted`."""
        guesses = {"inverted": self.inverted, "limited range": self.limited}
        first = "premultiplied" if self.premultiplied else "straight"
        return ", ".join([first, *(name for name, yes in guesses.items() if yes)])

    @property
    def constant(self) -> bool:
        """True if alpha has one value everywhere."""
        return self.lowest == self.highest


def widened(mask: np.ndarray, by: int) -> np.ndarray:
    """Dilate a mask (t, h, w) by a square of `by` pixels to each side."""
    for axis in (1, 2):
        wide = mask.copy()
        for step in range(1, by + 1):
            n = mask.shape[axis]
            low, high = (np.take(mask, np.arange(*ends), axis) for ends in ((0, n - step), (step, n)))
            head, tail = (slice(step, None), slice(None, -step)) if step < n else (slice(n, None),) * 2
            at = (slice(None),) * axis
            wide[(*at, head)] |= low
            wide[(*at, tail)] |= high
        mask = wide
    return mask


def measure(rgba: np.ndarray, eps: float = ALPHA_EPS) -> Alpha:
    """Measure the alpha of straight or premultiplied uint8 (t, h, w, 4)."""
    alpha, color = rgba[..., 3], rgba[..., :3]
    low, high = 255 * eps, 255 * (1 - eps)
    clear, soft = alpha == 0, (alpha > low) & (alpha < high)
    brightest = color.max(-1)
    edge = np.concatenate(
        [x.reshape(-1) for x in (alpha[:, 0], alpha[:, -1], alpha[:, :, 0], alpha[:, :, -1])]
    )
    h, w = alpha.shape[1:]
    inside = alpha[:, h // 4 : h - h // 4 or h, w // 4 : w - w // 4 or w]
    bright = (alpha >= high) & (brightest > 64)
    return Alpha(
        coverage=float(alpha.mean() / 255),
        soft=float(soft.mean()),
        residue=float(((alpha > 0) & ~widened(alpha > low, NEAR)).mean()),
        lowest=int(alpha.min()),
        highest=int(alpha.max()),
        colored=float((brightest[clear] > 2).mean()) if clear.any() else 0.0,
        premultiplied=bool(soft.sum() >= 50 and bright.any())
        and bool((brightest[soft] <= alpha[soft].astype(int) + 2).mean() > 0.995)
        and bool(not clear.any() or (brightest[clear] <= 2).mean() > 0.995),
        inverted=bool(edge.mean() > 240 and inside.mean() < 200),
        limited=bool(alpha.min() >= 14 and alpha.max() <= 237 and alpha.min() != alpha.max()),
    )


# --- files --------------------------------------------------------------------------------------------------

CARRIERS: dict[str, float] = {".mov": 1.0, ".webm": 1.5, ".zip": 0.0, ".apng": 0.0, ".mkv": 0.0}
"""Suffixes of files with alpha, and the maximum mean error (0-255) of alpha read back."""

COLOR_OFF: dict[str, float] = {".mov": 6.0, ".webm": 32.0, ".zip": 0.0, ".apng": 0.0, ".mkv": 0.0}
"""Maximum mean error (0-255) of the color of visible pixels; VP9 subsamples color, which loses noise."""

SUFFIXES = {"png": ".zip", **{name: f".{name}" for name in config.CARRIERS if name != "png"}}
"""Suffixes of the formats of `sample.transparent`."""


def write(path: str | Path, rgba: np.ndarray, fps: float | Fraction) -> Path:
    """Write straight RGBA, read it back and compare; atomic.

    `.mov` is ProRes 4444, `.webm` VP9, `.zip` a PNG sequence, `.apng` an animated PNG, `.mkv` FFV1; the last
    three are lossless.

    Args:
        path: output file; its suffix selects the format.
        rgba: uint8 (t, h, w, 4).
        fps: frames per second.

    Raises:
        ValueError: the format cannot carry alpha, or the file read back differs from the input.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in CARRIERS:
        raise ValueError(
            f"{path}: `{suffix}` cannot carry alpha; use {', '.join(CARRIERS)}, or composite it first"
        )
    if rgba.dtype != np.uint8 or rgba.ndim != 4 or rgba.shape[-1] != 4 or not len(rgba):
        raise ValueError(f"{path}: transparent video is uint8 (t, h, w, 4), got {rgba.dtype} {rgba.shape}")
    with atomic(path) as part:
        if suffix == ".zip":
            _write_zip(part, rgba)
        else:
            _write_video(part, rgba, Fraction(fps).limit_denominator(1001), suffix)
        there = read(part, suffix)
        if there.shape != rgba.shape:
            raise ValueError(f"{path}: {rgba.shape} was written, but {there.shape} read back")
        off = np.abs(there.astype(np.int16) - rgba)
        seen = rgba[..., 3] > SEEN
        color = float(off[..., :3][seen].mean()) if seen.any() else 0.0
        for what, found, most in (
            ("alpha", float(off[..., 3].mean()), CARRIERS[suffix]),
            ("colour", color, COLOR_OFF[suffix]),
        ):
            if found > most:
                raise ValueError(
                    f"{path}: {what} read back has a mean error of {found:.2f} of 255, more than {most:g}: "
                    "this FFmpeg build writes the format incorrectly; use .zip"
                )
    return path


_CODECS: dict[str, tuple[str, str, str, dict[str, str], str]] = {
    ".mov": ("prores_ks", "yuva444p10le", "mov", {"profile": "4444", "alpha_bits": "8"}, "rgba"),
    ".webm": (
        "libvpx-vp9",
        "yuva420p",
        "webm",
        {"crf": "18", "b": "0", "auto-alt-ref": "0", "row-mt": "1"},
        "rgba",
    ),
    ".apng": ("apng", "rgba", "apng", {}, "rgba"),
    ".mkv": ("ffv1", "bgra", "matroska", {}, "rgba"),
}


def _write_video(path: Path, rgba: np.ndarray, fps: Fraction, suffix: str) -> None:
    import av
    from av.video.reformatter import Colorspace, VideoReformatter

    codec, pix_fmt, container_name, options, source = _CODECS[suffix]
    loop = {"plays": "0"} if suffix == ".apng" else {}
    with av.open(str(path), "w", format=container_name, options=loop) as container:
        stream: Any = container.add_stream(codec, rate=fps)
        stream.height, stream.width = rgba.shape[1:3]
        stream.pix_fmt, stream.options = pix_fmt, options
        yuv = pix_fmt.startswith("yuv")
        if yuv:
            context = stream.codec_context
            context.colorspace = context.color_primaries = context.color_trc = context.color_range = 1
        scaler = VideoReformatter()
        for pixels in rgba:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format=source)
            color = {"dst_colorspace": Colorspace.ITU709} if yuv else {}
            frame = scaler.reformat(frame, format=pix_fmt, threads=1, **color)
            frame.pts = None
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def _write_zip(path: Path, rgba: np.ndarray) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:  # PNG is compressed already
        for i, pixels in enumerate(rgba):
            buffer = io.BytesIO()
            Image.fromarray(pixels).save(buffer, "PNG")
            archive.writestr(zipfile.ZipInfo(f"img_{i:03d}.png"), buffer.getvalue())


def read(path: str | Path, suffix: str | None = None) -> np.ndarray:
    """Read every frame of a transparent file or a folder of PNGs: straight uint8 (t, h, w, 4).

    VP8 and VP9 are decoded with libvpx, because FFmpeg's native decoders silently drop alpha.

    Args:
        path: video, animated or still image, `.zip` of PNGs, or a folder of PNGs; images in natural order.
        suffix: overrides the suffix of the path.

    Raises:
        MediaError: (a ValueError) with the path: the file cannot be read, or its images differ in size.
    """
    path = Path(path)
    suffix = (suffix or path.suffix).lower()
    if path.is_dir():
        names = sorted((p for p in path.iterdir() if p.suffix.lower() == ".png"), key=natural)
        frames = [np.asarray(Image.open(p).convert("RGBA")) for p in names]
    elif suffix == ".zip":
        frames = list(_zipped(path))
    elif suffix in (".png", ".webp"):
        frames = list(_animated(path))
    else:
        frames = [frame.to_ndarray(format="rgba") for frame in media.decode(path)]
    if not frames:
        raise media.MediaError(path, "has no frames")
    sizes = sorted({f.shape[:2] for f in frames})
    if len(sizes) > 1:
        raise media.MediaError(path, f"its images differ in size ({sizes[0]} and {sizes[1]}); resize them")
    return np.stack(frames)


def natural(path: Path) -> list[Any]:
    """Return a natural sort key of a file name: f9 before f10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path.name)]


def _zipped(path: Path) -> Iterator[np.ndarray]:
    try:
        with zipfile.ZipFile(path) as archive:
            names = (Path(n) for n in archive.namelist() if n.lower().endswith(".png"))
            for name in sorted(names, key=natural):
                with archive.open(name.as_posix()) as file:
                    yield np.asarray(Image.open(file).convert("RGBA"))
    except (zipfile.BadZipFile, OSError, SyntaxError) as error:
        raise media.MediaError(path, f"cannot be read ({error})") from None


def _animated(path: Path) -> Iterator[np.ndarray]:
    """Yield the frames of a still or animated PNG or WebP; FFmpeg does not read animated WebP."""
    try:
        with Image.open(path) as image:
            for i in range(getattr(image, "n_frames", 1)):
                image.seek(i)
                yield np.asarray(image.convert("RGBA"))
    except (OSError, SyntaxError, EOFError) as error:
        raise media.MediaError(path, f"cannot be read ({error})") from None
