"""Choice between training with and without alpha, based on the alpha of the clips."""

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
"""Problem codes of opaque clips, which a run with alpha cannot use."""


@dataclass(frozen=True)
class Material:
    """Dataset plan of a recipe, and whether the plan is with alpha."""

    plan: Plan
    transparent: bool
    """True if the plan is with alpha, because at least half of the clips have alpha."""
    with_alpha: int
    """Number of clips whose alpha is not constant."""


def recognize(
    data: config.Data,
    opaque: Family,
    transparent: Family | None,
    progress: Callable[[int, int], None] | None = None,
    probes: Probes | None = None,
) -> Material:
    """Decide whether to train with alpha, and plan the clips of a recipe accordingly.

    The plan is with alpha if at least half of the clips have alpha.

    Args:
        data: the recipe's `data` section.
        opaque: model family without alpha.
        transparent: the same family with alpha. If it is None, the plan is without alpha.
        progress: called with (done, total) while files are probed.
        probes: reader of file properties. Default: a reader without a cache.
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
    """Return True if any clip may be transparent.

    Such a clip has an alpha channel, a matte, or a file format that is only read in runs with alpha.
    """
    if any(p.transparent for p in plan.probes.values()):
        return True
    found = [c for i, s in enumerate(data.sources) for c in find_clips(s, i, None, 4).clips]
    return any(c.matte or c.path.suffix.lower() not in (*kinds.KNOWN, "") for c in found)
