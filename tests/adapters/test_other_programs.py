"""Exports for other programs, read by stand-ins of their own loaders: equal weights, and no unused key."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from inlaid import config, families
from inlaid.adapters import lycoris, tuners
from inlaid.adapters.layers import layer_shapes
from inlaid.adapters.merge import merge_adapter
from inlaid.adapters.original_layers import folded
from inlaid.adapters.read import read_adapter
from inlaid.adapters.write import export_adapter, write_diffusers
from inlaid.tiny import random
from support.clients import adapters as clients
from support.slow import slow

EVERYTHING = {
    "wan": (
        r"blocks\.\d+\.(attn1|attn2)\.(to_q|to_k|to_v|to_out\.0)",
        r"blocks\.\d+\.ffn\.net\.(0\.proj|2)",
        r"condition_embedder\.t\w+\.linear_1",
        "proj_out",
    ),
    "mochi": (
        r"transformer_blocks\.\d+\.attn1\.(to_[qkv]|to_out\.0|add_[qv]_proj|to_add_out)",
        r"transformer_blocks\.\d+\.ff(_context)?\.net\.(0\.proj|2)",
        r"transformer_blocks\.\d+\.norm1(_context)?\.linear(_1)?",
        "norm_out\\.linear",
        "time_embed\\.caption_proj",
    ),
    "cogvideox": (
        r"transformer_blocks\.\d+\.(attn1\.(to_[qkv]|to_out\.0)|ff\.net\.(0\.proj|2)|norm[12]\.linear)",
        "time_embedding\\.linear_1",
        "patch_embed\\.text_proj",
        "proj_out",
    ),
}
"""Layers of all kinds; of Mochi's text stream the key is not trained, so that a fused layer has a gap."""

ATTENTION = {"mochi": (r"transformer_blocks\.\d+\.attn1\.(to_[qv]|to_out\.0|add_[qk]_proj|to_add_out)",)}


@pytest.fixture(scope="module", params=["wan", "mochi", "cogvideox"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return opened(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return opened("wan", tmp_path_factory.mktemp("wan-i2v"), "i2v")


@pytest.fixture(scope="module")
def mochi(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return opened("mochi", tmp_path_factory.mktemp("mochi"))


def opened(family: str, folder: Path, variant: str | None = None) -> Any:
    random.build(family, folder / "model", variant)
    chosen = random.model(family, variant) if variant else {"family": family}
    return families.get(family)(config.Model(checkpoint=str(folder / "model"), **chosen))


def network(family: Any) -> Any:
    return family.load_denoiser(torch.float32)


def scramble(denoiser: nn.Module) -> None:
    """Random adapter values; magnitudes 0.8 to 1.2 of the norms that they start from."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, p in denoiser.named_parameters():
            if "lora_magnitude" in name:
                p.mul_(0.8 + 0.4 * torch.rand(p.shape, generator=generator))
            elif any(mark in name for mark in ("lora_", "lokr_", "hada_")):
                p.copy_(torch.randn(p.shape, generator=generator) * 0.2)


def trained(family: Any, folder: Path, targets: Any, *, dora: bool = False, bias: bool = False):
    """A LoRA or DoRA with alpha 7, rank 3, and rank 2 in one layer; its merged network."""
    from peft import LoraConfig, get_peft_model_state_dict

    denoiser = network(family)
    names = [n for n, m in denoiser.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d, nn.Conv3d))]
    chosen = tuners.match(targets, names, what="layer")
    less = {re.escape(n): 2 for n in chosen if n.endswith("blocks.1.attn1.to_v")}
    made = LoraConfig(
        r=3, lora_alpha=7, use_dora=dora, lora_bias=bias, target_modules=chosen, rank_pattern=less
    )
    denoiser.add_adapter(made)
    scramble(denoiser)
    tensors, peft = get_peft_model_state_dict(denoiser), denoiser.peft_config["default"].to_dict()
    write_diffusers(folder, {k: t.detach().clone() for k, t in tensors.items()}, peft)
    merged = network(family)
    adapter = read_adapter(folder, family, shapes=layer_shapes(merged))
    merge_adapter(merged, adapter)
    return adapter, merged.state_dict()


def states(family: Any, merged: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Base and merged weights under the names of the original code."""
    return tuple(family.original.to_original(s) for s in (network(family).state_dict(), merged))  # type: ignore[return-value]


def same(new: dict[str, Tensor], wanted: dict[str, Tensor], base: dict[str, Tensor]) -> float:
    """All tensors are equal, exactly the intended ones changed; the largest difference of all."""
    assert new.keys() == wanted.keys()
    change = max((wanted[k] - base[k]).abs().max().item() for k in wanted)
    worst = max((new[k] - wanted[k]).abs().max().item() for k in wanted)
    assert change > 0.05 and worst <= 1e-5 * change, (worst, change)
    assert {k for k in new if not torch.equal(new[k], base[k])} == {
        k for k in wanted if not torch.equal(wanted[k], base[k])
    }
    return worst


@pytest.mark.parametrize(
    ("model", "kind"),
    [
        *[slow("wan", "lora"), ("wan", "dora"), ("wan", "bias")],
        *[("mochi", "lora"), ("mochi", "dora"), slow("mochi", "bias")],
        *[("cogvideox", "lora"), slow("cogvideox", "dora"), slow("cogvideox", "bias")],
    ],
    indirect=["model"],
)
def test_comfyui(model: Any, kind: str, tmp_path: Path) -> None:
    name = type(model).__name__.lower()
    targets = EVERYTHING[name] if kind != "bias" else (EVERYTHING[name][0].replace("|add_[qv]_proj", ""),)
    if kind == "bias" and name == "mochi":  # query, key and value have no bias
        targets = (r"transformer_blocks\.\d+\.(attn1\.to_(out\.0|add_out)|norm1\.linear)",)
    adapter, merged = trained(model, tmp_path, targets, dora=kind == "dora", bias=kind == "bias")
    base, wanted = states(model, merged)
    path = export_adapter(adapter, "comfyui", tmp_path / "c.safetensors", family=model, base=network(model))
    file = load_file(path)
    new, unused = clients.comfy(base, file, name)
    assert unused == []
    same(new, wanted, base)
    assert all(t.dtype == torch.float32 and t.numel() == 1 for k, t in file.items() if k.endswith(".alpha"))
    assert all(t.ndim == 2 for k, t in file.items() if ".lora_" in k)
    without = {k: t for k, t in file.items() if not k.endswith(".alpha")}
    assert clients.comfy(base, without, name)[0].keys() == new.keys()
    same(clients.comfy(base, without, name)[0], wanted, base)  # a program that ignores alpha is right too


@pytest.mark.parametrize("dora", [slow(False), True], ids=["lora", "dora"])
def test_a_convolution_for_comfyui(model: Any, dora: bool, tmp_path: Path) -> None:
    conv = {"Wan": "patch_embedding"}.get(type(model).__name__, r"patch_embed\.proj")
    adapter, merged = trained(model, tmp_path, [conv, ".*attn1.to_q"], dora=dora)
    base, wanted = states(model, merged)
    path = export_adapter(adapter, "comfyui", tmp_path / "c.safetensors", family=model, base=network(model))
    new, unused = clients.comfy(base, load_file(path), type(model).__name__.lower())
    assert unused == []
    same(new, wanted, base)


LYCORIS = [(rank, kind) for rank in (1, 40) for kind in ("lokr", "loha")]
SOME = [("wan", 1, "lokr"), ("mochi", 1, "loha"), ("cogvideox", 40, "lokr"), ("wan", 40, "loha")]


@pytest.mark.parametrize(
    ("model", "rank", "kind"),
    [(m, *c) if (m, *c) in SOME else slow(m, *c) for m in EVERYTHING for c in LYCORIS],
    indirect=["model"],
    ids=lambda x: {1: "decomposed", 40: "full"}.get(x, x),
)
def test_lokr_and_loha_for_comfyui(model: Any, kind: str, rank: int, tmp_path: Path) -> None:
    name = type(model).__name__.lower()
    merged, folder = lycoris_run(model, kind, rank, EVERYTHING[name], tmp_path)
    base, wanted = states(model, merged)
    path = lycoris.export(folder, "comfyui", tmp_path / "c.safetensors", model.original)
    new, unused = clients.comfy(base, load_file(path), name)
    assert unused == []
    same(new, wanted, base)


def lycoris_run(family: Any, kind: str, rank: int, targets: Any, folder: Path):
    section = config.LowRank(kind=kind, rank=rank, alpha=7, targets=list(targets))  # type: ignore[arg-type]
    denoiser = network(family)
    tuners.attach(section, family.targets, denoiser, seed=0)
    scramble(denoiser)
    tuners.save(section, denoiser, tuners.weights(section, denoiser), folder / "adapter", metadata={})
    merged = network(family)
    lycoris.merge(merged, folder / "adapter")
    return merged.state_dict(), folder / "adapter"


@pytest.mark.parametrize("image", [False, True], ids=["text", "image"])
def test_musubi(wan: Any, image: bool, tmp_path: Path) -> None:
    targets = [r"blocks\.1\.attn1\.to_q", "proj_out", *([r"blocks\.0\.attn2\.add_k_proj"] if image else [])]
    adapter, merged = trained(wan, tmp_path, targets)
    base, wanted = states(wan, merged)
    file = load_file(
        export_adapter(adapter, "musubi", tmp_path / "m.safetensors", family=wan, base=network(wan))
    )
    new, unused = clients.musubi(base, file)
    assert unused == []
    same(new, wanted, base)
    per_block = {k.split(".")[0] for k in file if k.startswith("lora_unet_blocks_0_")}
    assert len(per_block) == (12 if image else 10), "untrained layers are in the file, as zeros"


@pytest.mark.parametrize(
    ("rank", "kind"),
    [c if ("wan", *c) in SOME else slow(*c) for c in LYCORIS],
    ids=lambda x: {1: "decomposed", 40: "full"}.get(x, x),
)
def test_lokr_and_loha_for_musubi(wan: Any, kind: str, rank: int, tmp_path: Path) -> None:
    merged, folder = lycoris_run(wan, kind, rank, EVERYTHING["wan"], tmp_path)
    base, wanted = states(wan, merged)
    file = load_file(lycoris.export(folder, "musubi", tmp_path / "c.safetensors", wan.original))
    new, unused = clients.musubi(base, file)
    assert unused == []
    same(new, wanted, base)
    same(clients.comfy(base, file)[0], wanted, base)  # whose rule for the scale differs


def test_diffsynth_lightx2v_and_kijai(wan: Any, tmp_path: Path) -> None:
    adapter, merged = trained(wan, tmp_path, EVERYTHING["wan"])
    base, wanted = states(wan, merged)
    one, two = (
        load_file(export_adapter(adapter, to, tmp_path / f"{to}.safetensors", family=wan))
        for to in ("diffsynth", "comfyui")
    )
    assert one.keys() == two.keys()
    for program in (clients.diffsynth, clients.kijai_wan):
        new, unused = program(base, one)
        assert unused == []
        same(new, wanted, base)
    new, unused = clients.lightx2v(base, two)
    assert all(k.endswith(".alpha") for k in unused)
    same(new, wanted, base)


@pytest.mark.parametrize("dora", [slow(False), True], ids=["lora", "dora"])
def test_wan_alpha(dora: bool, tmp_path: Path) -> None:
    wan = opened("wan", tmp_path)
    adapter, merged = trained(wan, tmp_path / "a", EVERYTHING["wan"][:2], dora=dora)
    base, wanted = states(wan, merged)
    out = tmp_path / "w.safetensors"
    path = export_adapter(adapter, "wan-alpha", out, family=wan, base=network(wan))
    new, unused = clients.load_dora(base, load_file(path))
    assert unused == []
    same(new, wanted, base)
    again = read_adapter(path, wan)
    assert again.dora and len(again.modules) == len(adapter.modules)


def test_genmo(mochi: Any, tmp_path: Path) -> None:
    adapter, merged = trained(mochi, tmp_path, ATTENTION["mochi"])
    base, wanted = states(mochi, merged)
    path = export_adapter(adapter, "genmo", tmp_path / "g.safetensors", family=mochi)
    with safe_open(path, "pt") as file:
        header = file.metadata()
    new, unused = clients.genmo(base, load_file(path), header)
    assert unused == []
    same(new, wanted, base)
    assert json.loads(header["kwargs"])["qkv_proj_lora_rank"] == 6
    with pytest.raises(ValueError, match=r"layers outside attention \(blocks.0.mod_x"):
        other, _ = trained(mochi, tmp_path / "o", [r"transformer_blocks\.\d+\.norm1\.linear"])
        export_adapter(other, "genmo", tmp_path / "h.safetensors", family=mochi)


# --- joint alpha --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "rule"), [("cogvideox", "bias"), ("mochi", "block")])
def test_transpixeler(family: str, rule: str, tmp_path: Path) -> None:
    from dataclasses import replace

    model = opened(family, tmp_path)
    layers = r"transformer_blocks\.1\.attn1\.(to_[qkv]|to_out\.0)"
    adapter, _ = trained(model, tmp_path / "a", [layers])
    vector = torch.arange(32.0) if family == "cogvideox" else None
    about = {"inlaid_alpha": "joint", "inlaid_text_to_alpha": rule}
    adapter = replace(adapter, header=about, vector=vector)
    suffix = ".pt" if family == "mochi" else ".safetensors"
    path = export_adapter(adapter, "transpixeler", tmp_path / f"t{suffix}", family=model, base=network(model))
    file = torch.load(path, weights_only=True)["state_dict"] if family == "mochi" else load_file(path)
    updates, found, unused = clients.transpixeler(family, 2, file)
    assert unused == [] and len(updates) == 8
    assert (found is None) == (vector is None) and (found is None or torch.equal(found.flatten(), vector))
    alike = folded(adapter)
    for name, update in updates.items():
        block, layer = name.split(".")
        module = f"transformer_blocks.{block}.attn1.{layer}{'.0' if layer == 'to_out' else ''}"
        if module not in alike.alpha:
            assert not update.any(), "a layer that was not trained is zero"
            continue
        a, b = (alike.tensors[f"{module}.lora_{x}.weight"] for x in "AB")
        torch.testing.assert_close(update, b @ a, rtol=1e-5, atol=1e-6)
    again = read_adapter(path, model)
    assert again.joint and again.header["inlaid_text_to_alpha"] == rule
    wrong = replace(adapter, header={**about, "inlaid_text_to_alpha": "open"})
    with pytest.raises(ValueError, match=rf"text_to_alpha: open; it applies `{rule}`"):
        export_adapter(wrong, "transpixeler", tmp_path / f"u{suffix}", family=model, base=network(model))
    if family == "mochi":
        with pytest.raises(ValueError, match=r"domain embedding; train with alpha.domain_embedding: false"):
            wrong = replace(adapter, vector=torch.ones(64))
            export_adapter(wrong, "transpixeler", tmp_path / "v.pt", family=model, base=network(model))


# --- MIDI-3D ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dora", [slow(False), True])
@pytest.mark.parametrize("file", [slow("lora_weights.safetensors"), "lora_weights.pth"])
def test_midi_3d(dora: bool, file: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Its loader creates an adapter `default` first, and then loads the state dict without strictness."""
    from peft import LoraConfig, inject_adapter_in_model

    model = opened("midi", tmp_path)
    adapter, merged = trained(model, tmp_path / "a", model.targets, dora=dora)
    said: list[str] = []
    path = export_adapter(adapter, "midi-3d", tmp_path / "midi", family=model, notes=said.append)
    assert "r=3, lora_alpha=3" in said[0] and ("use_dora=True" in said[0]) == dora
    denoiser = network(model)
    settings = LoraConfig(r=3, lora_alpha=3, use_dora=dora, target_modules=adapter.modules)
    inject_adapter_in_model(settings, denoiser, "default")
    before = {k: t.clone() for k, t in denoiser.state_dict().items() if "lora_" in k}
    tensors = load_file(path / file) if file.endswith("s") else torch.load(path / file, weights_only=True)
    state = {k.removeprefix("transformer."): t for k, t in tensors.items()}
    assert state.keys() == before.keys()
    denoiser.load_state_dict(state, strict=False)
    for module in adapter.modules:
        layer: Any = denoiser.get_submodule(module)
        layer.merge()
        wanted = merged[f"{module}.weight"]
        torch.testing.assert_close(layer.base_layer.weight, wanted, rtol=1e-5, atol=1e-5)
