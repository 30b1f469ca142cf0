"""Model families, one file each. Adding a family requires no change elsewhere."""

from __future__ import annotations

from inlaid.config.plugins import family_class, family_names
from inlaid.families.base import Family, PrecomputedLayout
from inlaid.families.grid import Grid

__all__ = ["Family", "Grid", "PrecomputedLayout", "get", "names"]


def names() -> list[str]:
    """Return the names of all families: modules of this package and entry points of `inlaid.families`."""
    return family_names()


def get(name: str) -> type[Family]:
    """Return the class of a family.

    Raises:
        ValueError: if no such family is installed.
    """
    return family_class(name)
