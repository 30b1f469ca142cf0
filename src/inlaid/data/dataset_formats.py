"""File formats that `inlaid prepare` writes: `.mp4`, `.npz`, two videos (color and alpha), or latents.

Worker processes import this module. It imports torch only when it writes latents.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from inlaid.data.clips import VideoWindow
from inlaid.files import atomic, save_torch
from inlaid.media import compositing, video
from inlaid.media.arrays import fit_array
from inlaid.reading import FileError, reading

if TYPE_CHECKING:
    from torch import Tensor

    from inlaid.families.base import PrecomputedLayout

Target = Literal["clips", "npz", "rgba-pairs", "latents"]

TARGETS: tuple[Target, ...] = ("clips", "npz", "rgba-pairs", "latents")

CHUNK = 256_000_000
"""Maximum size in bytes of the uncropped frames that are read at once."""

ALPHA_CRF = 4
"""Constant rate factor of alpha videos: nearly lossless, because residue around the subject is visible."""

PRESET = "ultrafast"
"""x264 preset: a third of the default preset's time, but files three times as large at equal quality."""


@dataclass(frozen=True)
class Crop:
    """Region of the displayed frame, in pixels."""

    width: int
    height: int
    x: int
    y: int


@dataclass(frozen=True)
class Cut:
    """Window of a clip, and the name under which it is exported."""

    name: str
    """Name of the files, without an ending such as `.mp4`."""
    window: VideoWindow
    key: str
    """Hash of the window, the settings, and the state of the source files."""
    displayed: tuple[int, int]
    """Height and width of the source frames as displayed, before cropping."""
    crop: Crop | None = None

    def read(self) -> np.ndarray:
        """Read the frames: uint8 (t, h, w, 3), or (t, h, w, 4) with alpha.

        Raises:
            ValueError: if the file cannot be read to the end of the window; the message names the file.
        """
        return self.window.read() if self.crop is None else self._read_region(self.crop)

    def _read_region(self, crop: Crop) -> np.ndarray:
        """Read the frames, crop them, and resize them to the size of the window.

        To save memory, large frames are scaled down before cropping, and only a few frames are read
        at a time.
        """
        window, (frames, height, width) = self.window, self.window.extent
        scale = min(1.0, max(height / crop.height, width / crop.width))
        full = tuple(math.ceil(n * scale) for n in self.displayed)
        region = (round(crop.height * scale), round(crop.width * scale))
        top, left = (
            min(round(at * scale), whole - part)
            for at, whole, part in zip((crop.y, crop.x), full, region, strict=True)
        )
        each = max(1, CHUNK // (full[0] * full[1] * (4 if window.alpha else 3)))
        out = []
        for first in range(0, frames, each):
            extent = window.extent._replace(frames=min(each, frames - first), height=full[0], width=full[1])
            part = replace(window, extent=extent, start=window.start + first / window.fps).read()
            part = part[:, top : top + region[0], left : left + region[1]]
            if region == (height, width):
                out.append(part)
            elif window.alpha:
                out.append(compositing.resize(part, (height, width)))
            else:
                out.append(np.stack([fit_array(frame, (height, width)) for frame in part]))
        return np.concatenate(out)


@dataclass(frozen=True)
class Written:
    """Result of writing the files of one window.

    `files` contains their sizes in bytes by file name. If nothing was written, `problem` is the reason.
    """

    name: str
    files: Mapping[str, int]
    problem: str = ""
    code: str = "unreadable"


def endings(target: Target) -> tuple[str, ...]:
    """Return the file name endings of a format; empty for latents, whose names depend on the model family."""
    return {"clips": (".mp4",), "npz": (".npz",), "rgba-pairs": ("_rgb.mp4", "_alpha.mp4"), "latents": ()}[
        target
    ]


def write_cut(cut: Cut, folder: Path, target: Target, crf: int) -> Written:
    """Read the window of a clip, and write it to files in `folder`.

    If the clip cannot be read, nothing is written and the result contains the problem.

    Raises:
        OSError: if a file cannot be written.
    """
    try:
        frames = cut.read()
    except ValueError as error:
        return failed(cut, error)
    paths = [folder / f"{cut.name}{end}" for end in endings(target)]
    fps = cut.window.fps
    if target == "npz":
        with atomic(paths[0]) as part:
            np.savez(part, frames=frames, fps=np.float32(fps))
    else:
        video.write_video(paths[0], frames[..., :3], fps, crf=crf, preset=PRESET, threads=1)
    if target == "rgba-pairs":
        alpha = np.repeat(frames[..., 3:], 3, -1)
        video.write_video(paths[1], alpha, fps, crf=ALPHA_CRF, preset=PRESET, threads=1)
    return Written(cut.name, {p.name: p.stat().st_size for p in paths})


def failed(cut: Cut, error: Exception) -> Written:
    """Return the result for a window that was not written because of `error`."""
    try:
        with reading(cut.window.clip.path):
            raise error
    except FileError as named:
        return Written(cut.name, {}, named.cause, named.code)
    except ValueError as named:
        return Written(cut.name, {}, str(named).removeprefix(f"{cut.window.clip.path}: "))


# --- latents ------------------------------------------------------------------------------------------------


def latent_files(folder: Path, layout: PrecomputedLayout, name: str) -> tuple[Path, Path, Path]:
    """Return the paths of the latents, the text embedding and the caption of a clip."""
    latents, text, caption = (
        folder / pattern.replace("*", name) for pattern in (layout.media[0], layout.text, layout.caption)
    )
    return latents, text, caption


def save_latents(path: Path, layout: PrecomputedLayout, moments: Tensor) -> None:
    """Write the moments (2 * z, t, h, w) of the VAE posterior to a torch file, atomically."""
    value = (
        moments.cpu() if layout.moments_key is None else {layout.moments_key: moments[None].bfloat16().cpu()}
    )
    save_torch(value, path)


def save_text(path: Path, layout: PrecomputedLayout, text: Tensor, length: int) -> None:
    """Write a text embedding (n, d) to a torch file, atomically.

    Some formats pad the embedding with zeros and store a mask, which is False for padding.

    Args:
        path: output file.
        layout: file names and tensor names of the format.
        text: embedding of the tokens without padding.
        length: number of tokens after padding.
    """
    import torch

    value: Tensor | dict[str, Tensor] = text.cpu()
    if layout.text_keys is not None:
        padded = torch.nn.functional.pad(text.float().cpu(), (0, 0, 0, length - len(text)))
        mask = torch.arange(length) < len(text)
        value = dict(zip(layout.text_keys, (padded[None], mask[None]), strict=True))
    save_torch(value, path)
