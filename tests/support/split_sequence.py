"""A program for several processes: loss and gradients of split sequences, compared with one process's.

Its argument is a JSON list of cases, see `difference`. The first process prints, for each case, the relative
differences of the loss, the prediction and the gradients, and the number of tokens.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from inlaid import config
from inlaid.adapters import tuners
from inlaid.alpha.opening import COMPOSED
from inlaid.data.batch import Batch
from inlaid.families import Family, get
from inlaid.networks import quantize
from inlaid.networks.sequence_parallel import SequenceParallel
from inlaid.tiny import random
from inlaid.training import memory
from inlaid.training.steps import DenoisingStep

CPU = torch.device("cpu")


def opened(case: dict[str, Any]) -> Family:
    own = random.model(case["family"], case["variant"])
    family = get(case["family"])(config.Model(checkpoint=case["checkpoint"], **own))
    section = {"joint": config.Joint, "opaque": config.Opaque}[case.get("alpha", "opaque")]
    rule = {"text_to_alpha": case["rule"]} if "rule" in case else {}
    made = section(kind=case.get("alpha", "opaque"), **rule)
    return COMPOSED[section](family, made) if section in COMPOSED else family


def extent(family: Family, odd: bool) -> tuple[int, int, int]:
    """A clip whose video has an odd number of tokens, or an even number."""
    grid = family.grid
    if grid.only:
        return grid.only
    side = grid.spatial * (3 if odd else 2)
    return grid.offset + grid.temporal * 2, side, side


def network(family: Family, case: dict[str, Any]) -> tuple[nn.Module, dict[str, nn.Parameter]]:
    denoiser = family.load_denoiser(torch.float32).train()
    section = config.Memory(**case.get("memory", {}))
    quantize.shrink_weights(section, denoiser, CPU, torch.float32)
    if section.gradient_checkpointing:
        memory.enable_checkpointing(denoiser, section.gradient_checkpointing)
    kind = case.get("tuner", "lora")
    tuner = config.Full(kind="full") if kind == "full" else config.LowRank(kind=kind, rank=2)
    tuners.attach(tuner, family.targets, denoiser, seed=1)
    family.attached(denoiser)
    g = torch.Generator().manual_seed(2)
    trained = {n: p for n, p in denoiser.named_parameters() if p.requires_grad}
    for name, p in trained.items():
        if kind != "full":
            noise = 0.1 * torch.randn(p.shape, generator=g)
            p.data = p.data * (1 + noise) if "vector" in name else noise
    return (denoiser if section.quantize or kind == "dora" else denoiser.double()), trained


def loss_and_gradients(
    family: Family, denoiser: nn.Module, trained: dict[str, nn.Parameter], case: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """Of two samples with captions of different lengths, by the training step.

    With `sizes`, a second and a third micro-batch have other sizes.
    """
    g, total = torch.Generator().manual_seed(3), torch.zeros(())
    text = family.collate(
        family.encode_text(family.load_text_encoder(CPU, torch.float32), ["a", "two words"])
    )
    step = DenoisingStep(family, family.objective(config.Objective(), (64, 64)), untuned=tuners.disabled)
    odd = case.get("odd", False)
    for size in [odd, not odd, odd] if "sizes" in case else [odd]:
        shapes = family.shapes(*extent(family, size))
        clip = {k: torch.randn(2, *s, generator=g) for k, s in shapes.items()}
        batch = Batch(clip.pop("latents"), {**text, **clip}, ["a", "b"])
        if case.get("prior"):
            batch = replace(batch, prior_preservation=torch.tensor([0.0, 0.5]))
        out = step(denoiser, batch, torch.Generator().manual_seed(4))
        out["loss"].backward()
        total = total + out["loss"].detach()
    return total, torch.cat(
        [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in trained.values()]
    )


def difference(case: dict[str, Any]) -> dict[str, Any]:
    """The relative differences of loss and gradients between a split sequence and a whole one.

    A case has `family`, `variant` and `checkpoint`; optional are `alpha`, `rule`, `tuner`, `memory`, `odd`,
    `compile` (a backend), `sizes` (several sizes of clips) and `prior` (prior preservation). All is computed
    in float64, so that a sum in another order is no difference. Only quantised bases and DoRA are in float32.
    """
    family = opened(case)
    denoiser, trained = network(family, case)
    loss, gradients = loss_and_gradients(family, denoiser, trained, case)
    denoiser, trained = network(family, case)
    sequence = SequenceParallel(dist.group.WORLD)  # type: ignore[arg-type]
    family.split_sequence(denoiser, sequence)
    if "compile" in case:
        memory.compile_blocks(denoiser, case["compile"])
    own_loss, own = loss_and_gradients(family, denoiser, trained, case)
    alone = float((own - gradients).norm() / gradients.norm())
    dist.all_reduce(own)
    own /= dist.get_world_size()
    losses: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(losses, float(own_loss))
    return {
        "loss": float(abs(own_loss - loss) / loss),
        "gradients": float((own - gradients).norm() / gradients.norm()),
        "without the mean": alone,
        "ranks": max(losses) - min(losses),
        "tokens": family.tokens(*extent(family, case.get("odd", False))),
    }


if __name__ == "__main__":
    dist.init_process_group("gloo", timeout=timedelta(seconds=120))
    found = [difference(case) for case in json.loads(sys.argv[1])]
    if dist.get_rank() == 0:
        print(json.dumps(found))
    dist.destroy_process_group()
