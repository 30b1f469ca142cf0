"""Sizes of training examples, and the clip sizes that a model family supports."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from inlaid import limits


class VideoExtent(NamedTuple):
    """Number of frames of a video, and its height and width in pixels."""

    frames: int
    height: int
    width: int


class SceneExtent(NamedTuple):
    """Number of objects in a scene, and the height and width of the input image in pixels."""

    objects: int
    height: int
    width: int


Extent = VideoExtent | SceneExtent
"""Extent (length, height and width) of a training example, which is a video or a scene."""


@dataclass(frozen=True)
class Grid:
    """Clip sizes that a model supports.

    Height and width are multiples of `spatial` pixels. The number of frames is `temporal` * n + `offset`.
    """

    spatial: int
    temporal: int
    offset: int = 1
    only: tuple[int, int, int] | None = None
    """Single supported size (frames, height, width) of a network with learned positional embeddings. None if
    the network supports many sizes."""

    def snap_frames(self, n: int) -> int:
        """Return the largest supported number of frames that is at most n, or 0 if there is none."""
        if self.only:
            return self.only[0] if n >= self.only[0] else 0
        return 0 if n < self.offset else (n - self.offset) // self.temporal * self.temporal + self.offset

    def snap_size(self, height: float, width: float) -> tuple[int, int]:
        """Return the nearest supported height and width."""
        if self.only:
            return self.only[1:]
        return max(1, round(height / self.spatial)) * self.spatial, max(
            1, round(width / self.spatial)
        ) * self.spatial

    def problems(self, frames: int, height: int, width: int) -> list[str]:
        """Return messages about an unsupported number of frames or image size.

        The list is empty if both are supported.
        """
        if self.only:
            valid, size = (f"{n} frames of {h}x{w}" for n, h, w in (self.only, (frames, height, width)))
            problem = (
                f"{size}: the positional embeddings of this checkpoint were learned for {valid}; use that"
            )
            return [] if valid == size else [f"{problem}, or a checkpoint without learned embeddings"]
        out = []
        low = self.snap_frames(frames)
        if low != frames:
            near = " or ".join(str(n) for n in (low, low + self.temporal if low else self.offset) if n)
            out.append(f"{frames} frames is not {self.temporal}n+{self.offset}: use {near}")
        if (height % self.spatial, width % self.spatial) != (0, 0) or min(height, width) < 1:
            h, w = self.snap_size(height, width)
            out.append(f"{height}x{width} is not a multiple of {self.spatial}: use {h}x{w}")
        size = frames * height * width * 3
        what = f"{frames} frames of {height}x{width} are {limits.as_size(size)} of pixels"
        return [*out, *filter(None, [limits.ARRAY.exceeded(size, what)])]
