"""LoKr and LoHa: the same numbers as peft's, and files that reload into whatever can take them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import WanPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from inlaid import config
from inlaid.adapters import lycoris, tuners
from inlaid.adapters.adapter import WEIGHTS
from inlaid.adapters.of_run import load_into_pipeline
from inlaid.families.wan import Wan
from inlaid.generation.generate import generate
from inlaid.runs.folder import read_header
from inlaid.training.loop import train
from support.commands import inlaid
from support.slow import slow

KINDS = ["lokr", "loha"]
FILE = "adapter/pytorch_lora_weights.safetensors"


def wan(folder: Path) -> Wan:
    return Wan(config.Model(family="wan", checkpoint=str(folder)))


def scrambled(
    folder: Path, kind: str, **section: object
) -> tuple[torch.nn.Module, dict[str, torch.nn.Parameter]]:
    denoiser = wan(folder).load_denoiser(torch.float32)
    chosen = config.LowRank(kind=kind, **{"rank": 2, **section})  # type: ignore[arg-type]
    trained = tuners.attach(chosen, Wan.targets, denoiser, seed=1)
    generator = torch.Generator().manual_seed(2)
    for p in trained.values():
        p.data += 0.3 * torch.randn(p.shape, generator=generator)
    return denoiser, trained


def predict(denoiser: torch.nn.Module) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    x, text = torch.randn(2, 16, 3, 4, 4, generator=generator), torch.randn(2, 64, 32, generator=generator)
    return denoiser(x, torch.tensor([900.0, 100.0]), text, return_dict=False)[0]


@pytest.mark.parametrize("rank", [2, 16])
@pytest.mark.parametrize("kind", KINDS)
def test_factored_layers_equal_peft(
    tiny_wan: Path, monkeypatch: pytest.MonkeyPatch, kind: str, rank: int
) -> None:
    """Rank 16 is so high for these layers that LoKr's second factor is whole."""
    ours, our_weights = scrambled(tiny_wan, kind, rank=rank, alpha=3.0)
    monkeypatch.setattr(lycoris, "factor", lambda denoiser, name: None)
    peft, peft_weights = scrambled(tiny_wan, kind, rank=rank, alpha=3.0)
    names = {type(m).__name__ for m in ours.modules()} - {type(m).__name__ for m in peft.modules()}
    assert names == {{"lokr": "FactoredLoKr", "loha": "FactoredLoHa"}[kind]}
    a, b = predict(ours), predict(peft)
    assert torch.allclose(a, b, atol=1e-5 * b.abs().max().item())
    a.square().mean().backward()
    b.square().mean().backward()
    for name, p in our_weights.items():
        assert p.grad is not None and p.grad.norm() > 0, name
        assert (p.grad - peft_weights[name].grad).norm() < 1e-4 * p.grad.norm(), name


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_trained_reloads(tiny_wan: Path, tmp_path: Path, kind: str) -> None:
    denoiser, _ = scrambled(tiny_wan, kind, alpha=3.0)
    wanted, base = predict(denoiser), predict(wan(tiny_wan).load_denoiser(torch.float32))
    assert (wanted - base).abs().max() > 0.01
    section = config.LowRank(kind=kind, rank=2, alpha=3.0)  # type: ignore[arg-type]
    tuners.save(section, denoiser, tuners.weights(section, denoiser), tmp_path, metadata={"about": "x"})
    limit = 1e-5 * wanted.abs().max()
    pipe = WanPipeline.from_pretrained(tiny_wan)
    load_into_pipeline(wan(tiny_wan), pipe, tmp_path)
    assert pipe.get_list_adapters() == {"transformer": ["inlaid"]}
    assert (predict(pipe.transformer) - wanted).abs().max() <= limit
    pipe.set_adapters(["inlaid"], [0.5])
    assert limit < (predict(pipe.transformer) - wanted).abs().max() < (base - wanted).abs().max()
    pipe.unload_lora_weights()
    assert torch.equal(predict(pipe.transformer), base)
    if kind == "lokr":  # diffusers itself
        pipe.transformer.load_lora_adapter(tmp_path, prefix="transformer", use_safetensors=True)
        assert (predict(pipe.transformer) - wanted).abs().max() <= limit
    merged = wan(tiny_wan).load_denoiser(torch.float32)
    lycoris.merge(merged, tmp_path)
    assert (predict(merged) - wanted).abs().max() <= limit
    assert {n for n, _ in merged.named_parameters()} == {
        n for n, _ in wan(tiny_wan).load_denoiser(torch.float32, meta=True).named_parameters()
    }


@pytest.mark.parametrize("kind", map(slow, KINDS))
def test_the_whole_way(recipe: Callable[..., dict], tmp_path: Path, kind: str) -> None:
    """Train, go on, draw at two strengths, evaluate, look into, and export."""
    raw = recipe(tuner={"kind": kind, "rank": 4}, optim__lr=3e-2)
    whole = train(config.build({**raw, "run": str(tmp_path / "whole")}))
    train(config.build(raw, ["train.steps=4"]))
    folder = train(config.build(raw))
    a, b = load_file(whole / FILE), load_file(folder / FILE)
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    with safe_open(folder / FILE, "pt") as file:
        assert file.metadata()["inlaid_step"] == "6"
    videos = [
        generate(folder, ["clip number 1"], strength=s, out=tmp_path / str(s))[0] for s in (0.0, 0.5, 1.0)
    ]
    assert len({v.read_bytes() for v in videos}) == 3
    assert inlaid("evaluate", folder).code == 0
    seen = inlaid("inspect", folder)
    assert {"lokr": "LoKr", "loha": "LoHa"}[kind] in seen.output and "rank 4" in seen.output
    assert kind in (folder / "adapter/README.md").read_text("utf-8")
    assert inlaid("export", folder, "--to", "merged").code == 0
    family = wan(Path(raw["model"]["checkpoint"]))
    merged = family.load_denoiser(torch.float32, folder=folder / "export/merged")
    tuned = family.load_denoiser(torch.float32)
    lycoris.load(tuned, folder / "adapter")
    assert torch.allclose(predict(merged), predict(tuned), atol=1e-5)
    assert inlaid("export", folder, "--to", "diffusers").code == 0
    for to in ("comfyui", "kohya"):
        assert inlaid("export", folder, "--to", to).code == 0
    refused = inlaid("export", folder, "--to", "diffsynth")
    assert refused.code == 2 and "(it ignores them): add --merge to export the whole model" in refused.output


def test_files_that_do_not_fit_are_refused(tiny_wan: Path, tmp_path: Path) -> None:
    denoiser, _ = scrambled(tiny_wan, "lokr")
    section = config.LowRank(kind="lokr", rank=2)
    tuners.save(section, denoiser, tuners.weights(section, denoiser), tmp_path, metadata={})
    file = tmp_path / WEIGHTS
    tensors, header = load_file(file), read_header(file)

    def refuse(change: Callable[[dict], dict], message: str, **metadata: str) -> None:
        save_file(change(dict(tensors)), file, {**header, **metadata})
        with pytest.raises(ValueError, match=message):
            lycoris.load(wan(tiny_wan).load_denoiser(torch.float32, meta=True), tmp_path)

    first = next(iter(tensors))
    refuse(lambda t: {k: v for k, v in t.items() if k != first}, "1 tensors do not fit")
    refuse(lambda t: {**t, first: torch.cat([t[first], t[first]])}, "1 tensors do not fit")
    refuse(lambda t: {**t, first: t[first] * float("nan")}, "contain NaN or infinity")
    other = {"lora_adapter_metadata": header["lora_adapter_metadata"].replace("blocks.0", "layers.0")}
    refuse(
        lambda t: {k.replace("blocks.0", "layers.0"): v for k, v in t.items()},
        "trained on another network",
        **other,
    )
    refuse(lambda t: t, "without peft's configuration", lora_adapter_metadata="{}")
