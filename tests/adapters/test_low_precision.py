"""The update of LoRA and DoRA in the dtype of the activations: gradients, memory traffic, saved tensors."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from inlaid import config
from inlaid.adapters import tuners
from inlaid.adapters.efficient_layers import (
    LowPrecision,
    _RescaledSum,
    _Sum,
    use_factor_norms,
    use_low_precision,
)
from inlaid.families.wan import Wan
from inlaid.networks import quantize
from inlaid.networks.half_tokens import half_tokens_class
from inlaid.tiny import random
from support.slow import slow

HALF = torch.bfloat16


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


class Holder(nn.Module):
    """A network of one linear layer."""

    def __init__(self, inputs: int, outputs: int, bias: bool = True) -> None:
        super().__init__()
        self.layer = nn.Linear(inputs, outputs, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def adapted(kind: str, inputs: int, outputs: int, rank: int, *, alpha: float = 7, bias: bool = True) -> Any:
    """A layer in bfloat16 with a float32 adapter that changes it by as much as it computes."""
    torch.manual_seed(0)
    section = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=["layer"], use_dora=kind == "dora")  # type: ignore[arg-type]
    network = peft.inject_adapter_in_model(section, Holder(inputs, outputs, bias).to(HALF))
    use_factor_norms(network)
    for name, p in network.named_parameters():
        if "lora_" in name:
            wide = p.data.float()
            p.data = wide * (1 + 0.2 * noise(*p.shape)) if "vector" in name else 0.3 * noise(*p.shape, seed=1)
    return network.layer


def formula(layer: Any, x: Tensor, kind: str) -> Tensor:
    """W x + s B A x + bias, or its rows scaled to the magnitudes, in float64."""
    w, bias = layer.base_layer.weight.double(), layer.base_layer.bias
    a, b = (f["default"].weight.double() for f in (layer.lora_A, layer.lora_B))
    whole = w + layer.scaling["default"] * b @ a
    if kind == "dora":
        magnitude = layer.lora_magnitude_vector["default"].weight.double()
        whole = whole * (magnitude / whole.norm(dim=1).detach())[:, None]
    return x.double() @ whole.T + (0 if bias is None else bias.double())


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("bias", [True, False])
def test_values_and_gradients_are_those_of_the_formula(kind: str, bias: bool) -> None:
    layer = adapted(kind, 48, 40, 4, bias=bias)
    layer.__class__ = type("L", (LowPrecision, type(layer)), {})
    x = noise(2, 33, 48, seed=5).to(HALF).requires_grad_()
    target = noise(2, 33, 40, seed=6)
    trained = {n: p for n, p in layer.named_parameters() if "lora_" in n}
    out = layer(x)
    assert out.dtype == HALF
    found = torch.autograd.grad((out.float() * target).sum(), [x, *trained.values()])
    wanted_out = formula(layer, x, kind)
    wanted = torch.autograd.grad((wanted_out * target).sum(), [x, *trained.values()])
    assert (out.double() - wanted_out).norm() < 0.006 * wanted_out.norm()
    for name, a, b in zip(["x", *trained], found, wanted, strict=True):
        assert a.dtype == (HALF if name == "x" else torch.float32)
        assert (a.double() - b.double()).norm() < 0.006 * b.double().norm(), name


def test_gradients_that_are_written_by_hand() -> None:
    def wide(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, requires_grad=True)

    torch.manual_seed(0)
    y, x, a, b, m = wide(2, 3, 5), wide(2, 3, 6), wide(4, 6), wide(5, 4), wide(5)
    bias = torch.randn(5, dtype=torch.float64)
    assert torch.autograd.gradcheck(_Sum.apply, (y, x, a, b, 0.7))
    for each in (None, bias):
        assert torch.autograd.gradcheck(_RescaledSum.apply, (y, x, a, b, m, each, 0.7))


# --- a whole network --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> Wan:
    folder = random.build("wan", tmp_path_factory.mktemp("wide") / "wan", heads=2, head=32, layers=4, ffn=128)
    return Wan(config.Model(family="wan", checkpoint=str(folder)))


def gradient(
    wan: Wan, kind: str, dtype: torch.dtype, precision: str, seed: int, scheme: str | None
) -> Tensor:
    """The gradient of an adapter that is far from its start."""
    denoiser = wan.load_denoiser(dtype)
    quantize.shrink_weights(config.Memory(quantize=scheme), denoiser, torch.device("cpu"), dtype)  # type: ignore[arg-type]
    section = config.LowRank(kind=kind, rank=4, precision=precision)  # type: ignore[arg-type]
    trained = tuners.attach(section, Wan.targets, denoiser, seed=1)
    for i, (name, p) in enumerate(trained.items()):
        more = 0.1 * noise(*p.shape, seed=100 * seed + i)
        p.data = p.data * (1 + more) if "vector" in name else more
    x, text = noise(2, 16, 3, 8, 8, seed=seed), noise(2, 64, 32, seed=seed + 50)
    out = denoiser(x.to(dtype), torch.tensor([900.0, 100.0]), text.to(dtype), return_dict=False)[0]
    out.float().square().mean().backward()
    return torch.cat([p.grad.flatten() for p in trained.values()])  # type: ignore[union-attr]


@pytest.mark.parametrize(("kind", "scheme"), [slow("lora", None), ("dora", None), slow("lora", "int4")])
def test_gradients_are_as_near_to_float32_as_those_of_a_float32_update(
    wan: Wan, kind: str, scheme: str | None
) -> None:
    errors = {"base": 0.0, "float32": 0.0}
    for seed in range(3):
        wanted = gradient(wan, kind, torch.float32, "base", seed, None)
        for precision in errors:
            found = gradient(wan, kind, HALF, precision, seed, scheme)
            errors[precision] += float((found - wanted).norm() / wanted.norm()) / 3
    print(f"{kind} {scheme}: {errors['base']:.4f}, with a float32 update {errors['float32']:.4f}")
    assert errors["base"] < 1.15 * errors["float32"]


# --- memory -----------------------------------------------------------------------------------------------


class Traffic(TorchDispatchMode):
    """Bytes that are read and written by all operations that are no views."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        outputs = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        if not func.is_view:
            self.bytes += sum(t.numel() * t.element_size() for t in (*inputs, *outputs))
        return out


def traffic(layer: Any, x: Tensor) -> int:
    """The bytes of the update alone, forward."""
    counts = []
    for each in (layer, layer.base_layer):
        with Traffic() as mode:
            each(x)
        counts.append(mode.bytes)
    return counts[0] - counts[1]


def test_memory_traffic_of_the_update() -> None:
    tokens, inputs, outputs, rank = 32_760, 1536, 1536, 32
    layer = adapted("lora", inputs, outputs, rank).to("meta")
    x = torch.empty(1, tokens, inputs, device="meta", dtype=HALF)
    before = traffic(layer, x) / tokens
    layer.__class__ = type("L", (LowPrecision, type(layer)), {})
    after = traffic(layer, x) / tokens
    print(f"bytes per token and element: {before / inputs:.1f} before, {after / inputs:.2f} after")
    assert before > 30 * outputs
    assert after <= 4 * outputs + 4 * inputs


def test_only_the_input_and_its_projection_are_saved() -> None:
    layer = adapted("lora", 64, 96, 4)
    layer.__class__ = type("L", (LowPrecision, type(layer)), {})
    x = noise(1, 50, 64).to(HALF).requires_grad_()
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(x)
    sizes = sorted(t.shape for t in saved if t.numel() > 50)
    assert [s for s in sizes if s[-2:] == (50, 96)] == [], "nothing of the size of the output"
    assert (1, 50, 4) in sizes and (1, 50, 64) in sizes


# --- with other parts -------------------------------------------------------------------------------------


def test_joint_alpha_updates_the_second_half_alone() -> None:
    layer = adapted("lora", 48, 40, 4)
    layer.__class__ = type("L", (LowPrecision, type(layer)), {})
    x = noise(2, 6 + 2 * 10, 48, seed=5).to(HALF)
    whole, base = layer(x), layer.base_layer(x)
    layer.__class__ = half_tokens_class(type(layer), 6)
    out = layer(x)
    assert torch.equal(out[:, :16], base[:, :16])
    assert torch.equal(out[:, 16:], whole[:, 16:])
    layer._disable_adapters = True
    assert torch.equal(layer(x), base)


@pytest.mark.parametrize("dtype", [HALF, torch.float32])
@pytest.mark.parametrize("precision", ["base", "float32"])
def test_the_key_selects_the_layers(tiny_wan: Path, dtype: torch.dtype, precision: str) -> None:
    denoiser = Wan(config.Model(family="wan", checkpoint=str(tiny_wan))).load_denoiser(dtype)
    section = config.LowRank(rank=4, precision=precision)  # type: ignore[arg-type]
    tuners.attach(section, Wan.targets, denoiser, seed=1)
    layer = denoiser.get_submodule("blocks.0.attn1.to_q")
    assert isinstance(layer, LowPrecision) == (dtype is HALF and precision == "base")
    first = layer.get_submodule("lora_A.default")
    assert type(first).__name__ == ("FirstFactor" if dtype is HALF and precision == "float32" else "Linear")


def test_dropout_is_applied_to_the_input_of_the_update(tiny_wan: Path) -> None:
    denoiser = Wan(config.Model(family="wan", checkpoint=str(tiny_wan))).load_denoiser(HALF)
    tuners.attach(config.LowRank(rank=4, dropout=0.5), Wan.targets, denoiser, seed=1)
    assert not any(isinstance(m, LowPrecision) for m in denoiser.modules())


def test_one_graph_when_compiled() -> None:
    layer = adapted("dora", 32, 32, 4)
    use_low_precision(layer)
    x = noise(1, 8, 32).to(HALF)
    explained = torch._dynamo.explain(layer)(x)
    assert explained.graph_break_count == 0
