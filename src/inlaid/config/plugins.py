"""Lookup of model families by name: modules of `inlaid.families`, and installed plug-ins.

A recipe takes some of its defaults from its model family, so loading a recipe imports that family. The import
happens inside functions, because an import at module level would be circular.
"""

from __future__ import annotations

import pkgutil
from importlib import import_module
from importlib.metadata import entry_points
from importlib.util import find_spec
from typing import Any

from inlaid.config.parse import shorten

GROUP = "inlaid.families"
"""Name of both the package with built-in model families and the entry-point group for plug-ins."""

SHARED = ("base", "checkpoint", "grid", "hub", "original_names", "other_programs", "sampling")
"""Modules of `inlaid.families` that are not model families."""


def family_names() -> list[str]:
    """Return the names of all installed model families, sorted."""
    spec = find_spec(GROUP)
    assert spec and spec.submodule_search_locations
    own = {m.name for m in pkgutil.iter_modules(list(spec.submodule_search_locations))} - {*SHARED}
    return sorted(own | {e.name for e in entry_points(group=GROUP)})


def family_class(name: str) -> Any:
    """Return the class of a model family.

    Raises:
        ValueError: if no family of this name is installed.
    """
    if name not in family_names():
        raise ValueError(
            f"model.family: no family `{shorten(name, 60)}`; choose from: {', '.join(family_names())}"
        )
    for entry in entry_points(group=GROUP):
        if entry.name == name:
            return entry.load()
    module, base = import_module(f"{GROUP}.{name}"), import_module(f"{GROUP}.base").Family
    return next(
        v
        for v in vars(module).values()
        if isinstance(v, type) and issubclass(v, base) and v.__module__ == module.__name__
    )
