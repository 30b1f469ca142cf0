"""Frames of known content."""

from __future__ import annotations

from fractions import Fraction

import numpy as np

CONTAINERS = [
    ("mp4", "libx264", "yuv420p"),
    ("mov", "libx264", "yuv420p"),
    ("m4v", "libx264", "yuv420p"),
    ("mkv", "libx264", "yuv420p"),
    ("webm", "libvpx-vp9", "yuv420p"),
    ("avi", "mpeg4", "yuv420p"),
    ("avi", "libx264", "yuv420p"),
    ("gif", "gif", "rgb8"),
]


def expected(stamps: list[Fraction], wanted: list[Fraction]) -> list[int]:
    """The definition of choosing by time, in exact arithmetic."""
    return [min(range(len(stamps)), key=lambda i: (abs(stamps[i] - t), i)) for t in wanted]


def corner(k: int, size: tuple[int, int]) -> np.ndarray:
    out = np.zeros((*size, 3), np.uint8)
    out[: size[0] // 2, : size[1] // 2] = 255
    return out
