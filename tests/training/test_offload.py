"""Weights that come from the host block by block: the same bits, whenever the copies are made."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from inlaid import config, families
from inlaid.adapters import tuners
from inlaid.alpha.opening import build_family
from inlaid.networks import quantize
from inlaid.tiny import random
from inlaid.training import memory
from inlaid.training.offload import Conductor
from inlaid.training.transport import HereTransport
from support.contract import random_batch
from support.late import LateTransport
from support.slow import slow

CPU = torch.device("cpu")
LAYERS = 5


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., families.Family]:
    """A function that opens a family with so many blocks, each checkpoint made once."""
    made: dict[tuple, Path] = {}

    def get(
        case: tuple[str, str] = ("wan", "t2v"), alpha: str = "opaque", layers: int = LAYERS, **sizes: int
    ) -> Any:
        key = (*case, layers, *sizes.items())
        if key not in made:
            folder = tmp_path_factory.mktemp("deep") / "checkpoint"
            made[key] = random.build(case[0], folder, case[1], layers=layers, **sizes)
        raw = {"model": {**random.model(*case), "checkpoint": str(made[key])}}
        return build_family(
            config.build({"run": "x", "data": {"sources": "x"}, "alpha": {"kind": alpha}, **raw})
        )

    return cache(get)


def network(
    family: families.Family,
    kind: str = "lora",
    transport: Any = None,
    *,
    targets: Sequence[str] | None = None,
    dtype: torch.dtype = torch.float32,
    **section: Any,
) -> tuple[nn.Module, Conductor | None]:
    """A network with an adapter far from its start, whose blocks are streamed if there is a transport."""
    denoiser = family.load_denoiser(dtype).train()
    quantize.shrink_weights(config.Memory(**section), denoiser, CPU, dtype)
    memory.enable_checkpointing(denoiser, True)
    trained = tuners.attach(config.LowRank(kind=kind, rank=2), targets or family.targets, denoiser, seed=1)  # type: ignore[arg-type]
    family.attached(denoiser)
    generator = torch.Generator().manual_seed(2)
    for name, p in trained.items():
        noise = 0.1 * torch.randn(p.shape, generator=generator)
        p.data = p.data * (1 + noise) if "vector" in name else noise
    blocks = list(quantize.blocks(denoiser).values())
    if transport is None:
        return denoiser, None
    return denoiser, Conductor(blocks, range(len(blocks)), CPU, transport)


batch_of = cache(random_batch)


@cache
def plain(family: families.Family) -> nn.Module:
    """A network without offload, to copy, with few adapters: peft takes a second to build another."""
    return network(family, targets=["blocks.*.to_q"])[0]


def losses(family: families.Family, denoiser: nn.Module, passes: str = "tt") -> list[Tensor]:
    """Loss and gradient of each pass: `t` trains, `v` is without gradients, `d` also without adapters."""
    found, batch = [], batch_of(family)
    for i, kind in enumerate(passes):
        t = torch.tensor([0.3 + 0.1 * i])
        if kind == "t":
            loss = family.predict(denoiser, batch.latents, t, batch.cond).float().square().mean()
            loss.backward()
            found += [loss.detach(), *(p.grad.clone() for p in denoiser.parameters() if p.grad is not None)]
            denoiser.zero_grad()
            continue
        with torch.no_grad():
            if kind == "d":
                with tuners.disabled(denoiser):
                    found.append(family.predict(denoiser, batch.latents, t, batch.cond))
            else:
                found.append(family.predict(denoiser, batch.latents, t, batch.cond))
    return found


def equal(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> bool:
    return len(found) == len(wanted) > 1 and all(
        torch.equal(a, b) for a, b in zip(found, wanted, strict=True)
    )


@cache
def wanted(family: families.Family, passes: str) -> list[Tensor]:
    return losses(family, plain(family), passes)


def schedule(
    family: families.Family, seed: int, passes: str = "tdt", **mistakes: Any
) -> tuple[bool, LateTransport]:
    """Whether the bits are those without offload."""
    late = LateTransport(seed, **mistakes)
    indices = sorted(late.random.sample(range(LAYERS), late.random.choice((3, 4, 5))))
    denoiser = deepcopy(plain(family))
    blocks = list(quantize.blocks(denoiser).values())
    Conductor(blocks, indices, CPU, late, late.random.choice((2, 2, 3)))
    with late:
        found = losses(family, denoiser, passes)
    return equal(found, wanted(family, passes)), late


@pytest.mark.parametrize(
    ("seeds", "passes"), [(range(5), "tdt"), slow(range(200), "tvdtvvt")], ids=["5", "200"]
)
def test_every_schedule_gives_the_same_bits(deep: Any, seeds: range, passes: str) -> None:
    family = deep()
    for seed in seeds:
        same, late = schedule(family, seed, passes)
        assert same and not late.races, seed


@pytest.mark.parametrize(
    "mistake", [("wait", "before"), ("compute@forward", "_load"), ("compute@backward", "_load")], ids="-".join
)
def test_no_wait_can_be_left_out(deep: Any, mistake: tuple[str, str]) -> None:
    family = deep()
    for seed in range(20):
        same, late = schedule(family, seed, ignored={mistake})
        if late.races or not same:
            return
    pytest.fail(f"{mistake} was left out, and nothing changed")


def test_a_missing_call_is_loud(deep: Any) -> None:
    """Weights that are not there are NaN, in every format."""
    for scheme in (None, "int4"):
        denoiser, _ = network(deep(), "lora", HereTransport(), quantize=scheme)
        for block in quantize.blocks(denoiser).values():
            block._forward_pre_hooks.clear()
        assert losses(deep(), denoiser, "vv")[0].isnan().all()


@pytest.mark.parametrize(
    ("indices", "slots"), [(range(5), 2), slow(range(5), 3), slow((0, 2, 3), 2), slow((1, 2, 3, 4), 2)]
)
def test_bytes_of_a_step(deep: Any, indices: Sequence[int], slots: int) -> None:
    """2 (n - k) blocks, and those of a pass without gradients after another: at most n."""
    late = LateTransport(0)
    denoiser = deepcopy(plain(deep()))
    conductor = Conductor(list(quantize.blocks(denoiser).values()), indices, CPU, late, slots)
    block, n, moved = conductor.masters[indices[0]].size, len(indices), []
    for kind in ("t", "t", "t", "v", "v", "t"):
        before = late.moved["up"]
        with late:
            losses(deep(), denoiser, kind)
        moved.append((late.moved["up"] - before) / block)
    assert moved[1:3] == [2 * (n - slots)] * 2
    assert moved[0] == moved[1] + slots and moved[4] <= n
    assert len(conductor.slots) == slots and {s.nbytes for s in conductor.slots} == {block}


def test_only_the_slots_and_the_adapters_are_on_the_device(deep: Any) -> None:
    denoiser, conductor = network(deep(), "dora", HereTransport())
    assert conductor
    slots = {s.untyped_storage().data_ptr() for s in conductor.slots}
    with torch.no_grad():
        losses(deep(), denoiser, "vv")
    sizes = {}
    for block in quantize.blocks(denoiser).values():
        for p in block.parameters():
            if not p.requires_grad and p.untyped_storage().data_ptr() not in slots:
                sizes[p.untyped_storage().data_ptr()] = p.untyped_storage().nbytes()
    assert max(sizes.values()) <= 4, "weights that are not loaded have one element"
    whole = sum(
        p.numel() * 4
        for b in quantize.blocks(network(deep(), "dora")[0]).values()
        for p in b.parameters()
        if not p.requires_grad
    )
    held = sum(m.size for m in conductor.masters.values())
    assert whole <= held <= whole + 5 * 320 * 40


def test_addresses_are_those_of_the_weights(deep: Any) -> None:
    """Of a memory-mapped file, modulo 64: matrix-vector products of the CPU round differently at others."""
    denoiser = deepcopy(plain(deep()))
    for i, p in enumerate(p for p in denoiser.parameters() if not p.requires_grad):
        memory = torch.empty(p.nbytes + 64, dtype=torch.uint8)[4 * (i % 16) :][: p.nbytes]
        p.data = memory.view(p.dtype).view(p.shape).copy_(p.data)
    block = next(iter(quantize.blocks(denoiser).values()))
    before = {n: p.data_ptr() % 64 for n, p in block.named_parameters() if not p.requires_grad}
    conductor = Conductor(list(quantize.blocks(denoiser).values()), range(LAYERS), CPU, HereTransport())
    conductor.before(0)
    after = {n: p.data_ptr() % 64 for n, p in block.named_parameters() if not p.requires_grad}
    assert before == after and len(set(after.values())) > 8


@pytest.mark.slow
@pytest.mark.parametrize("case", random.cases(), ids="-".join)
def test_every_family(deep: Any, case: tuple[str, str]) -> None:
    family = deep(case)
    late = LateTransport(1)
    denoiser, conductor = network(family, "lora", late)
    assert conductor and len(conductor.masters) > 2
    with late:
        found = losses(family, denoiser, "tvt")
    assert not late.races and equal(found, losses(family, network(family)[0], "tvt"))


@pytest.mark.parametrize(
    "case", [("wan", "t2v"), slow(("cogvideox", "5b")), slow(("mochi", "t2v"))], ids="-".join
)
@pytest.mark.parametrize("kind", ["lora", slow("dora")])
def test_joint_alpha(deep: Any, case: tuple[str, str], kind: str) -> None:
    family = deep(case, "joint")
    late = LateTransport(2)
    denoiser, _ = network(family, kind, late)
    with late:
        found = losses(family, denoiser, "tdt")
    assert not late.races and equal(found, losses(family, network(family, kind)[0], "tdt"))


RUNS = [(q, k) for q in (None, "int8", "float8", "int4", "nf4") for k in ("lora", "dora", "lokr", "loha")]
RUNS = [r for r in RUNS if r not in (("int4", "loha"), ("nf4", "loha"))]
SOME = [("int4", "dora")]


@pytest.mark.parametrize("dtype", [torch.bfloat16, slow(torch.float32)], ids=str)
@pytest.mark.parametrize(("scheme", "kind"), [r if r in SOME else slow(*r) for r in RUNS])
def test_every_tuner_on_every_base(deep: Any, scheme: str | None, kind: str, dtype: torch.dtype) -> None:
    """Codes and scales travel instead of weights."""
    pytest.importorskip(
        {"int8": "torchao", "float8": "torchao", "nf4": "bitsandbytes"}.get(scheme or "", "torch")
    )
    family, late = deep(heads=2, head=32, ffn=128), LateTransport(3)
    how: Any = {"targets": [".*to_q", ".*ffn.net.2"], "dtype": dtype, "quantize": scheme}
    denoiser, conductor = network(family, kind, late, **how)
    without, _ = network(family, kind, **how)
    with late:
        found = losses(family, denoiser, "td")
    assert not late.races and equal(found, losses(family, without, "td"))
    assert conductor
    size = sum(m.size for m in conductor.masters.values()) / sum(
        p.numel() * dtype.itemsize
        for b in quantize.blocks(family.load_denoiser(dtype)).values()
        for p in b.parameters()
    )
    if scheme is not None and dtype is torch.float32:
        assert size < {"int8": 0.45, "float8": 0.45, "int4": 0.4, "nf4": 0.4}[scheme]
