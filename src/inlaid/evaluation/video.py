"""Evaluation of generated videos; this module implements `evaluate.ModalityMetrics`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from inlaid.evaluation.metrics import alpha
from inlaid.evaluation.metrics import video as video_metrics
from inlaid.media import compositing
from inlaid.media.contact_sheet import contact_strip

if TYPE_CHECKING:
    from PIL import Image


HAS_GROUND_TRUTH = False
"""False because a prompt has no single correct video."""

distance = video_metrics.distance


def measure(frames: np.ndarray, prompt: Any) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """Return the metrics of a video, and the metrics of its parts.

    The second mapping is always empty, because a video has no parts. If the true alpha of a transparent video
    is known, the errors of its alpha (`alpha.TRUTH`) are included.
    """
    metrics = measure_frames(frames)
    if prompt.truth is not None and frames.shape[-1] == 4:
        metrics |= alpha.against(frames, prompt.truth(frames))
    return metrics, {}


def measure_frames(frames: np.ndarray) -> dict[str, float]:
    """Return the video metrics of RGB or RGBA frames (t, h, w, 3 or 4).

    For the video metrics, RGBA frames are composited over gray. The result for RGBA frames also includes
    `alpha.METRICS`.
    """
    if frames.shape[-1] == 3:
        return video_metrics.measure(frames)
    gray = compositing.composite(frames, np.full(3, 128, np.uint8))
    return video_metrics.measure(gray) | alpha.measure(frames)


def matches_prompt(metrics: Mapping[str, float]) -> None:
    """Return None, because no metric can decide whether a video matches its prompt."""


def comparable(frames: np.ndarray) -> np.ndarray:
    """Return the RGB frames that `distance` compares; RGBA frames are composited over a checkerboard."""
    if frames.shape[-1] == 3:
        return frames
    return compositing.composite(frames, compositing.checkerboard(*frames.shape[1:3]))


def preview(frames: np.ndarray) -> Image.Image:
    """Return an image with some of the frames side by side."""
    return contact_strip(comparable(frames))
