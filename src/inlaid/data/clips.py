"""Clips on disk, and their windows. A window is a clip or a part of a clip that is one training example."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from inlaid import config
from inlaid.data import precomputed, rgba_clips, sequences
from inlaid.data.rgba_clips import READER, Kind
from inlaid.families.grid import Extent, VideoExtent
from inlaid.media import kinds, video
from inlaid.media.kinds import MediaError
from inlaid.reading import reading

if TYPE_CHECKING:
    import numpy as np

Size = tuple[int, int]


@dataclass(frozen=True)
class Clip:
    """Clip on disk with its caption: a video, an image, a scene, or precomputed latents."""

    path: Path
    name: str
    """Path relative to the root folder of the data source, with forward slashes."""
    caption: str
    """Caption from the dataset, with each run of white space replaced by one space.

    Empty if the clip has no caption; such a clip is used only if its latents are precomputed.
    """
    source: int
    """Index into `data.sources`."""
    group: str | None
    kind: Kind | Literal["precomputed", "scene"]
    latents: tuple[Path, ...] = ()
    """Files of precomputed latents: `path` first, then the latents of the conditioning images."""
    embedding: Path | None = None
    """File with the text embedding that belongs to precomputed latents."""
    matte: Path | None = None
    """File or folder with the alpha matte of `path`, if alpha is stored separately."""
    rate: float | None = None
    """Frame rate of a clip whose file does not store it. Default: the sampling rate."""

    @property
    def files(self) -> tuple[Path, ...]:
        """Files whose content determines the pixels or the precomputed latents."""
        if self.latents:
            return self.latents
        return tuple(f for part in (self.path, self.matte) if part for f in rgba_clips.files(part))


@dataclass(frozen=True)
class Window(ABC):
    """Training example: a clip or part of a clip."""

    clip: Clip
    extent: Extent
    """Length (frames or objects), height and width; equal for all windows of a batch."""
    caption: str
    """Caption with the recipe's prefix and trigger word."""

    @property
    @abstractmethod
    def key(self) -> tuple[Hashable, ...]:
        """Part of the cache key: every setting that determines the cached tensors.

        The cache adds the content hashes of the files.
        """

    @property
    def words(self) -> str | Path:
        """Text input of the network: the caption, or the file with its precomputed text embedding."""
        return self.clip.embedding or self.caption

    @abstractmethod
    def read(self) -> Any:
        """Read the window from disk, in the form that `Family.encode_media` accepts.

        Raises:
            ValueError: if a file cannot be read; the message names the file.
        """


@dataclass(frozen=True)
class VideoWindow(Window):
    """Training example of the video modality: an image or a time range of a video, at the training size."""

    extent: VideoExtent
    start: float
    """Seconds from the clip's first frame."""
    fps: float
    """Sampling rate in frames per second."""
    alpha: config.Matte | None = None
    """Settings for reading and correcting alpha; None if the clip is read without alpha."""
    premultiplied: bool = False
    """True if the clip has premultiplied alpha, and is composited over white instead of being read with
    alpha."""

    @property
    def key(self) -> tuple[Hashable, ...]:
        """Part of the cache key: the settings that determine the pixels, and the version of the decoder.

        For precomputed latents, it contains only the version of the code that converts them. The cache adds
        the content hashes of the files.
        """
        if self.clip.embedding:
            return ("precomputed", precomputed.READER)
        frames, height, width = self.extent
        shape = (self.start, frames, self.fps, height, width, *_rated(self.clip))
        if self.alpha:
            how, pair = self.alpha.model_dump_json(), self.clip.matte is not None
            return ("rgba_clip", READER, kinds.READER, self.clip.kind, pair, *shape, how)
        over_white = ("premultiplied",) if self.premultiplied else ()
        return ("window", kinds.READER, self.clip.kind, *shape, *over_white)

    def read(self) -> np.ndarray:
        """Read the pixels as uint8: (t, h, w, 3), or (t, h, w, 4) with straight alpha if `alpha` is set.

        Raises:
            ValueError: if the file cannot be read to the end of the window; the message names the file.
        """
        assert not self.clip.embedding, "precomputed latents have no pixels"
        frames, height, width = self.extent
        place = (self.start, frames, self.fps, (height, width))
        path, rate = self.clip.path, self.clip.rate
        with reading(path, MediaError):
            if self.alpha:
                return rgba_clips.read_rgba_clip(path, self.clip.matte, *place, self.alpha, rate=rate)
            if self.clip.kind == "frames":
                return sequences.read_sequence(path, *place, rate=rate)
            return video.read_frames(path, *place, premultiplied=self.premultiplied, rate=rate)


def _rated(clip: Clip) -> tuple[Hashable, ...]:
    """Return cache key entries for the frame rate that the recipe sets; empty if it sets none."""
    return ("rate", clip.rate) if clip.rate else ()
