"""Tuners: which weights train, and how they are stored. They know no model family.

LoRA (Hu et al. 2021) and DoRA (Liu et al. 2024) go through peft's `add_adapter`; full fine-tuning opens the weights.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from inlay import config as recipe
from inlay import formats

ADAPTER = "default"
"""peft's name of the adapter that is trained."""


def match(patterns: Sequence[str], names: Sequence[str], *, what: str) -> list[str]:
    """The names that any pattern matches as a whole.

    Raises:
        ValueError: for patterns that are no regular expression or match nothing.
    """
    found: set[str] = set()
    wrong = []
    for pattern in patterns:
        try:
            hits = {n for n in names if re.fullmatch(pattern, n)}
        except re.error as error:
            wrong.append(f"`{pattern}` is not a regular expression ({error})")
            continue
        if not hits:
            like = [
                n
                for n in names
                if re.search(pattern.replace(".", r"\.") if pattern.isidentifier() else pattern, n)
            ]
            near = (
                f", but `.*{pattern}` would match {len(like)}, such as {like[0]}"
                if like
                else f"; there is, for one, {names[0]}"
            )
            wrong.append(f"`{pattern}` matches no {what}{near}")
        found |= hits
    if wrong:
        raise ValueError("tuner.targets: " + "; ".join(wrong))
    return [n for n in names if n in found]


def attach(
    section: recipe.LowRank | recipe.Full, targets: Sequence[str], denoiser: nn.Module, *, seed: int
) -> dict[str, nn.Parameter]:
    """Freezes the denoiser and opens what trains, in float32.

    Args:
        section: the recipe's tuner.
        targets: the family's default targets.
        denoiser: the frozen network; changed in place.
        seed: the low-rank factors are a function of it.

    Returns:
        The trainable parameters by name.

    Raises:
        ValueError: when a target matches nothing.
    """
    denoiser.requires_grad_(False)
    if isinstance(section, recipe.Full):
        names = [n for n, _ in denoiser.named_parameters()]
        chosen = set(match(section.targets, names, what="parameter")) if section.targets else set(names)
        for name, parameter in denoiser.named_parameters():
            parameter.requires_grad_(name in chosen)
    else:
        modules = [
            n
            for n, m in denoiser.named_modules()
            if isinstance(m, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d))
        ]
        chosen = match(section.targets or targets, modules, what="linear or convolution layer")
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            denoiser.add_adapter(_peft_config(section, chosen), adapter_name=ADAPTER)  # type: ignore[operator]
    for parameter in denoiser.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return {n: p for n, p in denoiser.named_parameters() if p.requires_grad}


def _peft_config(section: recipe.LowRank, modules: Sequence[str]):
    from peft import LoraConfig

    return LoraConfig(
        r=section.rank,
        lora_alpha=section.alpha or section.rank,  # type: ignore[arg-type]
        lora_dropout=section.dropout,
        target_modules=list(modules),
        use_dora=section.kind == "dora",
    )


def save(
    section: recipe.LowRank | recipe.Full,
    denoiser: nn.Module,
    weights: Mapping[str, Tensor],
    folder: Path,
    *,
    metadata: Mapping[str, str],
) -> Path:
    """Writes what was trained for use elsewhere: an adapter, or for full fine-tuning a diffusers `transformer` folder.

    Args:
        section: the recipe's tuner.
        denoiser: the network that `attach` changed.
        weights: trained tensors by parameter name, such as an average of them.
        folder: is created.
        metadata: text for the file's header.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(section, recipe.Full):
        state = {**denoiser.state_dict(), **weights}
        denoiser.save_pretrained(folder, state_dict=state, max_shard_size="5GB")  # type: ignore[operator]
        return folder
    tensors = {
        n.replace(f".{ADAPTER}", "").replace("_vector.weight", "_vector"): w for n, w in weights.items()
    }
    peft_config = denoiser.peft_config[ADAPTER].to_dict()  # type: ignore[union-attr]
    return formats.write_diffusers(folder, tensors, peft_config, metadata=dict(metadata))
