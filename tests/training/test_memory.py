"""What is traded for memory changes nothing else: same gradients, or as near as so many bits allow."""

from __future__ import annotations

import sys
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from diffusers import WanPipeline
from torch import Tensor, nn

from inlaid import config
from inlaid.adapters import tuners
from inlaid.families.wan import Wan
from inlaid.networks import quantize
from inlaid.networks.quantize import CASTS, Int4Linear
from inlaid.runs.folder import Run, read_metrics
from inlaid.runs.launch import Context
from inlaid.tiny import random
from inlaid.training import memory
from inlaid.training.checkpoints import pack_state, save_state, unpack_state
from inlaid.training.job import prepare
from inlaid.training.loop import train
from inlaid.training.optim import make_optimizer
from support.checkpoints import load_state
from support.slow import slow

CPU = torch.device("cpu")
RUNS = [(q, k) for q in ("int8", "float8", "int4", "nf4") for k in ("lora", "dora", "lokr", "loha")]
RUNS = [r for r in RUNS if r not in (("int4", "loha"), ("nf4", "loha"))]
SOME = [("int8", "dora"), ("int8", "lokr"), ("nf4", "lora")]
HALF = [("float8", "lora"), ("int4", "dora")]
"""Every scheme in one of the two, and every kind but one, in every run of the tests."""
ERROR = {"int8": 0.01, "float8": 0.05, "int4": 0.12, "nf4": 0.16, "bfloat16": 0.01, None: 0.0}
"""Largest relative error of an adapter's gradient that a scheme may cause, against float32."""
NEEDS = {"int8": "torchao", "float8": "torchao", "nf4": "bitsandbytes", "int4": "torch"}


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> Wan:
    """Wide enough for groups of 64 weights."""
    folder = random.build("wan", tmp_path_factory.mktemp("wide") / "wan", heads=2, head=32, layers=4, ffn=128)
    return Wan(config.Model(family="wan", checkpoint=str(folder)))


def predict(denoiser: nn.Module, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    x, text = torch.randn(2, 16, 3, 4, 4, generator=generator), torch.randn(2, 64, 32, generator=generator)
    return denoiser(x.to(dtype), torch.tensor([900.0, 100.0]), text.to(dtype), return_dict=False)[0].float()


def tuned(
    wan: Wan, kind: str, dtype: torch.dtype = torch.float32, **section: object
) -> tuple[nn.Module, dict[str, nn.Parameter]]:
    """A small network with an adapter far from its start, the same one whatever the network is stored in."""
    denoiser = wan.load_denoiser(dtype)
    quantize.shrink_weights(config.Memory(**section), denoiser, CPU, dtype)  # type: ignore[arg-type]
    trained = tuners.attach(config.LowRank(kind=kind, rank=4), Wan.targets, denoiser, seed=1)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(2)
    for name, p in trained.items():
        noise = 0.1 * torch.randn(p.shape, generator=generator)
        p.data = p.data * (1 + noise) if "vector" in name else noise
    return denoiser, trained


def gradient(
    denoiser: nn.Module, trained: dict[str, nn.Parameter], dtype: torch.dtype = torch.float32
) -> Tensor:
    predict(denoiser, dtype).square().mean().backward()
    assert all(p.grad is not None and p.grad.norm() > 0 for p in trained.values())
    return torch.cat([p.grad.flatten() for p in trained.values() if p.grad is not None])


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


# --- a small base -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("scheme", "kind"), [r if r in SOME else slow(*r) for r in RUNS])
def test_adapters_learn_on_a_quantised_base(wan: Wan, tmp_path: Path, scheme: str, kind: str) -> None:
    pytest.importorskip(NEEDS[scheme])
    denoiser, trained = tuned(wan, kind, quantize=scheme)
    found = error(gradient(denoiser, trained), gradient(*tuned(wan, kind)))
    assert 0 < found < ERROR[scheme]
    assert {p.dtype for p in trained.values()} == {torch.float32}
    kept = [n for n, m in denoiser.named_modules() if type(m) is nn.Linear and type(m.weight) is nn.Parameter]
    assert kept and not any("attn" in n and ".lora_" not in n for n in kept), (
        "only what is outside the blocks"
    )
    if kind in ("lora", "dora"):  # the adapter is for the whole network
        section = config.LowRank(kind=kind, rank=4)  # type: ignore[arg-type]
        tuners.save(section, denoiser, tuners.weights(section, denoiser), tmp_path, metadata={})
        pipe = WanPipeline.from_pretrained(wan.source)
        pipe.load_lora_weights(tmp_path)
        wanted = tuned(wan, kind)[0]
        for name, p in wanted.named_parameters():
            if p.requires_grad:
                p.data = trained[name].data
        assert error(predict(pipe.transformer), predict(wanted)) < 1e-5


@pytest.mark.parametrize(
    ("scheme", "kind"), [r if r in HALF else slow(*r) for r in RUNS if r[1] in ("lora", "dora")]
)
def test_quantised_base_in_bfloat16(wan: Wan, scheme: str, kind: str) -> None:
    pytest.importorskip(NEEDS[scheme])
    half = torch.bfloat16
    found = gradient(*tuned(wan, kind, half, quantize=scheme), half)
    assert error(found, gradient(*tuned(wan, kind))) < ERROR[scheme] + 0.01


def test_int4_takes_four_bits(wan: Wan) -> None:
    layer = nn.Linear(128, 96)
    small = Int4Linear(layer)
    assert small.weight.nbytes * 8 == 4 * layer.weight.numel()
    assert error(quantize.dense(small), layer.weight) < 0.08
    x = torch.randn(2, 5, 128, requires_grad=True)
    small(x).square().sum().backward()
    wanted = x.detach().requires_grad_()
    nn.functional.linear(wanted, quantize.dense(small), layer.bias).square().sum().backward()
    assert torch.allclose(x.grad, wanted.grad, rtol=1e-5, atol=1e-5)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("cast", "kind", "dtype", "limit"),
    [
        slow("bfloat16", "lora", torch.float32, 0.01),
        ("bfloat16", "dora", torch.float32, 0.01),
        ("float8", "lora", torch.bfloat16, 0.08),
        ("float8", "lokr", torch.bfloat16, 0.08),
        slow("float8", "loha", torch.bfloat16, 0.08),
    ],
)
def test_layerwise_casting(wan: Wan, cast: str, kind: str, dtype: torch.dtype, limit: float) -> None:
    denoiser, trained = tuned(wan, kind, dtype, layerwise_casting=cast)
    stored = {p.dtype for n, p in denoiser.named_parameters() if "base_layer.weight" in n}
    assert stored == {CASTS[cast]}
    assert {p.dtype for p in trained.values()} == {torch.float32}
    assert error(gradient(denoiser, trained, dtype), gradient(*tuned(wan, kind))) < limit


@pytest.mark.parametrize("kind", [slow("lora"), "dora", "lokr", slow("loha")])
def test_adapters_on_a_small_base_start_unrounded(wan: Wan, kind: str) -> None:
    """Drawn in float32 where peft would draw in bfloat16, and the network starts as it was."""
    denoiser = wan.load_denoiser(torch.bfloat16)
    before = predict(denoiser, torch.bfloat16)
    trained = tuners.attach(config.LowRank(kind=kind, rank=4), Wan.targets, denoiser, seed=1)  # type: ignore[arg-type]
    assert any(not torch.equal(p, p.bfloat16().float()) for p in trained.values())
    assert error(predict(denoiser, torch.bfloat16), before) < 5e-3


# --- activations ------------------------------------------------------------------------------------------


def kept(denoiser: nn.Module) -> tuple[Tensor, int]:
    """Gradient, and bytes that the forward pass keeps for it."""
    sizes: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    denoiser.train()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        out = predict(denoiser)
    out.square().mean().backward()
    return torch.cat([p.grad.flatten() for p in denoiser.parameters() if p.grad is not None]), sum(
        sizes.values()
    )


@pytest.mark.parametrize("kind", ["lora", slow("dora")])
def test_checkpointing_every_nth_block_is_exact_and_in_between(wan: Wan, kind: str) -> None:
    found = {}
    for every in (0, 1, 2, 3):
        denoiser, _ = tuned(wan, kind)
        if every:
            memory.enable_checkpointing(denoiser, every)
        found[every] = kept(denoiser)
    assert all(torch.equal(found[0][0], g) for g, _ in found.values())
    bytes_kept = [found[n][1] for n in (1, 2, 3, 0)]  # blocks of four that are recomputed: 4, 2, 2, 0
    assert bytes_kept[0] < 0.75 * bytes_kept[1] and bytes_kept[1] < 0.85 * bytes_kept[3]
    assert bytes_kept[1] == bytes_kept[2]


# --- optimizers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["adamw8bit", slow("adamw4bit")])
def test_small_optimizers_resume_bit_exactly(tmp_path: Path, name: str) -> None:
    pytest.importorskip({"adamw8bit": "bitsandbytes", "adamw4bit": "torchao"}[name])

    def make() -> tuple[nn.Parameter, torch.optim.Optimizer]:
        p = nn.Parameter(torch.linspace(-1, 1, 64 * 128).view(64, 128).clone())
        return p, make_optimizer(name, config.Optim(lr=1e-2), [p, nn.Parameter(torch.ones(3))])

    def go(p: nn.Parameter, optimizer: torch.optim.Optimizer, steps: range) -> None:
        for step in steps:
            for group in optimizer.param_groups:
                group["lr"] = 1e-2 / (step + 1)
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step))
            optimizer.step()

    p, optimizer = make()
    go(p, optimizer, range(3))
    tensors: dict[str, Tensor] = {"p": p.detach().clone()}
    packed = pack_state(optimizer.state_dict(), "optimizer", tensors)
    save_state(tmp_path, tensors, {"step": 3, "per_step": 1, "optimizer": packed})
    assert {type(t) for t in tensors.values()} == {Tensor}
    small = sum(v.nbytes for k, v in tensors.items() if k.startswith("optimizer"))
    assert small < {"adamw8bit": 2.5, "adamw4bit": 1.3}[name] * p.numel()
    go(p, optimizer, range(3, 6))

    again, other = make()
    loaded, values = load_state(tmp_path)
    again.data = loaded["p"]
    other.load_state_dict(unpack_state(values["optimizer"], loaded))
    go(again, other, range(3, 6))
    assert torch.equal(again, p)


def test_offloaded_steps_are_the_same(tmp_path: Path) -> None:
    def make(offload: bool) -> tuple[list[nn.Parameter], torch.optim.Optimizer]:
        g = torch.Generator().manual_seed(0)
        ps = [nn.Parameter(torch.randn(8, 4, generator=g)), nn.Parameter(torch.randn(8, generator=g))]
        return ps, make_optimizer("adamw", config.Optim(lr=1e-2), ps, offload=offload)

    def go(ps: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
        for p in ps:
            p.grad = p.detach().sin() * 100
        torch.nn.utils.clip_grad_norm_(ps, 1.0)  # after the backward pass, and it counts
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        assert all(p.grad is None for p in ps)

    (a, plain), (b, offloaded) = make(False), make(True)
    for _ in range(3):
        go(a, plain)
        go(b, offloaded)
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    c, resumed = make(True)
    for p, q in zip(c, b, strict=True):
        p.data = q.detach().clone()
    resumed.load_state_dict(deepcopy(plain.state_dict()))  # the state is AdamW's own
    go(a, plain)
    go(c, resumed)
    assert all(torch.equal(x, y) for x, y in zip(a, c, strict=True))


# --- whole runs -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "section",
    [
        slow({"quantize": "int8"}),
        slow({"quantize": "int4", "gradient_checkpointing": 2}),
        slow({"quantize": "nf4", "gradient_checkpointing": False}),
        {"layerwise_casting": "bfloat16"},
    ],
    ids=lambda s: "-".join(map(str, s.values())),
)
def test_runs_learn_with_less_memory(recipe: Callable[..., dict], section: dict) -> None:
    folder = train(config.build(recipe(memory=section, train__steps=20, train__log_every=1)))
    losses = [x["loss"] for x in read_metrics(folder / "metrics.jsonl") if "loss" in x]
    assert sum(losses[-5:]) < 0.95 * sum(losses[:5]), losses
    whole = [x["validation_loss"] for x in read_metrics(folder / "metrics.jsonl") if "validation_loss" in x]
    assert len(whole) > 1


def test_what_is_asked_is_what_is_prepared(recipe: Callable[..., dict], tmp_path: Path) -> None:
    """Each key arrives where it has its effect."""
    ctx = Context(CPU, torch.float32, "adamw4bit")
    section = {"quantize": "int8", "gradient_checkpointing": 2}
    settings = config.build(recipe(memory=section, optim__name="adamw4bit", runtime__compile=True))
    job = prepare(settings, ctx, Run(Path(settings.run)))
    blocks = quantize.blocks(job.denoiser)
    assert all(b._compiled_call_impl is not None for b in blocks.values())
    assert {type(p).__name__ for n, p in job.denoiser.named_parameters() if "base_layer.weight" in n} == {
        "Int8Tensor"
    }
    assert type(job.optimizer).__name__ == "AdamW4bit"
    assert job.denoiser.gradient_checkpointing
    off = config.build(recipe(memory={"gradient_checkpointing": False}, run=str(tmp_path / "other")))
    job = prepare(off, Context(CPU, torch.float32, "adamw"), Run(Path(off.run)))
    assert not job.denoiser.gradient_checkpointing


# --- refusals ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"memory": {"quantize": "int8"}, "tuner": {"kind": "full"}},
            r"memory\.quantize: needs a frozen base model",
        ),
        (
            {"memory": {"layerwise_casting": "float8"}, "tuner": {"kind": "full"}},
            r"memory\.layerwise_casting: needs a frozen base model",
        ),
        (
            {"memory": {"layerwise_casting": "float8", "quantize": "int8"}},
            r"memory\.layerwise_casting: cannot be combined with memory\.quantize",
        ),
        (
            {"memory": {"layerwise_casting": "float8"}, "tuner": {"kind": "dora"}},
            r"DoRA needs norms of weights.* use memory\.quantize=float8",
        ),
        (
            {"memory": {"offload_optimizer": True}, "optim": {"name": "adamw8bit"}},
            r"memory\.offload_optimizer: needs optim\.name=adamw \(got adamw8bit\)",
        ),
        (
            {"memory": {"quantize": "int8"}, "runtime": {"parallel": "fsdp"}},
            r"memory\.quantize: not supported with runtime\.parallel=fsdp",
        ),
        (
            {"memory": {"layerwise_casting": "bfloat16"}, "runtime": {"parallel": "zero3"}},
            r"memory\.layerwise_casting: not supported with runtime\.parallel=zero3",
        ),
        (
            {"memory": {"offload_optimizer": True}, "runtime": {"parallel": "zero2"}},
            r"memory\.offload_optimizer: not supported with runtime\.parallel=zero2",
        ),
        (
            {"memory": {"layerwise_casting": "bfloat16"}, "runtime": {"compile": True}},
            r"runtime\.compile: cannot be combined with memory\.layerwise_casting",
        ),
        ({"tuner": {"kind": "lokr", "dropout": 0.1}}, r"tuner\.dropout: not supported with tuner\.kind=lokr"),
        (
            {"memory": {"quantize": "nf4"}, "tuner": {"kind": "loha"}},
            r"memory\.quantize: LoHa does not support packed weights \(nf4\): use int8 or float8",
        ),
        ({"memory": {"gradient_checkpointing": -1}}, r"memory\.gradient_checkpointing"),
        ({"memory": {"quantize": "int2"}}, r"memory\.quantize"),
    ],
)
def test_keys_that_do_not_go_together(recipe: Callable[..., dict], changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config.build(recipe(**changes))


@pytest.mark.parametrize(
    ("device", "precision", "changes", "message"),
    [
        (
            "cpu",
            torch.float32,
            {"memory": {"offload_optimizer": True}},
            "memory.offload_optimizer: has no effect on cpu",
        ),
        (
            "mps",
            torch.float32,
            {"memory": {"quantize": "int8"}},
            "int8 has no kernels for mps; use int4",
        ),
        (
            "mps",
            torch.float32,
            {"memory": {"layerwise_casting": "float8"}},
            "mps has no float8; use bfloat16",
        ),
        (
            "cuda",
            torch.bfloat16,
            {"memory": {"layerwise_casting": "bfloat16"}},
            "the base model is already bfloat16",
        ),
        (
            "mps",
            torch.float32,
            {"runtime": {"compile": True}},
            "torch cannot compile a training step for mps",
        ),
        ("cuda", torch.bfloat16, {"memory": {"offload_optimizer": True, "quantize": "nf4"}}, None),
    ],
)
def test_devices_say_what_they_do_not_do(
    recipe: Callable[..., dict], device: str, precision: torch.dtype, changes: dict, message: str | None
) -> None:
    settings = config.build(recipe(**changes))
    found = memory.problems(settings, torch.device(device), precision)
    assert len(found) == (message is not None) and (message is None or message in found[0])
    if device == "cpu":
        with pytest.raises(ValueError, match=message):
            train(settings)


@pytest.mark.parametrize(("scheme", "package"), [("int8", "torchao"), ("nf4", "bitsandbytes")])
def test_a_missing_package_is_named(
    recipe: Callable[..., dict], monkeypatch: pytest.MonkeyPatch, scheme: str, package: str
) -> None:
    for module in [m for m in sys.modules if m.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        ValueError, match=rf"memory\.quantize: `{scheme}` needs a package .* pip install 'inlaid\["
    ):
        train(config.build(recipe(memory={"quantize": scheme})))
