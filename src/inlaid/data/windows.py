"""Training windows: the parts of clips to train on, with their lengths, sizes and start times."""

from __future__ import annotations

import math
import re

from inlaid import config
from inlaid.data.clips import Clip, Size, VideoWindow
from inlaid.families.grid import Grid, VideoExtent
from inlaid.media.kinds import Probe, available_frames
from inlaid.media.rgba import AlphaStats

# --- windows and buckets ------------------------------------------------------------------------------------


def caption(text: str, data: config.Data) -> str:
    """Return a caption with the recipe's prefix and trigger word.

    A trigger word that is already in the caption is not added again.
    """
    text = f"{data.caption_prefix.strip()} {text}".strip()
    trigger = data.trigger.strip()
    if trigger and not re.search(rf"(?<!\w){re.escape(trigger)}(?!\w)", text, re.IGNORECASE):
        text = f"{trigger} {text}"
    return text


def sizes(data: config.Data, grid: Grid) -> list[Size]:
    """Return the (height, width) of each aspect ratio bucket.

    Without `data.aspects`, the only bucket is `data.size`. Otherwise, each aspect ratio has a bucket of about
    the same area as `data.size`.
    """
    if not data.aspects:
        return [data.size]
    area = data.size[0] * data.size[1]
    ratios = (float(w) / float(h) for w, h in (a.split(":") for a in data.aspects))
    return list(dict.fromkeys(grid.snap_size(math.sqrt(area / r), math.sqrt(area * r)) for r in ratios))


def spread(there: int, length: int, stride: int, most: int) -> list[int]:
    """Return the index of each training window's first frame in a clip of `there` frames.

    Up to `most` windows of `length` frames are spread evenly over the clip. The starts of two windows are at
    least `stride` frames apart. A single window is centered.
    """
    room = there - length
    count = min(most, 1 + room // stride)
    return [room // 2] if count == 1 else [i * room // (count - 1) for i in range(count)]


def frames_available(probe: Probe, data: config.Data, fps: float) -> tuple[int, float]:
    """Return how many frames can be sampled from a clip, and the sampling rate in frames per second.

    The sampling rate is `fps`. If `data.slow` is `keep`, a clip with a lower frame rate is sampled at its own
    frame rate.
    """
    if data.slow == "keep" and probe.fps and probe.fps < fps * 0.99:
        fps = float(probe.fps)
    return available_frames(probe, fps), fps


def clip_windows(
    clip: Clip,
    probe: Probe,
    data: config.Data,
    buckets: list[Size],
    fps: float,
    alpha: AlphaStats | None,
) -> list[VideoWindow]:
    """Return the training windows of a clip, sized to the bucket with the nearest aspect ratio.

    The list is empty if the clip is too short. A clip of precomputed latents is a single window.
    """
    if clip.embedding:
        return [
            VideoWindow(clip, VideoExtent(probe.frames, probe.height, probe.width), clip.caption, 0.0, fps)
        ]
    there, rate = frames_available(probe, data, fps)
    length = max((n for n in data.frames if n <= there), default=0)
    if not length:
        return []
    ratio = math.log(probe.width / probe.height)
    size = min(buckets, key=lambda s: abs(math.log(s[1] / s[0]) - ratio))
    extent = VideoExtent(length, *size)
    starts = spread(there, length, data.stride or length, data.max_windows)
    text, how = caption(clip.caption, data), None
    if alpha:
        divided = alpha.premultiplied if data.matte.premultiplied == "auto" else data.matte.premultiplied
        how = data.matte.model_copy(update={"premultiplied": divided})
    over_white = probe.premultiplied and not alpha
    return [VideoWindow(clip, extent, text, round(s / rate, 9), rate, how, over_white) for s in starts]
