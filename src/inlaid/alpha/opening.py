"""Open the model family of a recipe, with its alpha."""

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
    """Return the family of a recipe, after checking that it supports everything in the recipe.

    Raises:
        ValueError: with everything that it does not support.
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
"""How a family is composed with alpha, by the class of the recipe's `alpha` or `rgba_vae` section."""


def build_family(config: recipe.Config) -> Family:
    """Create the family of a recipe, composed with its `alpha` or `rgba_vae` section.

    Raises:
        ValueError: if the checkpoint is not of the family, or the family does not support the transparency.
    """
    opaque = families.get(config.model.family)(config.model)
    section = config.alpha if config.rgba_vae is None else config.rgba_vae
    compose = COMPOSED.get(type(section))
    return compose(opaque, section) if compose else opaque
