"""Evaluation of video: what is measured, kept and shown of each sample."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from inlaid.evaluation.metrics.video import measure
from inlaid.media import compositing

if TYPE_CHECKING:
    from PIL import Image


TRUTH = False
"""Videos have no ground truth."""


def right(metrics: Mapping[str, float]) -> None:
    """Return None: no metric decides whether a video matches its prompt."""


def keep(frames: np.ndarray) -> np.ndarray:
    """Return the frames on which differences are measured; RGBA is composited over a checkerboard."""
    return (
        compositing.composite(frames, compositing.checkerboard(*frames.shape[1:3]))
        if frames.shape[-1] == 4
        else frames
    )


def picture(frames: np.ndarray) -> Image.Image:
    """Return some of the frames in a row."""
    from inlaid.evaluation.pictures import contact_strip

    return contact_strip(keep(frames))


def gauge(frames: np.ndarray, prompt: Any) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """Return the metrics of a video, with `matte.TRUTH` if the true alpha is known, and no parts."""
    metrics = everything(frames)
    if prompt.truth is not None and frames.shape[-1] == 4:
        from inlaid.evaluation.metrics import alpha

        metrics |= alpha.against(frames, prompt.truth(frames))
    return metrics, {}


def everything(frames: np.ndarray) -> dict[str, float]:
    """Return `METRICS` of RGB or RGBA frames (t, h, w, 3 or 4).

    RGBA is composited over gray, and `matte.METRICS` are added.
    """
    if frames.shape[-1] == 3:
        return measure(frames)
    from inlaid.evaluation.metrics import alpha

    return measure(compositing.composite(frames, np.full(3, 128, np.uint8))) | alpha.measure(frames)
