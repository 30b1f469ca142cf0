"""Open the model family of a recipe, with its alpha."""

from __future__ import annotations

from collections.abc import Mapping
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


MIXINS: Mapping[str, type] = {"joint": Joint, "merged": Merged}
"""Mixin by the recipe's `alpha.kind`."""


def build_family(config: recipe.Config) -> Family:
    """Create the family of a recipe, with the transparency of its `alpha` section.

    Raises:
        ValueError: if the checkpoint is not of the family, or the family does not support the transparency.
    """
    kind, section = families.get(config.model.family), config.alpha
    if isinstance(config.tuner, recipe.Codec):
        trained: Any = type(f"Codec{kind.__name__}", (RgbaVaeTraining, kind), {})
        return trained(config.model, config.tuner)
    if section.kind == "opaque":
        return kind(config.model)
    if section.kind not in MIXINS:
        raise ValueError(f"alpha.kind: {config.model.family} does not support `{section.kind}` transparency")
    mixed: Any = type(f"{section.kind.capitalize()}{kind.__name__}", (MIXINS[section.kind], kind), {})
    return mixed(config.model, section)
