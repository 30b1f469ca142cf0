"""Transparency: mixins that add an alpha channel to a model family. `family` creates the family of a recipe.

A transparent family is the opaque class with a mixin before it in the MRO, which calls `super()`. Its clips
are straight RGBA; the rest of the package only uses the family contract.
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
"""Mixin by the recipe's `alpha.kind`."""


def family(config: recipe.Config) -> Family:
    """Create the family of a recipe, with the transparency of its `alpha` section.

    Raises:
        ValueError: if the checkpoint is not of the family, or the family does not support the transparency.
    """
    kind, section = families.get(config.model.family), config.alpha
    if isinstance(config.tuner, recipe.Codec):
        trained: Any = type(f"Codec{kind.__name__}", (codec.CodecTraining, kind), {})
        return trained(config.model, config.tuner)
    if section.kind == "opaque":
        return kind(config.model)
    if section.kind not in MIXINS:
        raise ValueError(f"alpha.kind: {config.model.family} does not support `{section.kind}` transparency")
    mixed: Any = type(f"{section.kind.capitalize()}{kind.__name__}", (MIXINS[section.kind], kind), {})
    return mixed(config.model, section)
