"""`inlaid composite`: composite a transparent video over a background."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from inlaid.console import say
from inlaid.data.rgba_clips import Pairs
from inlaid.media.compositing import checkerboard, composite
from inlaid.media.kinds import available_frames, media_kind
from inlaid.media.pixels import multiplied
from inlaid.media.rgba import read_pair, read_rgba
from inlaid.media.video import probe, read_frames, write_video


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
        foreground: transparent video or image, folder or .zip of PNGs, or color file with an alpha matte
            beside it.
        background: `#rrggbb`, a color name, `checkerboard`, or a file. A file is scaled to cover the frame.
        out: path of the mp4 file.
        premultiplied: True if the color of the foreground is premultiplied by alpha.
        linear: blend in linear light instead of gamma-encoded values.
        fps: frames per second. Default: the frame rate of the foreground, or 16 if it has none.

    Raises:
        ValueError: if a file cannot be read, the foreground is opaque, the background is invalid, or `fps` is
            not positive.
    """
    if fps is not None and not fps > 0:
        raise ValueError(f"--fps: {fps:g} is not positive; omit it to use the foreground's frame rate")
    pixels = read_rgba(foreground)
    if (pixels[..., 3] == 255).all() and (mattes := Pairs(foreground.parent).matte(foreground)):
        pixels = read_pair(foreground, mattes[0])
    if (pixels[..., 3] == 255).all():
        raise ValueError(
            f"{foreground}: is fully opaque; composite needs a file with transparency, or a color file such "
            "as dog_rgb.mp4 with dog_alpha.mp4 beside it"
        )
    if not premultiplied and multiplied(pixels) == "premultiplied":
        say(f"note: {foreground}: color looks premultiplied: if edges are too dark, use --premultiplied")
    height, width = (n // 2 * 2 for n in pixels.shape[1:3])  # H.264 needs even sizes
    pixels = pixels[:, :height, :width]
    rate = fps or _rate(foreground)
    path = Path(background).expanduser()
    if background == "checkerboard":
        behind = checkerboard(height, width)
    elif path.is_file():
        frames = 1 if media_kind(path) == "image" else len(pixels)
        there = available_frames(probe(path), rate)
        if there < frames:
            raise ValueError(
                f"{path}: has {there} frames at {rate:g} fps, but {foreground} has {frames}: use a longer "
                "video, an image or a color"
            )
        behind = read_frames(path, 0.0, frames, rate, (height, width))
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
    write_video(out, video, rate)
    return out


def _rate(path: Path) -> float:
    """Return the frame rate of a file or folder, in frames per second.

    Still images, folders of images and .zip files have no frame rate. The result is then 16.
    """
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
    return float(probe(path).fps or 16)
