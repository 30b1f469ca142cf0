"""Functions that create the model family of a recipe, with alpha support if the recipe configures it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from inlaid import config as recipe
from inlaid import families
from inlaid.alpha.joint import Joint
from inlaid.alpha.merged import Merged
from inlaid.alpha.rgba_vae import RgbaVaeFamily
from inlaid.console import once
from inlaid.families import Family


def open_family(config: recipe.Config) -> families.Family:
    """Create the model family of a recipe, and check that it supports all settings.

    A note is printed for each setting that is valid but unusual.

    Raises:
        ValueError: if settings are not supported; the message lists all unsupported settings.
    """
    family = build_family(config)
    wrong = family.problems(config)
    if wrong:
        raise ValueError(
            f"{config.model.checkpoint} does not support this recipe:\n" + "\n".join(f"  {w}" for w in wrong)
        )
    for note in family.notes(config):
        once(f"note: {note}")
    return family


COMPOSED: Mapping[type[recipe.Section], Callable[[Family, Any], Family]] = {
    recipe.Joint: Joint,
    recipe.Merged: Merged,
    recipe.RgbaVae: RgbaVaeFamily,
}
"""Mapping from the class of a recipe section to the model family class that it selects."""


def build_family(config: recipe.Config) -> Family:
    """Create the model family of a recipe.

    The recipe's `alpha` or `rgba_vae` section selects the alpha support.

    Raises:
        ValueError: if the checkpoint does not belong to the family, or the family does not support the
            selected kind of alpha.
    """
    opaque = families.get(config.model.family)(config.model)
    section = config.alpha if config.rgba_vae is None else config.rgba_vae
    compose = COMPOSED.get(type(section))
    return compose(opaque, section) if compose else opaque
