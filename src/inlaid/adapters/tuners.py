"""Selection, preparation and saving of the weights that a run trains, for all model families.

LoRA (Hu et al. 2021), DoRA (Liu et al. 2024), LoKr and LoHa (Yeh et al. 2023) use peft's `add_adapter`. Full
fine-tuning trains the weights of the network.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from inlaid import config as recipe
from inlaid.adapters import lycoris
from inlaid.adapters.efficient_layers import (
    ADAPTER,
    HALF,
    keep_inputs,
    use_factor_norms,
    use_low_precision,
)
from inlaid.adapters.layers import companions
from inlaid.adapters.lycoris import KINDS
from inlaid.adapters.write import write_diffusers, write_peft, write_tensors
from inlaid.networks import quantize
from inlaid.networks.domain_embedding import EMBEDDING, NAME


def match(patterns: Sequence[str], names: Sequence[str], *, what: str) -> list[str]:
    """Return the names that fully match at least one of the regular expressions `patterns`.

    `what` describes the names in messages, such as `parameter`.

    Raises:
        ValueError: if a pattern is not a regular expression or matches no name.
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
                else f"; an existing name is {names[0]}"
            )
            wrong.append(f"`{pattern}` matches no {what}{near}")
        found |= hits
    if wrong:
        raise ValueError("tuner.targets: " + "; ".join(wrong))
    return [n for n in names if n in found]


Section = recipe.LowRank | recipe.Full


def select(section: Section, targets: Sequence[str], denoiser: nn.Module) -> list[str]:
    """Return the names of the layers to adapt or, for full fine-tuning, of the parameters to train.

    Args:
        section: tuner section of the recipe (YAML configuration).
        targets: regular expressions for layer names. They apply to an adapter if the recipe sets no targets.
        denoiser: network to train; may be on the meta device.

    Raises:
        ValueError: if a target is invalid or matches nothing, or if no target matches a layer of a trained
            image encoder.
    """
    if isinstance(section, recipe.Full):
        names = [n for n, _ in denoiser.named_parameters()]
        return match(section.targets, names, what="parameter") if section.targets else names
    layers, what = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d), "linear or convolution layer"
    if section.kind in KINDS:
        layers, what = (nn.Linear, nn.Conv1d, nn.Conv2d), f"layer that {section.kind} supports"
    names = [n for n, m in denoiser.named_modules() if isinstance(m, layers)]
    chosen = match(section.targets or targets, names, what=what)
    for part in companions(denoiser):
        if not any(n.startswith(f"{part}.") for n in chosen):
            raise ValueError(
                f"tuner.targets: no pattern matches a layer of {part}, which this recipe trains: add one"
            )
    return chosen


def attach(
    section: Section, targets: Sequence[str], denoiser: nn.Module, *, seed: int
) -> dict[str, nn.Parameter]:
    """Freeze a denoiser, then attach adapters or, for full fine-tuning, make the selected weights trainable.

    Trainable weights are float32.

    Args:
        section: tuner section of the recipe (YAML configuration).
        targets: regular expressions for layer names. They apply to an adapter if the recipe sets no targets.
        denoiser: network to train; changed in place.
        seed: seed of the initial low-rank factors.

    Returns:
        The trainable parameters by name.

    Raises:
        ValueError: if a target is invalid or matches nothing, or if no target matches a layer of a trained
            image encoder.
    """
    denoiser.requires_grad_(False)
    chosen = select(section, targets, denoiser)
    if not isinstance(section, recipe.LowRank):
        for name, parameter in denoiser.named_parameters():
            parameter.requires_grad_(name in set(chosen))
    else:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            denoiser.add_adapter(_peft_config(section, chosen), adapter_name=ADAPTER)  # type: ignore[operator]
            use_factor_norms(denoiser)
            if not section.dropout and any(p.dtype in HALF for p in denoiser.parameters()):
                {"base": use_low_precision, "float32": keep_inputs}[section.precision](denoiser)
            lycoris.factor(denoiser, ADAPTER)
            # peft initializes adapters in the dtype of the base model, which may be float8. In that case,
            # initialize them again in float32.
            rounded = {p.dtype for p in denoiser.parameters() if p.requires_grad} != {torch.float32}
            _float32(denoiser)
            if rounded:
                _start_again(denoiser)
    _float32(denoiser)
    return {n: p for n, p in denoiser.named_parameters() if p.requires_grad}


@contextmanager
def disabled(denoiser: nn.Module) -> Iterator[None]:
    """Context manager that disables the adapters, so that the network acts as the base model."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [m for m in denoiser.modules() if isinstance(m, BaseTunerLayer)]
    assert layers, "only adapters can be disabled"
    for layer in layers:  # peft's own switch would also freeze the adapter
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def _float32(denoiser: nn.Module) -> None:
    for parameter in denoiser.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


@torch.no_grad()
def _start_again(denoiser: nn.Module) -> None:
    from peft.tuners.lora import LoraLayer
    from peft.tuners.lycoris_utils import LycorisLayer

    for layer in denoiser.modules():
        if isinstance(layer, LycorisLayer):
            layer.reset_adapter_parameters(ADAPTER)
        elif isinstance(layer, LoraLayer):
            layer.reset_lora_parameters(ADAPTER, True)
            magnitudes: Any = layer.lora_magnitude_vector
            for magnitude in magnitudes.values():
                weight = quantize.dense(layer.get_base_layer()).float()
                norms = torch.linalg.vector_norm(weight.flatten(1), dim=1)
                magnitude.weight.copy_(norms.view_as(magnitude.weight))


def _peft_config(section: recipe.LowRank, modules: Sequence[str]):
    from peft import LoHaConfig, LoKrConfig, LoraConfig

    if section.kind in KINDS:
        kind = LoKrConfig if section.kind == "lokr" else LoHaConfig
        return kind(r=section.rank, alpha=section.alpha or section.rank, target_modules=list(modules))  # type: ignore[arg-type]
    return LoraConfig(
        r=section.rank,
        lora_alpha=section.alpha or section.rank,  # type: ignore[arg-type]
        lora_dropout=section.dropout,
        target_modules=list(modules),
        use_dora=section.kind == "dora",
    )


def weights(section: Section, denoiser: nn.Module) -> dict[str, Tensor]:
    """Return the tensors to save, by name: the trainable parameters or, for full fine-tuning, all tensors."""
    if isinstance(section, recipe.Full):
        return denoiser.state_dict(keep_vars=True)
    return {n: p for n, p in denoiser.named_parameters() if p.requires_grad}


def save(
    section: Section,
    denoiser: nn.Module,
    weights: Mapping[str, Tensor],
    folder: Path,
    *,
    metadata: Mapping[str, str],
) -> Path:
    """Write the trained weights: an adapter or, for full fine-tuning, the network in diffusers layout.

    Args:
        section: tuner section of the recipe.
        denoiser: network after `attach`; its weights are not used.
        weights: unsharded tensors, with the names that the function `weights` returns.
        folder: folder to write; created if missing.
        metadata: header entries of the adapter file.

    Returns:
        The path of the adapter file, or of the network's folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(section, recipe.Full):
        from torch.distributed.fsdp import FSDPModule  # slow import that only full fine-tuning needs

        with torch.device("meta"):  # FSDP replaces the class of a sharded network and shards its weights
            kind = next(c for c in type(denoiser).__mro__ if not issubclass(c, FSDPModule))
            shell = kind.from_config(denoiser.config)  # type: ignore[attr-defined]
        shell.load_state_dict(weights, assign=True)
        shell.save_pretrained(folder, max_shard_size="5GB")
        return folder
    tensors = {
        n.replace(f".{ADAPTER}", "").replace("_vector.weight", "_vector"): w for n, w in weights.items()
    }
    vector = tensors.pop(f"{NAME}.weight", None)
    if vector is not None:
        write_tensors(folder / EMBEDDING, {NAME: vector}, metadata)
    peft_config = denoiser.peft_config[ADAPTER].to_dict()  # type: ignore[union-attr]
    for part in companions(denoiser):
        own = {n: tensors.pop(n) for n in [*tensors] if n.startswith(f"{part}.")}
        own = {n.removeprefix(f"{part}."): w for n, w in own.items()}
        write_peft(folder / part, own, peft_config, metadata=dict(metadata))
    if section.kind in KINDS:
        return lycoris.write(folder, tensors, peft_config, metadata=dict(metadata))
    return write_diffusers(folder, tensors, peft_config, metadata=dict(metadata))
