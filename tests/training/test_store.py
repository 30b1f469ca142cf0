"""Activations that wait on the host for the backward pass: the same bits, whenever the copies are made."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Sequence
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from inlaid import config, families
from inlaid.adapters import tuners
from inlaid.check.counting import _Ledger
from inlaid.networks import quantize
from inlaid.tiny import random
from inlaid.training import memory
from inlaid.training.store import Store
from inlaid.training.transport import HereTransport
from support.contract import open_family
from support.late import LateTransport
from support.slow import slow

LEAST = 1000
LAYERS = 5


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {
        name: random.build(name, tmp_path_factory.mktemp("deep") / name, layers=LAYERS)
        for name in ("wan", "cogvideox", "mochi")
    }


@pytest.fixture(scope="module")
def wan(folders: dict[str, Path]) -> families.Family:
    return open_family(folders["wan"], ("wan", "t2v"))


@pytest.fixture(autouse=True)
def every_length(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny clips have few tokens."""
    monkeypatch.setattr(memory, "KEPT_TOKENS", 9)


@cache
def plain(family: families.Family) -> nn.Module:
    """A network without gradient checkpointing, to copy, with few adapters."""
    denoiser = family.load_denoiser(torch.float32).train()
    trained = tuners.attach(config.LowRank(rank=2), [".*to_q"], denoiser, seed=1)
    generator = torch.Generator().manual_seed(2)
    for p in trained.values():
        p.data = 0.1 * torch.randn(p.shape, generator=generator)
    return denoiser


def network(family: families.Family, every: Any, store: Store | None) -> nn.Module:
    denoiser = deepcopy(plain(family))
    if every:
        memory.enable_checkpointing(denoiser, every, store)
    if store:
        store.attach(denoiser)
    return denoiser


def losses(family: families.Family, denoiser: nn.Module, frames: Sequence[int] = (9, 17)) -> list[Tensor]:
    """Of clips with several lengths, with a pass without gradients before the last."""
    found, generator = [], torch.Generator().manual_seed(4)
    for n in frames:
        shapes = family.shapes(n, 64, 32)
        clip = {k: torch.randn(1, *s, generator=generator) for k, s in shapes.items()}
        text = family.collate([{"text": torch.randn(4, 32, generator=generator)}])
        x, t = clip.pop("latents"), torch.tensor([0.4])
        if n == frames[-1]:
            with torch.no_grad():
                found.append(family.predict(denoiser, x, t, {**text, **clip}))
        loss = family.predict(denoiser, x, t, {**text, **clip}).float().square().mean()
        loss.backward()
        found += [loss.detach(), *(p.grad.clone() for p in denoiser.parameters() if p.grad is not None)]
        denoiser.zero_grad()
    return found


def equal(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> bool:
    return len(found) == len(wanted) > 1 and all(
        torch.equal(a, b) for a, b in zip(found, wanted, strict=True)
    )


@cache
def wanted(family: families.Family, frames: Sequence[int]) -> list[Tensor]:
    return losses(family, network(family, True, None), frames)


def schedule(
    family: families.Family, seed: int, every: Any, frames: Sequence[int] = (9, 17), **mistakes: Any
) -> tuple[bool, LateTransport, Store]:
    """Whether the bits are those without offload."""
    late = LateTransport(seed, **mistakes)
    store = Store(late, LEAST, behind=late.random.choice((0, 1, 2)), ahead=late.random.choice((0, 1, 2)))
    denoiser = network(family, every, store)
    with late:
        found = losses(family, denoiser, frames)
    return equal(found, wanted(family, frames)), late, store


@pytest.mark.parametrize("every", [slow(True), "attention"])
@pytest.mark.parametrize("seeds", [range(5), slow(range(5, 200))], ids=["5", "195 more"])
def test_every_schedule_gives_the_same_bits(wan: Any, seeds: range, every: Any) -> None:
    for seed in seeds:
        same, late, store = schedule(wan, seed, every)
        assert same and not late.races, (seed, late.races[:3])
        assert late.moved["down"] >= late.moved["up"] > 0, "each tensor returns once"
        assert not store.buffers and not store.leaving


@pytest.mark.parametrize("name", ["cogvideox", slow("mochi")])
@pytest.mark.parametrize("every", [slow(True), "attention", slow(2), slow(False)])
def test_other_families_and_fewer_checkpoints(folders: Any, name: str, every: Any) -> None:
    family = open_family(folders[name], (name, {"cogvideox": "5b", "mochi": "t2v"}[name]))
    same, late, store = schedule(family, 1, every)
    assert same and not late.races
    assert late.moved["up"] > 0 and not store.buffers


@pytest.mark.parametrize("every", [True, slow("attention")])
@pytest.mark.parametrize(
    "mistake",
    [
        ("wait", "_take"),
        ("wait", "_leave"),
        ("wait", "_release"),
        ("compute", "put"),
        ("compute", "_fetch"),
    ],
    ids="-".join,
)
def test_no_wait_can_be_left_out(wan: Any, mistake: tuple[str, str], every: Any) -> None:
    for seed in range(20):
        same, late, _ = schedule(wan, seed, every, (9,), ignored={mistake})
        if late.races or not same:
            return
    pytest.fail(f"{mistake} was left out, and nothing changed")


@pytest.mark.slow
def test_device_memory_falls_to_three_inputs_and_a_block(tmp_path: Path) -> None:
    """By the ledger of the estimate: the inputs of the blocks are not kept on the device."""
    family = open_family(random.build("wan", tmp_path / "w", layers=9, ffn=32), ("wan", "t2v"))
    peaks, kept = [], family.tokens(9, 128, 128) * 24 * 4
    for store in (None, Store(HereTransport(), LEAST)):
        denoiser = network(family, True, store)
        text = family.collate([{"text": torch.randn(4, 32)}])
        x = torch.randn(1, *family.shapes(9, 128, 128)["latents"])
        ledger = _Ledger([*denoiser.parameters()])
        host = Store._buffer

        def uncounted(self: Store, size: int, host: Any = host, ledger: Any = ledger) -> Any:
            with torch.utils._python_dispatch._disable_current_modes():
                buffer = host(self, size)
            ledger.live.add(buffer.memory.untyped_storage()._cdata)
            return buffer

        with pytest.MonkeyPatch.context() as patch, ledger:
            patch.setattr(Store, "_buffer", uncounted)
            family.predict(denoiser, x, torch.tensor([0.4]), text).square().mean().backward()
        peaks.append(ledger.worst[0])
        if store:
            assert store.host_bytes >= 8 * kept, "the first has no gradient"
    assert peaks[0] - peaks[1] >= (8 - 3 - 2) * kept, (peaks, kept)


def test_host_memory_is_flat_and_everything_returns(wan: families.Family) -> None:
    store = Store(HereTransport(), LEAST)
    denoiser, sizes = network(wan, True, store), []
    for step in range(9):
        losses(wan, denoiser, [(9, 17, 13)[step % 3]])
        sizes.append(store.host_bytes)
        assert not store.buffers
    assert len(set(sizes[3:])) == 1, sizes
    largest = Store(HereTransport(), LEAST)
    losses(wan, network(wan, True, largest), [17])
    assert sizes[-1] < 1.5 * largest.host_bytes, "the largest shape decides"


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_step_that_fails_returns_everything(wan: families.Family, where: str) -> None:
    store = Store(HereTransport(), LEAST)
    denoiser, calls = network(wan, True, store), []

    def fail(*_: Any) -> None:
        calls.append(None)
        if len(calls) == 2 * LAYERS - 1 + (3 if where == "backward" else 0):
            raise RuntimeError("out of memory")

    for block in quantize.blocks(denoiser).values():
        block.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        losses(wan, denoiser, [9])
    calls.clear()
    denoiser.zero_grad()  # of the blocks before the one that failed
    gc.collect()  # the frames of the error
    assert not store.buffers and not store.leaving
    before, x = store.count, torch.randn(1000, requires_grad=True)
    (x * 2).sin().sum().backward()
    assert store.count == before, "a hook of the store is left on the stack"
    for block in quantize.blocks(denoiser).values():
        block._forward_pre_hooks.clear()
    assert equal(losses(wan, denoiser), losses(wan, network(wan, True, None)))


def test_the_same_tensor_is_copied_once_and_a_new_one_is_new() -> None:
    late = LateTransport(0)
    store = Store(late, 0, behind=0)
    with late:
        a = torch.randn(64, 8)
        first, second, part = store.put(a), store.put(a), store.put(a[1:3, ::2])
        assert first is second and part is not first and late.moved["down"] < 1.1 * a.nbytes
        values = a.clone()
        del a
        b = torch.zeros(64, 8)  # perhaps where a was
        other = store.put(b)
        assert other is not first and torch.equal(other.take(), b)
        assert torch.equal(first.take(), values) and torch.equal(second.take(), values)
        assert part.take().stride() == (8, 2) and torch.equal(part.take(), values[1:3, ::2])
        first.take().data_ptr()
        c = torch.ones(5, 4).t()
        assert store.put(c).take().stride() == (1, 4)
    assert not late.races


def test_what_stays_on_the_device_is_freed() -> None:
    """A node that saved its own output would keep itself alive."""
    store = Store(HereTransport(), 1 << 30)

    class Network(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x * 2).exp().exp()

    model = Network()
    store.attach(model)
    x = torch.randn(8, requires_grad=True)
    out = model(x)
    out.sum().backward()
    assert x.grad is not None and torch.allclose(x.grad, 2 * (2 * x).exp() * (2 * x).exp().exp())
    gone = weakref.ref(out.untyped_storage())
    del out
    assert gone() is None


def test_results_of_attention_go_to_the_host(wan: families.Family) -> None:
    """Each block stores the results of self-attention and cross-attention."""
    counts = []
    for every in (True, "attention"):
        store = Store(HereTransport(), LEAST)
        losses(wan, network(wan, every, store), [9])
        counts.append(store.count)
    assert counts[0] >= LAYERS - 1 and counts[1] == counts[0] + 2 * LAYERS


@pytest.mark.parametrize("behind", [0, 1])
def test_a_tensor_that_is_changed_in_place_is_refused(behind: int) -> None:
    store = Store(HereTransport(), 0, behind=behind)
    a = torch.randn(64)
    values, ticket = a.clone(), store.put(a)
    a.mul_(2)
    if behind:
        with pytest.raises(ValueError, match="changes an activation in place"):
            ticket.take()
    else:
        assert torch.equal(ticket.take(), values), "its copy is complete"


@pytest.mark.slow
def test_compiled_blocks(wan: families.Family) -> None:
    found = []
    for store in (None, Store(HereTransport(), LEAST)):
        torch._dynamo.reset()
        denoiser = network(wan, True, store)
        memory.compile_blocks(denoiser, "aot_eager")
        found.append(losses(wan, denoiser, [9]))
        assert store is None or (store.count > 0 and not store.buffers)
    assert equal(*found)
