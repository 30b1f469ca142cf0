"""Open the model family of a recipe, with its alpha."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from inlaid import config as recipe
from inlaid import families
from inlaid.alpha.joint import Joint
from inlaid.alpha.merged import Merged
from inlaid.alpha.rgba_vae import RgbaVaeTraining
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


COMPOSED: Mapping[str, Callable[[Family, Any], Family]] = {"joint": Joint, "merged": Merged}
"""How a family is composed with alpha, by the recipe's `alpha.kind`."""


def build_family(config: recipe.Config) -> Family:
    """Create the family of a recipe, composed with its `alpha` section.

    Raises:
        ValueError: if the checkpoint is not of the family, or the family does not support the transparency.
    """
    opaque = families.get(config.model.family)(config.model)
    if isinstance(config.tuner, recipe.Codec):
        return RgbaVaeTraining(opaque, config.tuner)
    if config.alpha.kind == "opaque":
        return opaque
    return COMPOSED[config.alpha.kind](opaque, config.alpha)
