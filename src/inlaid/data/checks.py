"""Checks of clips: size, alpha, outliers, duplicates."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from inlaid import config
from inlaid.data.clips import Clip, Size
from inlaid.data.problems import KINDS, Problem
from inlaid.data.windows import frames_available
from inlaid.files import sha256
from inlaid.media.kinds import Probe
from inlaid.media.rgba import AlphaStats

UPSCALE = 1.5
"""Enlargement factor above which a clip gets a warning. The model learns the blur of enlarged clips."""

CROPPED = 0.3
"""A clip gets a warning if more than this fraction of its frame area is cropped."""

RESIDUE = 0.005
"""A clip gets a warning if more than this fraction of its pixels are compression residue in alpha."""

ODD = 0.4
"""A clip gets a warning if its mean alpha, 0 to 1, differs from the median of all clips by more than this."""


def clip_problems(
    clip: Clip,
    probe: Probe,
    data: config.Data,
    fps: float,
    size: Size | None,
    alpha: AlphaStats | None,
) -> list[Problem]:
    """Return the problems of a readable clip.

    Args:
        clip: the clip.
        probe: its properties.
        data: the recipe's `data` section.
        fps: sampling rate in frames per second.
        size: height and width of the clip's bucket; None if no part of the clip can be used.
        alpha: alpha statistics; None in a run that trains without alpha.
    """
    out: list[Problem] = []

    def add(code: str, message: str) -> None:
        out.append(Problem(KINDS[code].severity, code, clip.name, message, clip.source))

    if clip.embedding:
        if data.trigger or data.caption_prefix:
            add("fixed-caption", "")
        return out
    if size is None and clip.kind == "image" and probe.frames == 1:
        add("image", "")
    elif size is None:
        need, (there, rate) = min(data.frames), frames_available(probe, data, fps)
        add(
            "too-short",
            f"{need} frames at {rate:g} fps need {need / rate:.2f} s, it has {there / rate:.2f} s",
        )
    if probe.width % 2 or probe.height % 2:
        add("odd-size", f"{probe.width}x{probe.height}")
    if probe.variable:
        add("variable-rate", f"{float(probe.fps or 0):.2f} fps apart from held frames")
    if probe.fps and probe.fps < fps * 0.99:
        effect = "frames are repeated" if data.slow == "repeat" else "the video plays faster"
        add("slow", f"{float(probe.fps):g} fps of {fps:g}: {effect}")
    if alpha:
        out += alpha_problems(clip, alpha, data.matte)
    elif probe.transparent and not probe.opaque:
        add("transparent", "color is premultiplied" if probe.premultiplied else "")
    if probe.hdr:
        add("hdr", "")
    if size is not None:
        scale = max(size[0] / probe.height, size[1] / probe.width)
        seen = size[0] * size[1] / (probe.height * probe.width * scale**2)
        if scale > UPSCALE:
            add("upscaled", f"{probe.width}x{probe.height} by {scale:.1f}")
        if 1 - seen > CROPPED:
            add("cropped", f"{1 - seen:.0%} of {probe.width}x{probe.height}")
    return out


def alpha_problems(clip: Clip, alpha: AlphaStats, how: config.Matte) -> list[Problem]:
    """Return the problems of a clip's alpha, without those that a setting of the recipe already solves."""
    found = {
        "inverted": alpha.inverted and not how.invert,
        "limited": alpha.limited and not how.limited,
        "premultiplied": alpha.premultiplied and how.premultiplied == "auto",
        "unclear-color": alpha.multiplied == "unclear" and how.premultiplied == "auto",
        "residue": alpha.residue > RESIDUE and not how.snap,
    }
    reasons = {
        "limited": f"{alpha.lowest} to {alpha.highest}",
        "residue": f"{alpha.residue:.1%} of its pixels",
        "inverted": f"covers {alpha.coverage:.0%}",
    }
    return [
        Problem(KINDS[code].severity, code, clip.name, reasons.get(code, ""), clip.source)
        for code, yes in found.items()
        if yes
    ]


def outliers(clips: Sequence[Clip], alphas: Mapping[Path, AlphaStats]) -> list[Problem]:
    """Return a warning for each clip with unusual alpha, if at least 4 clips have alpha.

    A clip is unusual if its mean alpha differs from the median of all clips by more than `ODD`. A clip is
    also unusual if it is premultiplied and at least 90 % of the clips are not, or the reverse.
    """
    there = [(c, alphas[c.path]) for c in clips if c.path in alphas]
    if len(there) < 4:
        return []
    typical = float(np.median([a.coverage for _, a in there]))
    divided = sum(a.premultiplied for _, a in there)
    out = []
    for clip, alpha in there:
        reasons = []
        if abs(alpha.coverage - typical) > ODD:
            reasons.append(f"covers {alpha.coverage:.0%}, the median is {typical:.0%}")
        same = divided if alpha.premultiplied else len(there) - divided
        if same * 10 <= len(there) and alpha.multiplied != "unclear":
            reasons.append(
                "premultiplied" if alpha.premultiplied else "straight, the others look premultiplied"
            )
        if reasons:
            message = "; ".join(reasons)
            out.append(Problem("warning", "odd-alpha", clip.name, message, clip.source))
    return out


def duplicates(
    clips: Sequence[Clip], content: Callable[[Path], str] = sha256
) -> tuple[dict[Path, str], list[Problem]]:
    """Find clips with equal content. Return a label for each clip's path, and a warning for each duplicate.

    Clips with equal content get equal labels. A label is a content hash. If no other clip has the same size
    in bytes, the content is not hashed, and the label is the path.

    Args:
        clips: the clips to compare.
        content: function that returns the content hash of a file.
    """

    def files(clip: Clip) -> tuple[Path, ...]:
        return (clip.path,) if clip.latents else clip.files

    def size(clip: Clip) -> int:
        return sum(f.stat().st_size for f in files(clip))

    sizes = {clip.path: size(clip) for clip in clips}
    real = {clip.path: clip.path.resolve() for clip in clips}
    by_size: dict[int, set[Path]] = defaultdict(set)
    for clip in clips:
        by_size[sizes[clip.path]].add(real[clip.path])
    marks: dict[Path, str] = {}
    problems: list[Problem] = []
    first: dict[str, Clip] = {}
    for clip in clips:
        if clip.path not in marks:
            alone = len(by_size[sizes[clip.path]]) == 1
            marks[clip.path] = str(real[clip.path]) if alone else ",".join(map(content, files(clip)))
        mark = marks[clip.path]
        other = first.setdefault(mark, clip)
        if other is not clip:
            same = "listed twice" if other.path == clip.path else f"same content as {other.name}"
            problems.append(Problem("warning", "duplicate", clip.name, same, clip.source))
    return marks, problems
