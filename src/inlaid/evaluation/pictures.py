"""Strips of frames for the report."""

from __future__ import annotations

import numpy as np
from PIL import Image


def contact_strip(frames: np.ndarray, count: int = 6, wide: int = 160) -> Image.Image:
    """Return evenly spaced frames of a clip in a row with transparent gaps.

    Args:
        frames: uint8 (t, h, w, 3).
        count: number of frames.
        wide: maximum longer side of a frame in pixels; smaller frames keep their size.
    """
    chosen = frames[np.unique(np.linspace(0, len(frames) - 1, count).round().astype(int))]
    height, width = frames.shape[1:3]
    scale = min(1.0, wide / max(height, width))
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    gap = max(1, size[0] // 24)
    row = Image.new("RGBA", ((size[0] + gap) * len(chosen) - gap, size[1]), (0, 0, 0, 0))
    for i, frame in enumerate(chosen):
        image = Image.fromarray(frame)
        row.paste(
            image if scale == 1 else image.resize(size, Image.Resampling.LANCZOS), (i * (size[0] + gap), 0)
        )
    return row
