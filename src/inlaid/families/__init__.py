"""Model families, one file each; adding a family requires no change elsewhere."""

from __future__ import annotations

import importlib
import pkgutil
from importlib.metadata import entry_points

from inlaid.families.base import Encoded, Family, Grid

__all__ = ["Encoded", "Family", "Grid", "get", "names"]


def names() -> list[str]:
    """Return the names of all families: files of this folder and entry points of group `inlaid.families`."""
    own = {m.name for m in pkgutil.iter_modules(__path__) if m.name != "base"}
    return sorted(own | {e.name for e in entry_points(group="inlaid.families")})


def get(name: str) -> type[Family]:
    """Return the class of a family.

    Raises:
        ValueError: when no such family is installed.
    """
    if name not in names():
        raise ValueError(f"model.family: no family `{name}`; choose from: {', '.join(names())}")
    for entry in entry_points(group="inlaid.families"):
        if entry.name == name:
            return entry.load()
    module = importlib.import_module(f"{__name__}.{name}")
    return next(
        v
        for v in vars(module).values()
        if isinstance(v, type) and issubclass(v, Family) and v.__module__ == module.__name__
    )
