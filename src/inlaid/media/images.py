"""Still images: probing and opening."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image

from inlaid.media import color
from inlaid.media.kinds import MediaError, Probe
from inlaid.media.pixels import to_rgb


def probe_image(path: Path) -> Probe:
    """Return the properties of a still image; decodes it to detect damage.

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
def load_image(path: Path) -> Iterator[Image.Image]:
    """Open a still image for a `with` block.

    Read errors inside the block, such as those from decoding the pixels, also become `MediaError`.

    Raises:
        MediaError: if the file cannot be read, is animated, or is too large.
    """
    try:
        with Image.open(path) as image:
            # A phone's JPEG has further pictures inside (MPO): a gain map, a depth map, a second view.
            if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":
                raise MediaError(path, f"is an animated {image.format}: convert it to mp4 or gif")
            yield image
    except MediaError:
        raise
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        code = "truncated" if "truncated" in str(error) else "unreadable"
        cause = "is not an image" if "cannot identify" in str(error) else f"cannot be read ({error})"
        raise MediaError(path, cause, code) from None
