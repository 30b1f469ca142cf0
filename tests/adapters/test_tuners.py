"""Tuners: what trains is what was asked for, and the stock pipeline loads exactly what was trained."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import WanPipeline
from peft import get_peft_model_state_dict
from peft.tuners.lora.dora import DoraLinearLayer
from safetensors.torch import load_file

from inlaid import config
from inlaid.adapters import tuners
from inlaid.adapters.efficient_layers import _Product, _Rescaled, row_norm
from inlaid.families.wan import Wan
from inlaid.training.optim import swapped
from support.slow import slow


def wan(folder: Path) -> Wan:
    return Wan(config.Model(family="wan", checkpoint=str(folder)))


def scrambled(
    folder: Path, section: config.LowRank, dtype: torch.dtype = torch.float32
) -> tuple[torch.nn.Module, dict[str, torch.nn.Parameter]]:
    """A denoiser whose adapter is far from its start."""
    denoiser = wan(folder).load_denoiser(dtype)
    trained = tuners.attach(section, Wan.targets, denoiser, seed=1)
    generator = torch.Generator().manual_seed(2)
    for name, p in trained.items():
        p.data += 0.3 * torch.randn(p.shape, generator=generator) * (p.data.std() if "vector" in name else 1)
    return denoiser, trained


def predict(denoiser: torch.nn.Module) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    x, text = torch.randn(2, 16, 3, 4, 4, generator=generator), torch.randn(2, 512, 32, generator=generator)
    dtype: torch.dtype = denoiser.dtype  # type: ignore[assignment]
    return denoiser(x.to(dtype), torch.tensor([900.0, 100.0]), text.to(dtype), return_dict=False)[0]


@pytest.mark.parametrize(
    ("alpha", "kind"), [slow(None, "lora"), (None, "dora"), (7.0, "lora"), slow(7.0, "dora")]
)
def test_stock_pipeline_loads_what_was_trained(
    tiny_wan: Path, tmp_path: Path, kind: str, alpha: float | None
) -> None:
    section = config.LowRank(kind=kind, rank=4, alpha=alpha)  # type: ignore[arg-type]
    denoiser, _ = scrambled(tiny_wan, section)
    base = predict(wan(tiny_wan).load_denoiser(torch.float32))
    wanted = predict(denoiser)
    tuners.save(section, denoiser, tuners.weights(section, denoiser), tmp_path, metadata={})
    pipe = WanPipeline.from_pretrained(tiny_wan)
    pipe.load_lora_weights(tmp_path)
    loaded = predict(pipe.transformer)
    assert (wanted - base).abs().max() > 0.01
    assert (loaded - wanted).abs().max() < (1e-6 if kind == "lora" else 1e-5) * wanted.abs().max()
    saved = {k.removeprefix("transformer.") for k in load_file(tmp_path / "pytorch_lora_weights.safetensors")}
    assert saved == set(get_peft_model_state_dict(denoiser))


def test_full_fine_tune_loads_through_from_pretrained(tiny_wan: Path, tmp_path: Path) -> None:
    denoiser = wan(tiny_wan).load_denoiser(torch.float32)
    trained = tuners.attach(config.Full(), (), denoiser, seed=0)
    assert sum(p.numel() for p in trained.values()) == sum(p.numel() for p in denoiser.parameters())
    averaged = {n: p.detach() * 1.01 for n, p in trained.items()}
    with swapped(trained, averaged):
        weights = tuners.weights(config.Full(), denoiser)
        tuners.save(config.Full(), denoiser, weights, tmp_path, metadata={})
    loaded = wan(tiny_wan).load_denoiser(torch.float32, folder=tmp_path)
    assert all(torch.equal(p, averaged[n]) for n, p in loaded.named_parameters())


def test_full_with_targets_trains_only_those(tiny_wan: Path) -> None:
    denoiser = wan(tiny_wan).load_denoiser(torch.float32)
    trained = tuners.attach(config.Full(targets=[r"blocks\.1\..*"]), (), denoiser, seed=0)
    assert trained and all(n.startswith("blocks.1.") for n in trained)


def test_row_norm_from_factors() -> None:
    generator = torch.Generator().manual_seed(0)
    w, a, b = (torch.randn(s, generator=generator) for s in ((30, 20), (4, 20), (30, 4)))
    assert torch.allclose(row_norm(w, a, b, 0.7), (w + 0.7 * b @ a).norm(dim=1), rtol=1e-5)
    assert torch.allclose(row_norm(w, a, b * 0, 0.7), w.norm(dim=1), rtol=1e-6)


def test_factored_dora_equals_peft(tiny_wan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    section = config.LowRank(kind="dora", rank=4)
    ours, our_weights = scrambled(tiny_wan, section)
    monkeypatch.setattr(tuners, "use_factor_norms", lambda denoiser: None)
    peft, peft_weights = scrambled(tiny_wan, section)
    kinds = [{type(m).__name__ for m in d.modules() if isinstance(m, DoraLinearLayer)} for d in (ours, peft)]
    assert kinds == [{"FactoredDora"}, {"DoraLinearLayer"}]
    a, b = predict(ours), predict(peft)
    assert torch.allclose(a, b, atol=1e-5 * b.abs().max().item())
    a.square().mean().backward()
    b.square().mean().backward()
    for name, p in our_weights.items():
        assert p.grad is not None and p.grad.norm() > 0
        assert (p.grad - peft_weights[name].grad).norm() < 1e-4 * p.grad.norm(), name


def test_gradients_that_are_written_by_hand() -> None:
    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=torch.float64, requires_grad=True)

    torch.manual_seed(0)
    y, h, b, m, x, a = draw(2, 3, 5), draw(2, 3, 4), draw(5, 4), draw(5), draw(2, 3, 6), draw(4, 6)
    assert torch.autograd.gradcheck(_Rescaled.apply, (y, h, b, m, 0.7))
    assert torch.autograd.gradcheck(_Product.apply, (x, a))
    whole = m * (y + 0.7 * h @ b.T) - y
    assert torch.allclose(_Rescaled.apply(y, h, b, m, 0.7), whole)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("dtype", "kind"),
    [
        *[slow(torch.bfloat16, "lora"), (torch.bfloat16, "dora")],
        *[(torch.float32, "lora"), slow(torch.float32, "dora")],
    ],
)
def test_inputs_that_are_kept_as_they_come_change_no_bit(
    kind: str, dtype: torch.dtype, tiny_wan: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    section = config.LowRank(kind=kind, rank=4, precision="float32")  # type: ignore[arg-type]
    ours, our_weights = scrambled(tiny_wan, section, dtype)
    monkeypatch.setattr(tuners, "keep_inputs", lambda denoiser: None)
    peft, peft_weights = scrambled(tiny_wan, section, dtype)
    kinds = [{type(d.get_submodule("blocks.0.attn1.to_q").lora_A["default"]).__name__} for d in (ours, peft)]
    assert kinds == [{"FirstFactor" if dtype is torch.bfloat16 else "Linear"}, {"Linear"}]
    kept = []
    for network in (ours, peft):
        saved: list[torch.Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):  # noqa: B023
            out = predict(network)
        out.float().square().mean().backward()
        sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in saved}
        kept.append((out, sum(sizes.values())))
    assert torch.equal(kept[0][0], kept[1][0])
    assert all(torch.equal(p.grad, peft_weights[n].grad) for n, p in our_weights.items())  # type: ignore[arg-type]
    assert (kept[0][1] < 0.95 * kept[1][1]) == (dtype is torch.bfloat16), "smaller where there were copies"


def test_dora_starts_as_the_identity(tiny_wan: Path) -> None:
    denoiser = wan(tiny_wan).load_denoiser(torch.float32)
    before = predict(denoiser)
    tuners.attach(config.LowRank(kind="dora", rank=4), Wan.targets, denoiser, seed=0)
    assert torch.allclose(predict(denoiser), before, atol=1e-5 * before.abs().max().item())


def test_start_is_a_function_of_the_seed(tiny_wan: Path) -> None:
    def factors(seed: int) -> torch.Tensor:
        trained = tuners.attach(
            config.LowRank(rank=2), Wan.targets, wan(tiny_wan).load_denoiser(torch.float32), seed=seed
        )
        return torch.cat([p.detach().flatten() for p in trained.values()])

    assert torch.equal(factors(5), factors(5))
    assert not torch.equal(factors(5), factors(6))


def test_attaching_leaves_the_random_state_alone(tiny_wan: Path) -> None:
    denoiser, state = wan(tiny_wan).load_denoiser(torch.float32), torch.get_rng_state()
    tuners.attach(config.LowRank(rank=2), Wan.targets, denoiser, seed=0)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (["proj_in"], r"`proj_in` matches no layer; an existing name is a\.to_q"),
        (["to_q"], r"`to_q` matches no layer, but `\.\*to_q` would match 2, such as a\.to_q"),
        (["("], r"`\(` is not a regular expression"),
        (["nothing", "nowhere"], r"`nothing` matches no layer.*; `nowhere` matches no layer"),
    ],
)
def test_patterns_that_match_nothing_are_named(patterns: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tuners.match(patterns, ["a.to_q", "b.to_q", "b.to_k"], what="layer")
    assert tuners.match([r".*\.to_q", r"b\..*"], ["a.to_q", "b.to_q", "b.to_k"], what="layer") == [
        "a.to_q",
        "b.to_q",
        "b.to_k",
    ]
