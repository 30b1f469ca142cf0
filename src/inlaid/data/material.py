"""Recognition of transparent material: which clips of a source have alpha."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from inlaid import config
from inlaid.data.layouts import find_clips
from inlaid.data.plan import Plan, plan_dataset
from inlaid.data.probes import Probes
from inlaid.families.base import Family
from inlaid.media import kinds

OPAQUE = ("no-alpha", "constant-alpha")
"""Codes of the problems of clips that a transparent run cannot use because they are opaque."""


@dataclass(frozen=True)
class Material:
    """Clips of a source, read as the run that suits most of them."""

    plan: Plan
    transparent: bool
    """True if the plan is that of a transparent run, because at least half of the clips have alpha."""
    with_alpha: int
    """Number of clips with alpha that is not constant."""


def recognize(
    data: config.Data,
    opaque: Family,
    transparent: Family | None,
    progress: Callable[[int, int], None] | None = None,
    probes: Probes | None = None,
) -> Material:
    """Plan the clips of a recipe as an opaque or as a transparent run, by the alpha of the clips.

    Args:
        data: the recipe's `data` section.
        opaque: family of an opaque run.
        transparent: the same family with alpha, or None if the checkpoint does not support alpha; the plan
            is then that of an opaque run.
        progress: called with (done, total) while files are probed.
        probes: reader of file properties. Default: no memoization.
    """
    plan = plan_dataset(data, opaque.grid, opaque.fps, 0, progress, opaque, probes)
    hints = {p.name for p in plan.problems if p.code in ("transparent", "matte")}
    if not hints and not _maybe_transparent(data, plan):
        return Material(plan, False, 0)
    if transparent is None:
        return Material(plan, False, len(hints))
    other = plan_dataset(data, transparent.grid, transparent.fps, 0, progress, transparent, probes)
    count = len(other.alphas)
    without = {(p.source, p.name) for p in other.problems if p.code in OPAQUE}
    if count and count >= len(without):
        return Material(other, True, count)
    return Material(plan, False, count)


def _maybe_transparent(data: config.Data, plan: Plan) -> bool:
    """Return True if a clip has an alpha channel or an alpha matte, or only a transparent run reads it."""
    if any(p.transparent for p in plan.probes.values()):
        return True
    found = [c for i, s in enumerate(data.sources) for c in find_clips(s, i, None, 4).clips]
    return any(c.matte or c.path.suffix.lower() not in (*kinds.KNOWN, "") for c in found)
