"""Runs that were not trained: a recipe, and an adapter or a network with random values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from inlaid import config
from inlaid.adapters import lycoris, tuners
from inlaid.adapters.layers import layer_shapes
from inlaid.adapters.merge import merge_adapter
from inlaid.adapters.read import read_adapter
from inlaid.adapters.write import write_tensors
from inlaid.alpha.opening import build_family
from inlaid.networks.domain_embedding import EMBEDDING, NAME
from inlaid.tiny import random

State = dict[str, Tensor]


def scramble(network: nn.Module, everything: bool = False) -> None:
    """Random adapter values; magnitudes 0.8 to 1.2 of the norms that they start from."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, p in network.named_parameters():
            if "lora_magnitude" in name:
                p.mul_(0.8 + 0.4 * torch.rand(p.shape, generator=generator))
            elif everything or any(mark in name for mark in ("lora_", "lokr_", "hada_")):
                p.copy_(torch.randn(p.shape, generator=generator) * 0.2)


def fused(network: Any) -> State:
    """The weights of a network with its adapters merged by peft, under the names without adapters."""
    for module in list(network.modules()):
        if hasattr(module, "merge") and hasattr(module, "base_layer"):
            module.merge()
    marks = ("lora_", "lokr_", "hada_")
    state = {k.replace(".base_layer", ""): t for k, t in network.state_dict().items()}
    return {k: t for k, t in state.items() if not any(m in k for m in marks)}


def make_run(
    folder: Path, family: str, tuner: str, checkpoint: Path, variant: str | None = None, **alpha: Any
) -> Path:
    """A run folder with a tuner of alpha 7 and rank 3 on the family's default layers."""
    model = random.model(family, variant) if variant else {"family": family}
    raw: dict[str, Any] = {
        "run": str(folder),
        "model": {**model, "checkpoint": str(checkpoint)},
        "data": {"sources": "clips"},
        "tuner": {"kind": tuner} | ({} if tuner == "full" else {"rank": 3, "alpha": 7}),
        **({"alpha": alpha} if alpha else {}),
    }
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(raw), "utf-8")
    settings = config.load(folder)
    opened: Any = build_family(settings)
    network = opened.single.load_denoiser(torch.float32)
    tuners.attach(settings.tuner, opened.targets, network, seed=0)
    scramble(network, tuner == "full")
    weights = tuners.weights(settings.tuner, network)
    tuners.save(settings.tuner, network, weights, folder / "adapter", metadata=opened.about())
    if alpha.get("domain_embedding"):
        width = next(p for n, p in network.named_parameters() if ".lora_A." in n).shape[1]
        write_tensors(folder / "adapter" / EMBEDDING, {NAME: torch.linspace(1, 2, width)}, opened.about())
    return folder


def trained_weights(run: Path) -> tuple[Any, State, State]:
    """The family of a run, the weights of its base model, and those that it should export, merged."""
    settings = config.load(run)
    family: Any = build_family(settings).single
    base = family.load_denoiser(torch.float32).state_dict()
    merged = family.load_denoiser(torch.float32)
    if settings.tuner.kind == "full":
        return family, base, family.load_denoiser(torch.float32, folder=run / "adapter").state_dict()
    if settings.tuner.kind in lycoris.KINDS:
        lycoris.merge(merged, run / "adapter")
    else:
        merge_adapter(merged, read_adapter(run / "adapter", family, shapes=layer_shapes(merged)))
    return family, base, merged.state_dict()
