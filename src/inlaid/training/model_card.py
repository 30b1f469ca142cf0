"""Model card of a run."""

from __future__ import annotations

from collections.abc import Sequence

from inlaid import config as recipe
from inlaid import families
from inlaid.adapters.model_card import model_card
from inlaid.alpha.rgba_vae import rgba_vae_card
from inlaid.data.modality import modality_of
from inlaid.objectives import FlowMatching


def run_model_card(
    config: recipe.Config, family: families.Family, step: int, prompts: Sequence[str], objective: object
) -> str:
    """Return the model card of a run."""
    if isinstance(config.tuner, recipe.Codec):
        return rgba_vae_card(config, config.tuner, family.name, step)
    what = "" if isinstance(objective, FlowMatching) else "v-prediction on the checkpoint's schedule"
    return model_card(
        config,
        step=step,
        prompts=list(prompts) if family.text_length else [],
        task=modality_of(family.modality).task(family),
        objective=what,
        warnings=family.warnings(),
    )
