"""Plans of small clips."""

from __future__ import annotations

from typing import Any

import pytest

from inlaid import config
from inlaid.data.plan import Plan, plan_dataset, require_usable
from inlaid.families.grid import Grid

GRID = Grid(spatial=16, temporal=4)


SIZE = (32, 64)


def plan(*sources: Any, seed: int = 0, fps: float = 16, progress: Any = None, **section: Any) -> Plan:
    """A plan with small sizes and nothing held out."""
    section = {"size": SIZE, "frames": [9], "validation": 0} | section
    return plan_dataset(config.Data(sources=list(sources), **section), GRID, fps, seed, progress)


def codes(made: Plan) -> dict[str, list[str]]:
    """Names by code of problem."""
    out: dict[str, list[str]] = {}
    for problem in made.problems:
        out.setdefault(problem.code, []).append(problem.name)
    return out


def message(made: Plan) -> str:
    """What `require` says."""
    with pytest.raises(ValueError) as error:
        require_usable(made, "stop")
    return str(error.value)
