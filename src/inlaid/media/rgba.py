"""RGBA video files: reading, writing, alpha statistics and alpha cleanup.

Written files are read back and checked.
"""

from __future__ import annotations

import io
import zipfile
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from inlaid import config
from inlaid.config.sections import ALPHA_EPS
from inlaid.files import atomic
from inlaid.media import rgba_images, video
from inlaid.media.compositing import (
    NEAR,
    SEEN,
    blur_background,
    composite,
    decontaminate,
    grow,
    premultiply,
    snap,
    to_float,
    to_uint8,
)
from inlaid.media.decoding import decode_frames
from inlaid.media.kinds import MediaError
from inlaid.media.pixels import SCALE_FLAGS, Multiplied, decoded, multiplied, orientation


def fix_alpha(rgba: np.ndarray, how: config.Matte) -> np.ndarray:
    """Apply alpha cleanup to resized RGBA frames, straight uint8 (t, h, w, 4).

    The steps are set in the section `data.matte` of the recipe (YAML configuration).
    """
    if how.snap:
        rgba = np.concatenate([rgba[..., :3], snap(rgba[..., 3:], how.snap / 255)], -1)
    if how.decontaminate:
        rgba = decontaminate(rgba)
    behind = {"keep": lambda x: x, "grow": grow, "blur": blur_background}
    return behind[how.background](rgba)


# --- measuring ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AlphaStats:
    """Alpha statistics of a clip.

    Shares are fractions of all pixels, 0 to 1, unless stated otherwise.
    """

    coverage: float
    """Mean alpha."""
    soft: float
    """Share of partially transparent pixels."""
    residue: float
    """Share of nearly transparent pixels far from visible pixels, which are a residue of lossy
    compression."""
    lowest: int
    """Minimum alpha, 0 to 255."""
    highest: int
    """Maximum alpha, 0 to 255."""
    colored: float
    """Fraction of the fully transparent pixels whose color is not black."""
    multiplied: Multiplied
    """Whether color is probably multiplied by alpha (`pixels.multiplied`)."""
    inverted: bool
    """True if alpha is probably inverted: the border of the frame is opaque and the center is not."""
    limited: bool
    """True if limited range was probably read as full range: alpha varies, but all values lie between 14 and
    237."""

    @property
    def looks(self) -> str:
        """Estimated format of alpha as text, such as `straight` or `premultiplied, inverted`."""
        guesses = {"inverted": self.inverted, "limited range": self.limited}
        first = "straight or premultiplied" if self.multiplied == "unclear" else self.multiplied
        return ", ".join([first, *(name for name, yes in guesses.items() if yes)])

    @property
    def premultiplied(self) -> bool:
        """True if color is probably multiplied by alpha."""
        return self.multiplied == "premultiplied"

    @property
    def constant(self) -> bool:
        """True if alpha is the same in all pixels."""
        return self.lowest == self.highest


def widened(mask: np.ndarray, by: int) -> np.ndarray:
    """Dilate a mask (t, h, w) by `by` pixels in each direction, with a square kernel."""
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


def measure_alpha(rgba: np.ndarray, eps: float = ALPHA_EPS) -> AlphaStats:
    """Measure the alpha statistics of RGBA frames.

    Args:
        rgba: straight or premultiplied uint8 (t, h, w, 4).
        eps: alpha (0-1) within this distance of 0 or 1 does not count as partially transparent.
    """
    alpha, color = rgba[..., 3], rgba[..., :3]
    low, high = 255 * eps, 255 * (1 - eps)
    transparent, soft = alpha == 0, (alpha > low) & (alpha < high)
    brightest = color.max(-1)
    edge = np.concatenate(
        [x.reshape(-1) for x in (alpha[:, 0], alpha[:, -1], alpha[:, :, 0], alpha[:, :, -1])]
    )
    h, w = alpha.shape[1:]
    inside = alpha[:, h // 4 : h - h // 4 or h, w // 4 : w - w // 4 or w]
    return AlphaStats(
        coverage=float(alpha.mean() / 255),
        soft=float(soft.mean()),
        residue=float(((alpha > 0) & ~widened(alpha > low, NEAR)).mean()),
        lowest=int(alpha.min()),
        highest=int(alpha.max()),
        colored=float((brightest[transparent] > 2).mean()) if transparent.any() else 0.0,
        multiplied=multiplied(rgba),
        inverted=bool(edge.mean() > 240 and inside.mean() < 200),
        limited=bool(alpha.min() >= 14 and alpha.max() <= 237 and alpha.min() != alpha.max()),
    )


# --- files --------------------------------------------------------------------------------------------------

CARRIERS: dict[str, float] = {".mov": 1.0, ".webm": 1.5, ".zip": 0.0, ".apng": 0.0, ".mkv": 0.0}
"""Maximum mean alpha error (0 to 255) when a written file is read back, by file suffix. The suffixes are
those of all formats with alpha."""

COLOR_OFF: dict[str, float] = {".mov": 6.0, ".webm": 32.0, ".zip": 0.0, ".apng": 0.0, ".mkv": 0.0}
"""Maximum mean color error (0 to 255) of visible pixels when a written file is read back, by file suffix. It
is high for WebM, because VP9 subsamples color."""

PAIR_OFF = 8.0
"""Maximum mean error (0 to 255) of visible pixels when a written pair of color and alpha files is read back
and composited over white."""

PAIR, PAIR_CRF = ("_rgb.mp4", "_alpha.mp4"), 4
"""Name endings of the color file and the alpha file of a pair, and their H.264 constant rate factor."""


def write_rgba(path: str | Path, rgba: np.ndarray, fps: float | Fraction) -> Path:
    """Write straight RGBA frames to a file, and check the file by reading it back.

    The file appears only after a successful check. `.mov` is ProRes 4444, `.webm` is VP9, `.zip` is a PNG
    sequence, `.apng` is an animated PNG, and `.mkv` is FFV1. ProRes and VP9 are lossy, the others lossless.
    Before lossy encoding, transparent pixels get colors that are extrapolated from visible pixels. Otherwise,
    their original colors would bleed into soft edges.

    Args:
        path: output file; its suffix selects the format.
        rgba: uint8 (t, h, w, 4).
        fps: frames per second.

    Raises:
        ValueError: if the format has no alpha, if `rgba` has another type or shape, or if the file read back
            differs too much from the input.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in CARRIERS:
        raise ValueError(
            f"{path}: `{suffix}` cannot carry alpha; use {', '.join(CARRIERS)}, or composite it first"
        )
    _require_rgba(path, rgba)
    with atomic(path) as part:
        if suffix == ".zip":
            _write_zip(part, rgba)
        else:
            grown = grow(rgba) if CARRIERS[suffix] else rgba
            _write_video(part, grown, Fraction(fps).limit_denominator(1001), suffix)
        there = read_rgba(part, suffix)
        if there.shape != rgba.shape:
            raise ValueError(f"{path}: {rgba.shape} was written, but {there.shape} read back")
        off = np.abs(there.astype(np.int16) - rgba)
        seen = rgba[..., 3] > SEEN
        color = float(off[..., :3][seen].mean()) if seen.any() else 0.0
        for what, found, most in (
            ("alpha", float(off[..., 3].mean()), CARRIERS[suffix]),
            ("color", color, COLOR_OFF[suffix]),
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
        {"crf": "12", "b": "0", "auto-alt-ref": "0", "row-mt": "1"},
        "rgba",
    ),
    ".apng": ("apng", "rgba", "apng", {}, "rgba"),
    ".mkv": ("ffv1", "bgra", "matroska", {}, "rgba"),
}


def _write_video(path: Path, rgba: np.ndarray, fps: Fraction, suffix: str) -> None:
    import av
    from av.video.reformatter import Colorspace, VideoReformatter

    codec, pix_fmt, container_name, options, source = _CODECS[suffix]
    muxer = {"plays": "0"} if suffix == ".apng" else {}
    muxer["fflags"] = "+bitexact"  # Matroska would write a random number
    with av.open(str(path), "w", format=container_name, options=muxer) as container:
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
            frame = scaler.reformat(frame, format=pix_fmt, threads=1, interpolation=SCALE_FLAGS, **color)
            frame.pts = None
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def _require_rgba(path: Path, rgba: np.ndarray) -> None:
    if rgba.dtype != np.uint8 or rgba.ndim != 4 or rgba.shape[-1] != 4 or not len(rgba):
        raise ValueError(f"{path}: transparent video is uint8 (t, h, w, 4), got {rgba.dtype} {rgba.shape}")


def write_pair(
    stem: str | Path, rgba: np.ndarray, fps: float | Fraction, *, premultiplied: bool
) -> tuple[Path, Path]:
    """Write RGBA frames as a color video and an alpha video in H.264, and verify them.

    `NAME_rgb.mp4` contains color without chroma subsampling (4:4:4). `NAME_alpha.mp4` contains alpha as a
    gray video. The files are read back and compared with the input. They appear only if the comparison
    succeeds.

    Args:
        stem: path of both files without the endings `_rgb.mp4` and `_alpha.mp4`.
        rgba: uint8 (t, h, w, 4), straight; even height and width.
        fps: frames per second.
        premultiplied: True writes color multiplied by alpha. False writes straight color, in which the color
            of transparent pixels is extended from the visible pixels.

    Returns:
        The color file and the alpha file.

    Raises:
        ValueError: if `rgba` has another type or shape, or if the files read back differ too much from it.
    """
    stem = Path(stem)
    color, matte = (stem.with_name(stem.name + end) for end in PAIR)
    _require_rgba(color, rgba)
    if premultiplied:
        stored = np.stack([to_uint8(premultiply(to_float(frame))[..., :3]) for frame in rgba])
    else:
        stored = grow(rgba)[..., :3]
    with atomic(color) as first, atomic(matte) as second:
        video.write_video(first, stored, fps, crf=PAIR_CRF, pix_fmt="yuv444p")
        video.write_video(second, rgba[..., 3:].repeat(3, -1), fps, crf=PAIR_CRF)
        white, seen = np.full(3, 255, np.uint8), rgba[..., 3] > 0
        over = composite(read_pair(first, second), white, premultiplied=premultiplied)
        off = np.abs(over.astype(np.int16) - composite(rgba, white))[seen]
        if off.size and off.mean() > PAIR_OFF:
            raise ValueError(
                f"{color}: the composite of the pair read back has a mean error of {off.mean():.2f} of 255, "
                f"more than {PAIR_OFF:g}: this FFmpeg build writes H.264 incorrectly; use .zip"
            )
    return color, matte


def read_pair(color: str | Path, matte: str | Path) -> np.ndarray:
    """Read all frames of a color file and its alpha matte as RGBA, uint8 (t, h, w, 4).

    Color is straight or premultiplied, as stored in the file.

    Raises:
        MediaError: if a file cannot be read, or if the two files differ in size or number of frames.
    """
    colors, mattes = (read_rgba(path) for path in (color, matte))
    if colors.shape != mattes.shape:
        sizes = ["{} frames of {}x{}".format(*x.shape[:3]) for x in (colors, mattes)]
        raise MediaError(Path(color), f"{sizes[0]}, and {sizes[1]} in {Path(matte).name}", "pair")
    gray = mattes[..., :3].astype(np.uint16).sum(-1, keepdims=True) + 1
    return np.concatenate([colors[..., :3], (gray // 3).astype(np.uint8)], -1)


def _write_zip(path: Path, rgba: np.ndarray) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:  # PNG is compressed already
        for i, pixels in enumerate(rgba):
            buffer = io.BytesIO()
            Image.fromarray(pixels).save(buffer, "PNG")
            archive.writestr(zipfile.ZipInfo(f"img_{i:03d}.png"), buffer.getvalue())


def read_rgba(path: str | Path, suffix: str | None = None) -> np.ndarray:
    """Read all frames of a video, image, `.zip` or folder of images as RGBA: uint8 (t, h, w, 4).

    Color is straight or premultiplied, as stored in the file. Frames without alpha become opaque. VP8 and VP9
    are decoded with libvpx, because FFmpeg's native decoders silently drop alpha.

    Args:
        path: video, animated or still image, or a `.zip` or folder of images (read in natural order).
        suffix: file suffix that selects the format. Default: the suffix of `path`.

    Raises:
        MediaError: if the file cannot be read, has no frames, or has images of different sizes; the message
            contains the path.
    """
    from av.video.reformatter import VideoReformatter

    path = Path(path)
    suffix = (suffix or path.suffix).lower()
    if path.is_dir() or suffix == ".zip":
        frames = list(rgba_images.read_named(path, range(len(rgba_images.image_names(path)))))
    elif suffix in (".png", ".webp"):
        frames = list(rgba_images.read_animated(path, range(len(rgba_images.frame_times(path)) - 1)))
    else:
        scaler = VideoReformatter()
        frames = [
            orientation(path, frame).apply(decoded(path, frame, scaler, 4)) for frame in decode_frames(path)
        ]
    if not frames:
        raise MediaError(path, "has no frames")
    sizes = sorted({f.shape[:2] for f in frames})
    if len(sizes) > 1:
        raise MediaError(path, f"its images differ in size ({sizes[0]} and {sizes[1]}); resize them")
    return np.stack([np.pad(f, ((0, 0), (0, 0), (0, 4 - f.shape[-1])), constant_values=255) for f in frames])
