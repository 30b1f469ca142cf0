"""Sizes, aspect ratios and lengths that suit a set of clips and a model family."""

from __future__ import annotations

import math

from inlaid.data.checks import CROPPED
from inlaid.families.base import Family
from inlaid.families.grid import Grid
from inlaid.media.kinds import Probe, available_frames

ASPECTS = ("16:9", "4:3", "1:1", "3:4", "9:16")
"""Aspect ratios to choose from for `data.aspects`."""


def fitting_size(model: Family, probes: list[Probe]) -> tuple[int, int]:
    """Return a height and width for training: the default size of the family, adapted to the clips.

    The default is 704 x 1280 for families with a spatial stride of more than 16 pixels. Height and width are
    exchanged if most clips are portrait. If the median area of the clips is less than 81 % of the default
    area, the result has the median area and the median aspect ratio.
    """
    height, width = (704, 1280) if model.grid.spatial > 16 else model.defaults["data"]["size"]
    typical = sorted(p.height * p.width for p in probes)[len(probes) // 2]
    scale = min(1.0, math.sqrt(typical / (height * width)))
    if sum(p.height > p.width for p in probes) * 2 > len(probes):
        height, width = width, height
    if scale < 0.9:
        middle = sorted(p.height / p.width for p in probes)[len(probes) // 2]
        height, width = math.sqrt(typical * middle), math.sqrt(typical / middle)
    return model.grid.snap_size(height, width)


def fitting_aspects(probes: list[Probe], size: tuple[int, int]) -> list[str]:
    """Return the ratios in `ASPECTS` that are nearest to the aspect ratios of the clips.

    The result is empty if `size` (height, width) fits at least 95 % of the clips. The size fits a clip if
    cropping the clip to the size's aspect ratio removes at most the fraction `CROPPED` of the frame.
    """

    def off(probe: Probe, ratio: float) -> float:
        return abs(math.log(probe.width / probe.height / ratio))

    if sum(off(p, size[1] / size[0]) > math.log(1 / (1 - CROPPED)) for p in probes) * 20 <= len(probes):
        return []
    value = {a: float(a.split(":")[0]) / float(a.split(":")[1]) for a in ASPECTS}
    nearest = {min(ASPECTS, key=lambda a, p=p: off(p, value[a])) for p in probes}
    return [a for a in ASPECTS if a in nearest]


def fitting_frames(probes: list[Probe], model: Family, fps: float | None = None) -> list[int]:
    """Return up to four valid frame counts that suit the lengths of the clips, in increasing order.

    No count exceeds the default of the family.

    Args:
        probes: properties of the clips.
        model: family of the run.
        fps: sampling rate in frames per second. Default: the frame rate of the family.
    """
    grid: Grid = model.grid
    longest = grid.snap_frames(max(model.defaults["data"]["frames"]))
    fills = {min(longest, grid.snap_frames(available_frames(p, fps or model.fps))) for p in probes}
    ordered = sorted(n for n in fills if n)
    while len(ordered) > 4:  # keep shortest and longest, remove one of the two closest neighbors
        gaps = [ordered[i + 1] / ordered[i] for i in range(len(ordered) - 1)]
        ordered.pop(max(1, gaps.index(min(gaps))))
    return ordered
