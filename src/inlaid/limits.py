"""Limits on the sizes that files may declare; an environment variable can raise each limit.

A header of a few bytes can declare terabytes, and a small archive can expand to gigabytes. Declared sizes are
therefore compared with the size of the file and with these limits before memory is allocated.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass


@dataclass(frozen=True)
class Limit:
    """Limit on a size. The environment variable `variable` replaces the default."""

    variable: str
    default: float
    unit: float = 1.0
    """Unit in which `default` and the environment variable are given, such as 1e9 (bytes) for GB."""

    @property
    def value(self) -> float:
        """Current value of the limit, in bytes or as a count.

        Raises:
            ValueError: if the environment variable is set, but not to a positive number.
        """
        text = os.environ.get(self.variable, "")
        if not text:
            return self.default * self.unit
        try:
            given = float(text)
        except ValueError:
            given = math.nan
        if not given > 0:
            raise ValueError(f"{self.variable}={text}: not a positive number")
        return given * self.unit

    def exceeded(self, size: float, what: str) -> str:
        """Return an error message if `size` is above the limit, else an empty string.

        Args:
            size: size in bytes, or a count, such as a number of pixels.
            what: beginning of the message, such as `has 12 GB`.
        """
        limit = self.value
        if size <= limit:
            return ""
        return f"{what}, above the limit of {limit / self.unit:,g}: set {self.variable} to allow more"


ARRAY = Limit("INLAID_MAX_ARRAY_GB", 4, 1e9)
"""Maximum decoded bytes of one array, one archive member or one animated image."""

EXPANSION = Limit("INLAID_MAX_EXPANSION", 200)
"""Maximum decoded bytes per stored byte of an archive member that is larger than `SMALL`."""

PIXELS = Limit("INLAID_MAX_MEGAPIXELS", 120, 1e6)
"""Maximum number of pixels of an image."""

TEXT = Limit("INLAID_MAX_TEXT_MB", 64, 1e6)
"""Maximum bytes of a manifest, prompt list, JSON file or JSON header."""

CAPTION = Limit("INLAID_MAX_CAPTION_MB", 1, 1e6)
"""Maximum bytes of a caption file."""

DEPTH = Limit("INLAID_MAX_DEPTH", 100)
"""Maximum number of nesting levels of JSON."""

RECIPE = Limit("INLAID_MAX_RECIPE_MB", 2, 1e6)
"""Maximum bytes of a recipe."""

RECIPE_VALUES = Limit("INLAID_MAX_RECIPE_VALUES", 50_000)
"""Maximum number of values of a recipe, with YAML aliases expanded."""

RECIPE_DEPTH = Limit("INLAID_MAX_RECIPE_DEPTH", 30)
"""Maximum number of nesting levels of a recipe."""

POINTS = Limit("INLAID_MAX_POINTS", 4e6)
"""Maximum number of points of a surface file."""

TRIANGLES = Limit("INLAID_MAX_TRIANGLES", 2e7)
"""Triangles of a mesh file, with all copies of a mesh."""

OBJECTS = Limit("INLAID_MAX_OBJECTS", 255)
"""Maximum number of objects in a segmentation."""

SMALL = 256_000_000
"""Decoded size in bytes up to which an archive member may have any compression ratio, because images of one
color compress well."""


def as_size(size: float) -> str:
    """Return a number of bytes as text, such as `1.9 GB`."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


def expanded(size: int, stored: int, what: str) -> str:
    """Return an error message if a compressed archive member is too large, else an empty string.

    Decoded size and compression ratio are limited. A member without compression may have any size.

    Args:
        size: decoded size in bytes.
        stored: size in the archive in bytes.
        what: name of the member, for the message.
    """
    ratio = size / max(1, stored)
    if ratio <= 1.1:
        return ""
    large = ARRAY.exceeded(size, f"{what} has {as_size(size)}")
    if large or size <= SMALL:
        return large
    return EXPANSION.exceeded(
        ratio, f"{what} expands {ratio:.0f} times, from {as_size(stored)} to {as_size(size)}"
    )


def nesting(text: str) -> int:
    """Return the maximum nesting depth of brackets in a JSON text from which all strings were removed."""
    import numpy as np

    deepest = depth = 0
    for start in range(0, len(text), 1 << 20):
        raw = np.frombuffer(text[start : start + (1 << 20)].encode("ascii", "replace"), np.uint8)
        steps = np.zeros(len(raw), np.int32)
        steps[(raw == ord("[")) | (raw == ord("{"))] = 1
        steps[(raw == ord("]")) | (raw == ord("}"))] = -1
        depths = depth + np.cumsum(steps)
        deepest, depth = max(deepest, int(depths.max())), int(depths[-1])
    return deepest
