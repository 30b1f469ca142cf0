"""Prior preservation: for clips of these sources the network keeps the predictions of the base model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from inlaid import config
from inlaid.adapters import tuners
from inlaid.data.batch import Batch
from inlaid.families.wan import Wan
from inlaid.training.loop import train
from inlaid.training.steps import DenoisingStep

KEPT = torch.tensor([3.0, 0.0])
T = torch.tensor([0.3, 0.8])


def taught(folder: Path, kind: str) -> tuple[torch.nn.Module, DenoisingStep, Batch, torch.Tensor]:
    """A network with an adapter that changes it, a step, a batch of which the first is kept, and noise."""
    family = Wan(config.Model(family="wan", checkpoint=str(folder)))
    denoiser = family.load_denoiser(torch.float32)
    tuners.attach(config.LowRank(kind=kind, rank=2), Wan.targets, denoiser, seed=0)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(1)
    latents, noise = torch.randn(2, 2, 16, 3, 4, 4, generator=generator)
    text = torch.randn(2, 512, 32, generator=generator)
    step = DenoisingStep(family, family.objective(config.Objective(), (32, 32)), untuned=tuners.disabled)
    return denoiser, step, Batch(latents, {"text": text}, ["a", "b"], KEPT), noise


@pytest.mark.parametrize("kind", ["lora", "dora", "lokr", "loha"])
def test_nothing_is_to_be_learned_of_what_is_kept(tiny_wan: Path, kind: str) -> None:
    denoiser, step, batch, noise = taught(tiny_wan, kind)
    losses = step.losses(denoiser, batch, T, noise).detach()
    assert losses[0] == pytest.approx(0, abs=1e-10), "a fresh adapter adds nothing"
    plain = step.losses(denoiser, Batch(batch.latents, batch.cond, batch.names), T, noise).detach()
    assert losses[1] == plain[1] > 0.1
    assert plain[0] > 0.1


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_kept_is_the_distance_from_the_untuned_network(tiny_wan: Path, kind: str) -> None:
    denoiser, step, batch, noise = taught(tiny_wan, kind)
    x_t = step.objective.corrupt(batch.latents, noise, T)
    base = step.family.load_denoiser(torch.float32)
    wanted = step.family.predict(base, x_t, T, batch.cond)
    generator = torch.Generator().manual_seed(2)
    trained = {n: p for n, p in denoiser.named_parameters() if p.requires_grad}
    for p in trained.values():
        p.data += 0.2 * torch.randn(p.shape, generator=generator)
    changed = step.family.predict(denoiser, x_t, T, batch.cond)
    assert (changed - wanted)[0].abs().max() > 0.01
    losses = step.losses(denoiser, batch, T, noise)
    assert losses[0].item() == pytest.approx(3 * float((changed - wanted)[0].square().mean()), rel=1e-5)
    losses[0].backward()
    assert all(p.requires_grad and p.grad is not None for p in trained.values()), "the adapter is on again"


def test_training_moves_less_what_is_kept(
    recipe: Callable[..., dict], make_clips: Callable[..., Path], tmp_path: Path
) -> None:
    """And a run goes on bit for bit where it stopped."""
    make_clips()
    known = make_clips(name="known")
    sizes = {}
    for prior_preservation in (0, 10):
        sources = [
            {"path": str(tmp_path / "clips")},
            {"path": str(known), "prior_preservation": prior_preservation},
        ]
        run = tmp_path / f"run-{prior_preservation}"
        raw = recipe(run=str(run), data__sources=sources, data__validation=0, optim__lr=1e-3)
        raw["data"]["cache"] = str(tmp_path / "cache")
        folder = train(config.build(raw))
        update = load_file(folder / "adapter/pytorch_lora_weights.safetensors")
        sizes[prior_preservation] = (
            sum(float(t.square().sum()) for n, t in update.items() if "lora_B" in n) ** 0.5
        )
        again = tmp_path / f"again-{prior_preservation}"
        for steps in (2, 6):
            train(config.build(raw | {"run": str(again), "train": raw["train"] | {"steps": steps}}))
        whole = load_file(again / "adapter/pytorch_lora_weights.safetensors")
        assert all(torch.equal(whole[n], t) for n, t in update.items())
    assert 0 < sizes[10] < sizes[0]
