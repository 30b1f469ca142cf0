"""`gradient_checkpointing: attention`: the bits of full recomputation, with attention computed once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from inlaid import config
from inlaid.adapters import tuners
from inlaid.alpha.opening import build_family
from inlaid.families import Family
from inlaid.networks import quantize
from inlaid.tiny import random
from inlaid.training import memory
from inlaid.training.memory import keep_attention
from support.contract import CASES, FEW, IDS, random_batch
from support.slow import mostly_slow, slow

Checkpoint = Callable[[str, str], Path]


class Calls(TorchDispatchMode):
    """Number of calls of fused attention, by operator and number of keys."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[tuple[str, int]] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func.overloadpacket in memory.ATTENTION:
            self.counts[func.overloadpacket.__name__, args[1].shape[-2]] += 1
        return func(*args, **(kwargs or {}))


def run(
    family: Family, which: Any, kind: str, dtype: torch.dtype, **section: Any
) -> tuple[list[Tensor], Counter[tuple[str, int]]]:
    """The loss and all gradients of a batch, and how often attention was computed."""
    denoiser = family.load_denoiser(dtype).train()
    quantize.shrink_weights(config.Memory(**section), denoiser, torch.device("cpu"), dtype)
    memory.enable_checkpointing(denoiser, which)
    tuner = config.Full() if kind == "full" else config.LowRank(kind=kind, rank=2)  # type: ignore[arg-type]
    trained = tuners.attach(tuner, family.targets, denoiser, seed=1)
    generator = torch.Generator().manual_seed(2)
    for name, p in trained.items():
        noise = 0.1 * torch.randn(p.shape, generator=generator)
        p.data = p.data * (1 + noise) if "vector" in name or kind == "full" else noise
    batch = random_batch(family, 2)
    with (
        torch.autocast("cpu", dtype, enabled=kind == "full" and dtype is not torch.float32),
        Calls() as calls,
    ):
        out = family.predict(denoiser, batch.latents, torch.tensor([0.2, 0.9]), batch.cond)
        loss = out.float().square().mean()
        loss.backward()
    gradients = [p.grad for p in trained.values() if p.grad is not None]
    assert gradients and any(bool(g.any()) for g in gradients)
    return [loss.detach(), *gradients], calls.counts


def same(family: Family, kind: str, dtype: torch.dtype, **section: Any) -> None:
    full, twice = run(family, True, kind, dtype, **section)
    kept, once = run(family, "attention", kind, dtype, **section)
    assert len(full) == len(kept) and all(torch.equal(a, b) for a, b in zip(full, kept, strict=True))
    assert twice and once == Counter({name: (n + 1) // 2 for name, n in twice.items()}), (
        "half as often, but for what is outside the blocks"
    )


@pytest.fixture
def every_length(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny clips have few tokens."""
    monkeypatch.setattr(memory, "KEPT_TOKENS", 1)


def opened(checkpoint: Checkpoint, case: tuple[str, str], **alpha: Any) -> Family:
    model = {**random.model(*case), "checkpoint": str(checkpoint(*case))}
    return build_family(config.build({"run": "x", "model": model, "data": {"sources": "x"}, "alpha": alpha}))


@pytest.mark.usefixtures("every_length")
@pytest.mark.parametrize("dtype", [slow(torch.float32), torch.bfloat16])
@pytest.mark.parametrize("case", mostly_slow(CASES, FEW.__contains__), ids=IDS)
def test_every_family_has_the_same_bits(checkpoint: Checkpoint, case: tuple[str, str], dtype: Any) -> None:
    same(opened(checkpoint, case, kind="opaque"), "lora", dtype)


@pytest.mark.usefixtures("every_length")
@pytest.mark.parametrize("dtype", [slow(torch.float32), torch.bfloat16])
@pytest.mark.parametrize("kind", ["dora", slow("lokr"), slow("loha"), "full"])
def test_every_tuner_has_the_same_bits(checkpoint: Checkpoint, kind: str, dtype: Any) -> None:
    same(opened(checkpoint, ("wan", "t2v"), kind="opaque"), kind, dtype)


@pytest.mark.usefixtures("every_length")
@pytest.mark.parametrize(
    ("case", "rule"),
    [
        slow(("wan", "t2v"), "block"),
        (("cogvideox", "5b"), "block"),
        slow(("cogvideox", "5b"), "bias"),
        slow(("mochi", "t2v"), "block"),
    ],
)
def test_joint_alpha_has_the_same_bits(checkpoint: Checkpoint, case: tuple[str, str], rule: str) -> None:
    """It computes attention twice in a block."""
    same(opened(checkpoint, case, kind="joint", text_to_alpha=rule), "lora", torch.float32)


@pytest.mark.usefixtures("every_length")
@pytest.mark.parametrize("scheme", [slow("int8"), "int4"])
def test_a_quantised_base_has_the_same_bits(checkpoint: Checkpoint, scheme: str) -> None:
    pytest.importorskip("torchao" if scheme == "int8" else "torch")
    same(opened(checkpoint, ("wan", "t2v"), kind="opaque"), "lora", torch.float32, quantize=scheme)


# --- one block --------------------------------------------------------------------------------------------


class Block(nn.Module):
    """Attention over the tokens, then attention to a short text."""

    def __init__(self, after: Callable[[Tensor], Tensor] = lambda x: x) -> None:
        super().__init__()
        self.qkv, self.after = nn.Linear(32, 96), after

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (2, 16)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        x = x + self.after(F.scaled_dot_product_attention(q, k, v)).transpose(1, 2).flatten(2)
        text = q[:, :, :512]
        return x + F.scaled_dot_product_attention(q, text, text).transpose(1, 2).flatten(2)


def passed(block: Block) -> Tensor:
    x = torch.randn(1, 1024, 32, generator=torch.Generator().manual_seed(0), requires_grad=True)
    return checkpoint(block, x, use_reentrant=False, context_fn=keep_attention).square().mean()  # type: ignore[return-value]


def test_attention_to_a_short_text_is_computed_again() -> None:
    with Calls() as calls:
        passed(Block()).backward()
    assert sorted(n for (_, keys), n in calls.counts.items() if keys == 1024) == [1]
    assert sorted(n for (_, keys), n in calls.counts.items() if keys == 512) == [2]


def test_kept_bytes_are_the_result_and_its_sums() -> None:
    kept: list[int] = []
    real = memory._Recording.__exit__

    def note(self: Any, *error: Any) -> None:
        kept.append(
            sum(t.nbytes for out in self.box for each in out if isinstance(each, tuple) for t in each[:1])
        )
        real(self, *error)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory._Recording, "__exit__", note)
        loss = passed(Block())
    tokens, width, heads = 1024, 32, 2
    assert kept == [tokens * (width * 4 + heads * 4)]
    loss.backward()


def test_a_second_backward_pass_is_refused() -> None:
    loss = passed(Block())
    loss.backward(retain_graph=True)
    with pytest.raises(ValueError, match="`attention` allows one backward pass for each forward pass"):
        loss.backward()


def test_a_result_that_is_changed_in_place_is_refused() -> None:
    with torch.no_grad():  # without gradients, nothing is recomputed
        passed(Block(lambda x: x.mul_(2)))
    with pytest.raises(ValueError, match="changes the result of attention in place"):
        passed(Block(lambda x: x.mul_(2))).backward()


def test_a_run_with_it_resumes_and_is_the_run_without(recipe: Callable[..., dict], tmp_path: Path) -> None:
    from inlaid.training.loop import train

    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "KEPT_TOKENS", 1)
        for which in (True, "attention"):
            raw = recipe(memory__gradient_checkpointing=which, train__steps=3, train__save_every=3)
            raw["run"] = str(tmp_path / str(which))
            train(config.build(raw))
            found.append((Path(raw["run"]) / "adapter/pytorch_lora_weights.safetensors").read_bytes())
    assert found[0] == found[1]
