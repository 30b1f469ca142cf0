"""Arguments of `inlaid prepare`, checked before anything is read."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from inlaid.data.dataset_export import Part, prepare_dataset, report
from inlaid.data.dataset_formats import Crop, Target


def prepare_clips(
    source: Path,
    out: Path,
    target: str,
    overrides: Sequence[str],
    *,
    part: tuple[float, float | None, str | None],
    sequence_fps: float | None,
    crf: int,
    family: str,
    checkpoint: str | None,
    workers: int | None,
) -> list[str]:
    """Prepare a dataset and return the lines to print.

    Args:
        source: folder or manifest of clips, or a recipe.
        out: folder to write.
        target: format of the dataset.
        overrides: values of recipe keys, such as `data.frames=81`.
        part: part of each clip to use: start and end in seconds, and region as `W:H:X:Y`. The end is None for
            the end of the clip. The region is None for the whole frame.
        sequence_fps: frame rate of image sequences.
        crf: constant rate factor of color videos.
        family: model family whose default values are used.
        checkpoint: checkpoint whose VAE and text encoder are used for latents.
        workers: number of processes.

    Raises:
        ValueError: for any problem the user can fix.
    """
    known = get_args(Target)
    chosen = next((name for name in known if name == target), None)
    if chosen is None:
        raise ValueError(f"--as: `{target}` is not one of {', '.join(known)}")
    start, end, crop = part
    if end is not None and end <= start:
        raise ValueError(f"--end: {end:g} is not after --start {start:g}")
    region = Part(start, end, _crop(crop) if crop else None)
    made = prepare_dataset(
        source,
        out,
        chosen,
        family=family,
        checkpoint=checkpoint,
        overrides=overrides,
        part=region,
        sequence_fps=sequence_fps,
        crf=crf,
        workers=workers,
    )
    return [*report(made, out, chosen), f"next: inlaid new {family} {out}"]


def _crop(text: str) -> Crop:
    found = re.fullmatch(r"(\d{1,6}):(\d{1,6}):(\d{1,6}):(\d{1,6})", text)
    if not found or not int(found[1]) or not int(found[2]):
        raise ValueError(f"--crop: `{text}` is not W:H:X:Y in pixels, such as 1280:720:0:180")
    width, height, x, y = map(int, found.groups())
    return Crop(width, height, x, y)
