"""Transparency: how a family carries alpha. `family` is how a recipe's family is opened.

A transparent family is the opaque one with a mixin in front, which calls `super()`: its clips are straight
RGBA, and everything else in the package goes on knowing nothing but the contract of a family.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from inlaid import config as recipe
from inlaid import families
from inlaid.alpha import codec
from inlaid.alpha.joint import Joint
from inlaid.alpha.merged import Merged
from inlaid.families import Family

MIXINS: Mapping[str, type] = {"joint": Joint, "merged": Merged}
"""What stands before a family's class, by the kind of the recipe's `alpha`."""


def family(config: recipe.Config) -> Family:
    """The family of a recipe, transparent where it says so.

    Raises:
        ValueError: when the checkpoint is not of the family, or the family has no such transparency.
    """
    kind, section = families.get(config.model.family), config.alpha
    if isinstance(config.tuner, recipe.Codec):
        trained: Any = type(f"Codec{kind.__name__}", (codec.CodecTraining, kind), {})
        return trained(config.model, config.tuner)
    if section.kind == "opaque":
        return kind(config.model)
    if section.kind not in MIXINS:
        raise ValueError(f"alpha.kind: {config.model.family} has no `{section.kind}` transparency")
    mixed: Any = type(f"{section.kind.capitalize()}{kind.__name__}", (MIXINS[section.kind], kind), {})
    return mixed(config.model, section)
