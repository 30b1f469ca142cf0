"""Still images: reading of properties, and opening with size checks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image

from inlaid import limits
from inlaid.media import color
from inlaid.media.kinds import MediaError, Probe
from inlaid.media.pixels import to_rgb
from inlaid.reading import reading, require_file


def probe_image(path: Path) -> Probe:
    """Return the properties of a still image; it is fully decoded to detect damage.

    Height and width are those after EXIF rotation.

    Raises:
        MediaError: if the file cannot be read, is animated, or has more than 8 bits per channel.
    """
    with load_image(path) as image:
        turned = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)
        height, width = (image.width, image.height) if turned else (image.height, image.width)
        alpha = "A" in image.getbands() or "transparency" in image.info
        to_rgb(path, image)
        profile = color.icc_name(image)
        return Probe(
            1,
            None,
            height,
            width,
            0.0,
            codec=image.format or "",
            pix_fmt=image.mode,
            transparent=alpha,
            opaque=alpha and bool((np.asarray(image.convert("RGBA"))[..., 3] == 255).all()),
            conversions=f"{profile} converted to sRGB" if profile else "",
        )


@contextmanager
def load_image(path: Path, *, animated: bool = False) -> Iterator[Image.Image]:
    """Context manager that opens an image, after checking the size that its header declares.

    Exceptions that Pillow raises inside the `with` block, for example when it decodes pixels, are converted
    to `MediaError`.

    Args:
        path: the file.
        animated: accept images with several frames.

    Raises:
        MediaError: if the file cannot be read or is too large, or if it is animated and `animated` is False.
    """
    with reading(path, _unreadable):
        require_file(path, MediaError)
        with checked_image(path, path) as image:
            # A phone's JPEG has further pictures inside (MPO): a gain map, a depth map, a second view.
            if not animated and getattr(image, "n_frames", 1) > 1 and image.format != "MPO":
                raise MediaError(path, f"is an animated {image.format}: convert it to mp4 or gif")
            yield image


def checked_image(source: Path | IO[bytes], path: Path, what: str = "") -> Image.Image:
    """Open an image with Pillow without decoding it, and check the size that its header declares.

    Args:
        source: path or open file of the image.
        path: path that appears in error messages.
        what: name of the image inside an archive or folder, for error messages.

    Raises:
        MediaError: if the image is larger than `limits.PIXELS`, or all frames of an animated image together
            are larger than `limits.ARRAY`.
    """
    named = f"image {what} " if what else ""
    allowed = limits.PIXELS.value
    # Pillow has its own limit: it warns above the limit, and raises above twice the limit.
    Image.MAX_IMAGE_PIXELS = int(max(Image.MAX_IMAGE_PIXELS or 0, allowed))
    try:
        image = Image.open(source)
    except Image.DecompressionBombError:
        large = limits.PIXELS.exceeded(3 * Image.MAX_IMAGE_PIXELS, f"{named}has far too many pixels")
        raise MediaError(path, large) from None
    pixels = image.width * image.height
    if large := limits.PIXELS.exceeded(pixels, f"{named}has {pixels / 1e6:.0f} megapixels"):
        raise MediaError(path, large)
    frames = getattr(image, "n_frames", 1)
    total = 4 * pixels * frames
    if frames > 1 and (
        large := limits.ARRAY.exceeded(total, f"{frames} frames have {limits.as_size(total)}")
    ):
        raise MediaError(path, named + large)
    return image


def _unreadable(path: Path, cause: str, code: str) -> MediaError:
    return MediaError(path, "is not an image" if "cannot identify" in cause else cause, code)
