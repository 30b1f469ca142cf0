"""Model families, with one module for each supported model architecture.

Adding a family requires no change in other modules.
"""

from __future__ import annotations

from inlaid.config.plugins import family_class, family_names
from inlaid.families.base import Family, PrecomputedLayout
from inlaid.families.grid import Grid

__all__ = ["Family", "Grid", "PrecomputedLayout", "get", "names"]


def names() -> list[str]:
    """Return the sorted names of all installed model families.

    A family is a module of this package, or a plugin with an entry point in the group `inlaid.families`.
    """
    return family_names()


def get(name: str) -> type[Family]:
    """Return the class of a model family by name.

    Raises:
        ValueError: if no such family is installed.
    """
    return family_class(name)
