"""Compiled blocks: one graph each, without breaks, for every family and tuner; the loss stays what it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from inlaid import config, families
from inlaid.adapters import tuners
from inlaid.families import Family
from inlaid.networks import quantize
from inlaid.tiny import random
from inlaid.training import memory
from support.slow import mostly_slow, slow

pytestmark = pytest.mark.untraced

CASES = random.cases()
IDS = ["-".join(case) for case in CASES]
FIRST = list({family: (family, variant) for family, variant in reversed(CASES)}.values())


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def loss_and_gradient(
    family: Family, kind: str, backend: str | None, shapes: int, **section: object
) -> tuple[Tensor, Tensor]:
    """With checkpointing, of a batch of two in training mode, over so many shapes of clips."""
    denoiser = family.load_denoiser(torch.float32).train()
    quantize.shrink_weights(config.Memory(**section), denoiser, torch.device("cpu"), torch.float32)  # type: ignore[arg-type]
    memory.enable_checkpointing(denoiser, True)
    trained = tuners.attach(config.LowRank(kind=kind, rank=2), family.targets, denoiser, seed=1)  # type: ignore[arg-type]
    g = torch.Generator().manual_seed(2)
    for name, p in trained.items():
        noise = 0.1 * torch.randn(p.shape, generator=g)
        p.data = p.data * (1 + noise) if "vector" in name else noise
    if backend:
        memory.compile_blocks(denoiser, backend)
    grid, total = family.grid, torch.zeros(())
    first = (grid.offset + grid.temporal * (1 if grid.offset > 1 else 2), grid.spatial * 2, grid.spatial * 4)
    second = (first[0] + 2 * grid.temporal, grid.spatial * 4, grid.spatial * 2)
    for size in [grid.only] if grid.only else [first, second][:shapes]:
        shape = family.shapes(*size)
        clip = {k: torch.randn(2, *s, generator=g) for k, s in shape.items()}
        encoder = family.load_text_encoder(torch.device("cpu"), torch.float32)
        cond = family.collate(family.encode_text(encoder, ["a", "two words"]))
        x, t = clip.pop("latents"), torch.tensor([0.2, 0.9])
        loss = family.predict(denoiser, x, t, {**cond, **clip}).float().square().mean()
        loss.backward()
        total = total + loss.detach()
    return total, torch.cat([p.grad.flatten() for p in trained.values() if p.grad is not None])


def same(family: Family, kind: str, backend: str, shapes: int = 1, **section: object) -> None:
    plain, compiled = (loss_and_gradient(family, kind, b, shapes, **section) for b in (None, backend))
    assert abs(compiled[0] - plain[0]) <= 1e-5 * plain[0]
    assert (compiled[1] - plain[1]).norm() <= 1e-4 * plain[1].norm()
    assert sum(counters["graph_break"].values()) == 0, dict(counters["graph_break"])
    assert counters["stats"]["unique_graphs"] > 0


def opened(checkpoint: Callable[[str, str], Path], case: tuple[str, str]) -> Family:
    return families.get(case[0])(config.Model(checkpoint=str(checkpoint(*case)), **random.model(*case)))


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_every_network_with_dora(checkpoint: Callable[[str, str], Path], case: tuple[str, str]) -> None:
    same(opened(checkpoint, case), "dora", "eager")


@pytest.mark.parametrize("case", mostly_slow(FIRST, lambda c: c[0] == "wan"), ids=[c[0] for c in FIRST])
@pytest.mark.parametrize("kind", [slow("lora"), "lokr", slow("loha")])
def test_every_family_with_other_tuners(
    checkpoint: Callable[[str, str], Path], case: tuple[str, str], kind: str
) -> None:
    """LoRA on two shapes of clips, of which the second is compiled with its sizes left open."""
    same(opened(checkpoint, case), kind, "eager", shapes=2 if kind == "lora" else 1)


@pytest.mark.parametrize("scheme", [slow("int8"), slow("float8"), slow("int4"), slow("nf4")])
def test_a_quantised_base(checkpoint: Callable[[str, str], Path], scheme: str) -> None:
    pytest.importorskip({"nf4": "bitsandbytes", "int4": "torch"}.get(scheme, "torchao"))
    same(opened(checkpoint, ("wan", "t2v")), "dora", "aot_eager", quantize=scheme)


def test_a_block_that_breaks_stops() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            torch._dynamo.graph_break()
            return self.layer(x)

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([Block(), Block()])

    network = Network()
    memory.compile_blocks(network, "eager")
    with pytest.raises(Exception, match="graph_break"):
        network.blocks[0](torch.ones(2))
