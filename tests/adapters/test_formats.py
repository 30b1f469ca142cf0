"""Adapter files: every layout that exists for Wan loads exactly, or is refused with one clear sentence."""

from __future__ import annotations

import copy
import json
import pickle
import re
import struct
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from inlaid import config as recipes
from inlaid import families
from inlaid.adapters import write
from inlaid.adapters.adapter import WEIGHTS, Adapter
from inlaid.adapters.inspect import describe, inspect_path
from inlaid.adapters.layers import layer_shapes
from inlaid.adapters.merge import attach_adapter, effective_delta, merge_adapter
from inlaid.adapters.model_card import model_card
from inlaid.adapters.read import read_adapter
from inlaid.adapters.write import Target, export_adapter, write_diffusers

WAN = families.get("wan")
LEAVES = {
    "attn1.to_q": "self_attn.q",
    "attn1.to_k": "self_attn.k",
    "attn1.to_v": "self_attn.v",
    "attn1.to_out.0": "self_attn.o",
    "attn2.to_q": "cross_attn.q",
    "attn2.to_k": "cross_attn.k",
    "attn2.to_v": "cross_attn.v",
    "attn2.to_out.0": "cross_attn.o",
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
}
ALL = [f"blocks.{i}.{leaf}" for i in range(2) for leaf in LEAVES]


@pytest.fixture(scope="module")
def base():
    """A random Wan transformer of two blocks."""
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=16,
        out_channels=16,
        text_dim=32,
        freq_dim=256,
        ffn_dim=32,
        num_layers=2,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    ).eval()


@torch.no_grad()
def run(model) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, 16, 3, 4, 4, generator=generator)
    text = torch.randn(1, 7, 32, generator=generator)
    return model(x, torch.tensor([500.0]), text, return_dict=False)[0]


def trained(base, *, rank=4, alpha=4, dora=False, modules=ALL, **options):
    """A network with a random adapter, as training leaves it; its tensors; its peft configuration."""
    from peft import LoraConfig, get_peft_model_state_dict

    model = copy.deepcopy(base)
    model.add_adapter(
        LoraConfig(r=rank, lora_alpha=alpha, use_dora=dora, target_modules=list(modules), **options)
    )
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".lora_magnitude" in name:
                p.mul_(0.5 + torch.rand(p.shape, generator=generator))
            elif ".lora_" in name:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.2)
    return model, get_peft_model_state_dict(model), model.peft_config["default"].to_dict()


def pipeline(transformer):
    from diffusers import WanPipeline

    return WanPipeline(tokenizer=None, text_encoder=None, vae=None, scheduler=None, transformer=transformer)


def original(module: str) -> str:
    leaf = next(x for x in LEAVES if module.endswith(f".{x}"))
    return module.removesuffix(leaf) + LEAVES[leaf]


def spell(tensors, layout: str, alpha: float | None = None) -> dict[str, torch.Tensor]:
    """The same adapter as other programs write it; written from their documentation, not from `formats`."""
    down_up = {"lora_A": "lora_down", "lora_B": "lora_up"}
    out = {}
    for key, tensor in tensors.items():
        module, kind = key.split(".lora_")[0], "lora_" + key.split(".lora_")[1]
        part, leaf = kind.split(".")[0], "" if "magnitude" in kind else ".weight"
        flat = "lora_unet_" + original(module).replace(".", "_")
        name, suffix = {
            "diffusers": (f"transformer.{module}", kind),
            "bare": (module, kind),
            "peft": (f"base_model.model.{module}", kind),
            "comfyui": (f"diffusion_model.{original(module)}", kind),
            "comfyui-down": (f"diffusion_model.{original(module)}", down_up.get(part, part) + leaf),
            "comfyui-model": (f"model.diffusion_model.{original(module)}", kind),
            "diffsynth": (original(module), f"{part}.default{leaf or '.weight'}"),
            "wan-alpha": (f"pipe.dit.{original(module)}", f"{part}.default{leaf}"),
            "parameter": (original(module), part),
            "kohya": (flat, down_up.get(part, part) + leaf),
            "kohya-diffusers": ("lora_unet_" + module.replace(".", "_"), down_up.get(part, part) + leaf),
        }[layout]
        out[f"{name}.{suffix}"] = tensor.clone()
        if alpha is not None:
            out[f"{name}.alpha"] = torch.tensor(float(alpha))
    return out


LAYOUTS = {
    "diffusers": "diffusers",
    "bare": "bare",
    "peft": "peft",
    "comfyui": "comfyui",
    "comfyui-down": "comfyui",
    "comfyui-model": "comfyui",
    "diffsynth": "original",
    "wan-alpha": "original",
    "parameter": "original",
    "kohya": "kohya",
    "kohya-diffusers": "kohya",
}


def check(adapter: Adapter, base, expected: torch.Tensor) -> None:
    """Attached by the stock loader and merged, the adapter does what it did in training."""
    model = copy.deepcopy(base)
    attach_adapter(model, adapter)
    assert torch.equal(run(model), expected)
    merged = copy.deepcopy(base)
    merge_adapter(merged, adapter)
    torch.testing.assert_close(run(merged), expected, atol=2e-6, rtol=0)


# --- layouts ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_loads_exactly(base, tmp_path: Path, layout: str, dora: bool):
    model, tensors, _ = trained(base, alpha=2, dora=dora)
    path = tmp_path / "adapter.safetensors"
    save_file(spell(tensors, layout), path)
    adapter = read_adapter(path, WAN, alpha=2, shapes=layer_shapes(base))
    assert (adapter.layout, adapter.dora, adapter.rank) == (
        LAYOUTS[layout],
        dora,
        dict.fromkeys(adapter.rank, 4),
    )
    assert sorted(adapter.modules) == sorted(ALL)
    check(adapter, base, run(model))


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "parameter"])
def test_alpha_of_each_layer_is_kept(base, tmp_path: Path, layout: str):
    model, tensors, _ = trained(base, rank=4, alpha=1)
    save_file(spell(tensors, layout, alpha=1), tmp_path / "a.safetensors")
    adapter = read_adapter(tmp_path / "a.safetensors", WAN)
    assert set(adapter.alpha.values()) == {1.0}
    assert ".alpha" in adapter.alpha_from
    check(adapter, base, run(model))


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_a_folder_of_peft(base, tmp_path: Path, dora: bool):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(
        copy.deepcopy(base), LoraConfig(r=3, lora_alpha=6, target_modules=ALL, use_dora=dora)
    )
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_()
    model.save_pretrained(tmp_path / "peft")
    adapter = read_adapter(tmp_path / "peft", WAN)
    assert (adapter.layout, set(adapter.alpha.values())) == ("peft", {6.0})
    assert adapter.alpha_from == "adapter_config.json"
    check(adapter, base, run(model.base_model.model.eval()))


def test_base_weights_in_the_file_are_left_out(base, tmp_path: Path):
    """A whole state dict of an injected network has them."""
    model, tensors, _ = trained(base)
    weights = {f"{m}.base_layer.weight": base.get_submodule(m).weight.detach() for m in ALL}
    save_file({**spell(tensors, "bare"), **weights}, tmp_path / "a.safetensors")
    adapter = read_adapter(tmp_path / "a.safetensors", WAN)
    assert adapter.notes[0] == "ignored 20 weights of the base model"
    check(adapter, base, run(model))


def test_names_that_only_the_network_knows(base, tmp_path: Path):
    """Recipes may target any layer; `shapes` says which there are."""
    layers = {**layer_shapes(base), "extra_proj": (24, 24)}
    for prefix in ("transformer.", "lora_unet_"):
        file = {
            f"{prefix}extra_proj.lora_A.weight": torch.ones(2, 24),
            f"{prefix}extra_proj.lora_B.weight": torch.ones(24, 2),
        }
        save_file(file, tmp_path / "a.safetensors")
        assert read_adapter(tmp_path / "a.safetensors", WAN, shapes=layers).modules == ["extra_proj"]
        with pytest.raises(ValueError, match="no tensor matches a layer of Wan"):
            read_adapter(tmp_path / "a.safetensors", WAN)


def test_pickled_tensors_are_read_safely(base, tmp_path: Path):
    model, tensors, _ = trained(base)
    torch.save({"state_dict": spell(tensors, "diffsynth"), "epoch": 3}, tmp_path / "a.pt")
    check(read_adapter(tmp_path, WAN), base, run(model))


@pytest.mark.parametrize(
    "modules",
    [
        [m for m in ALL if ".attn" in m],
        [m for m in ALL if ".attn1." in m],
        [m for m in ALL if m.startswith("blocks.1.")],
        ["blocks.1.ffn.net.2"],
    ],
    ids=["attention", "no cross-attention", "not from block 0", "one layer"],
)
def test_partial_sets_that_the_stock_converter_fails_on(base, tmp_path: Path, modules: list[str]):
    from diffusers import WanPipeline

    model, tensors, _ = trained(base, modules=modules)
    path = tmp_path / "a.safetensors"
    save_file(spell(tensors, "kohya", alpha=4), path)
    with pytest.raises(KeyError):
        WanPipeline.lora_state_dict(str(path))
    check(read_adapter(path, WAN, shapes=layer_shapes(base)), base, run(model))


def test_layers_outside_the_blocks(base, tmp_path: Path):
    modules = [*ALL, "proj_out", "condition_embedder.time_proj", "condition_embedder.text_embedder.linear_1"]
    model, tensors, config = trained(base, alpha=3, modules=modules)
    write_diffusers(tmp_path, tensors, config)
    adapter = read_adapter(tmp_path, WAN)
    check(adapter, base, run(model))
    path = export_adapter(adapter, "comfyui", tmp_path / "c.safetensors", family=WAN)
    assert "diffusion_model.head.head.lora_A.weight" in load_file(path)
    again = read_adapter(path, WAN)
    assert any("3 layers store no alpha" in note for note in again.notes)
    merged = copy.deepcopy(base)
    merge_adapter(merged, again)
    torch.testing.assert_close(run(merged), run(model), atol=2e-6, rtol=0)
    pipe = pipeline(copy.deepcopy(base))
    pipe.load_lora_weights(str(path))
    torch.testing.assert_close(run(pipe.transformer), run(model), atol=2e-6, rtol=0)


def test_a_convolution(base, tmp_path: Path):
    for dora in (False, True):
        model, tensors, config = trained(base, modules=["patch_embedding", *ALL[:2]], dora=dora)
        write_diffusers(tmp_path, tensors, config)
        check(read_adapter(tmp_path, WAN), base, run(model))


def test_biases_of_lightx2v(base, tmp_path: Path):
    """`diff_b` changes a bias; norms come with differences that are all zero."""
    model, tensors, _ = trained(base, alpha=2, lora_bias=True)
    factors = {k: v for k, v in tensors.items() if not k.endswith(".bias")}
    file = spell(factors, "comfyui-down", alpha=2)
    for key in tensors.keys() - factors.keys():
        name = f"diffusion_model.{original(key.split('.lora_')[0])}.diff_b"
        file[name] = tensors[key] * 2 / 4
    file["diffusion_model.blocks.0.norm3.diff"] = torch.zeros(24)
    file["diffusion_model.blocks.0.norm3.diff_b"] = torch.zeros(24)
    save_file(file, tmp_path / "a.safetensors")
    adapter = read_adapter(tmp_path / "a.safetensors", WAN)
    assert adapter.notes == ("ignored 2 weight differences that are all zero",)
    check(adapter, base, run(model))
    path = export_adapter(adapter, "comfyui", tmp_path / "c.safetensors", family=WAN)
    pipe = pipeline(copy.deepcopy(base))
    pipe.load_lora_weights(str(path))
    torch.testing.assert_close(run(pipe.transformer), run(model), atol=2e-6, rtol=0)


# --- alpha and ranks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_our_folder_loads_with_nothing_else(base, tmp_path: Path, dora: bool):
    model, tensors, config = trained(
        base,
        rank=4,
        alpha=9,
        dora=dora,
        rank_pattern={"blocks.1.attn1.to_q": 2, "ffn.net.2": 7},
        alpha_pattern={"blocks.0.attn2.to_v": 1, "ffn.net.2": 3.5},
    )
    path = write_diffusers(tmp_path / "adapter", tensors, config, {"inlaid_step": "7"})
    assert [p.name for p in (tmp_path / "adapter").iterdir()] == [WEIGHTS]
    assert path.name == WEIGHTS
    pipe = pipeline(copy.deepcopy(base))
    pipe.load_lora_weights(str(tmp_path / "adapter"))
    assert torch.equal(run(pipe.transformer), run(model))
    adapter = read_adapter(tmp_path / "adapter", WAN)
    assert adapter.rank["blocks.1.attn1.to_q"] == 2
    assert adapter.rank["blocks.0.attn1.to_q"] == 4
    assert adapter.alpha["blocks.1.ffn.net.2"] == 3.5
    assert adapter.alpha["blocks.0.attn2.to_v"] == 1
    assert adapter.header == {"inlaid_step": "7"}
    assert not adapter.notes
    check(adapter, base, run(model))
    export_adapter(adapter, "diffusers", tmp_path / "again", family=WAN)
    pipe = pipeline(copy.deepcopy(base))
    pipe.load_lora_weights(str(tmp_path / "again"))
    assert torch.equal(run(pipe.transformer), run(model))


def test_stock_files_and_rslora(base, tmp_path: Path):
    from diffusers import WanPipeline

    model, tensors, config = trained(base, rank=4, alpha=6, use_rslora=True)
    WanPipeline.save_lora_weights(tmp_path, tensors, transformer_lora_adapter_metadata=config)
    adapter = read_adapter(tmp_path, WAN)
    assert set(adapter.alpha.values()) == {12.0}
    check(adapter, base, run(model))


def test_missing_alpha_is_assumed_aloud(base, tmp_path: Path):
    _, tensors, _ = trained(base, rank=4, alpha=1)
    save_file(spell(tensors, "bare"), tmp_path / "a.safetensors")
    adapter = read_adapter(tmp_path / "a.safetensors", WAN)
    assert set(adapter.alpha.values()) == {4.0}
    assert "warning: the file stores no alpha; alpha = rank is assumed" in adapter.notes[0]
    assert "alpha = 1 (scale 1 / rank)" in adapter.notes[0]
    assert not read_adapter(tmp_path / "a.safetensors", WAN, alpha=1).notes


def test_a_wrong_alpha_is_not_ignored(base, tmp_path: Path):
    _, tensors, config = trained(base, alpha=8)
    write_diffusers(tmp_path, tensors, config)
    read_adapter(tmp_path, WAN, alpha=8)
    with pytest.raises(ValueError, match="alpha is 1, but the file stores alpha 8"):
        read_adapter(tmp_path, WAN, alpha=1)


def test_float_types_are_kept(base, tmp_path: Path):
    _, tensors, config = trained(base)
    for dtype in (torch.bfloat16, torch.float32):
        write_diffusers(tmp_path, {k: v.to(dtype) for k, v in tensors.items()}, config)
        assert {t.dtype for t in read_adapter(tmp_path, WAN).tensors.values()} == {dtype}


def test_shared_storage_and_nothing_half_written(base, tmp_path: Path):
    """Averaged weights may be views of one buffer."""
    _, tensors, config = trained(base)
    flat = torch.cat([t.flatten() for t in tensors.values()])
    views = {
        k: v.view(tensors[k].shape)
        for k, v in zip(tensors, flat.split([t.numel() for t in tensors.values()]), strict=True)
    }
    write_diffusers(tmp_path, views, config)
    with pytest.raises(ValueError, match="no tensors"):
        write_diffusers(tmp_path / "other", {}, config)
    with pytest.raises(ValueError, match="is no LoRA tensor"):
        write_diffusers(tmp_path, {**tensors, "domain_emb": torch.zeros(3)}, config)
    (tmp_path / "file").touch()
    with pytest.raises((ValueError, OSError)):
        write_diffusers(tmp_path / "file", tensors, config)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", WEIGHTS]


# --- DoRA ---------------------------------------------------------------------------------------------------


def test_dora_starts_as_identity(base, tmp_path: Path):
    from peft import LoraConfig, get_peft_model_state_dict

    model = copy.deepcopy(base)
    model.add_adapter(LoraConfig(r=4, use_dora=True, target_modules=ALL))
    torch.testing.assert_close(run(model), run(base), atol=2e-6, rtol=0)
    config = model.peft_config["default"].to_dict()
    write_diffusers(tmp_path, get_peft_model_state_dict(model), config)
    adapter = read_adapter(tmp_path, WAN)
    weight = base.get_parameter("blocks.0.attn1.to_q.weight")
    assert effective_delta(adapter, "blocks.0.attn1.to_q", weight).abs().max() < 1e-6


def comfyui(dora_scale, weight, delta, strength=1.0):
    """What ComfyUI makes of a weight: per output it divides by the base's norm, per input by the sum's."""
    total = weight + delta
    by_output = dora_scale.shape[0] == weight.shape[0]
    norm = weight.norm(dim=1, keepdim=True) if by_output else total.norm(dim=0, keepdim=True)
    total = total * (dora_scale / (norm + torch.finfo(torch.float32).eps))
    return weight + strength * (total - weight)


def test_dora_for_comfyui_is_corrected(base, tmp_path: Path):
    model, tensors, config = trained(base, alpha=2, dora=True)
    write_diffusers(tmp_path, tensors, config)
    adapter = read_adapter(tmp_path, WAN)
    with pytest.raises(ValueError, match="relative to the weights of the base model: pass base"):
        export_adapter(adapter, "comfyui", tmp_path / "c.safetensors", family=WAN)
    path = export_adapter(adapter, "comfyui", tmp_path / "c.safetensors", family=WAN, base=base)
    file = load_file(path)
    errors, uncorrected = [], []
    for module in ALL:
        name, weight = f"diffusion_model.{original(module)}", base.get_submodule(module).weight.detach()
        delta = file[f"{name}.alpha"] / 4 * file[f"{name}.lora_B.weight"] @ file[f"{name}.lora_A.weight"]
        wanted = weight + effective_delta(adapter, module, weight)
        assert file[f"{name}.dora_scale"].shape == (weight.shape[0], 1)
        errors.append((comfyui(file[f"{name}.dora_scale"], weight, delta) - wanted).norm() / wanted.norm())
        magnitude = tensors[f"{module}.lora_magnitude_vector"][:, None]
        uncorrected.append((comfyui(magnitude, weight, delta) - wanted).norm() / wanted.norm())
    assert max(errors) < 1e-6 < 0.05 < min(uncorrected)
    again = read_adapter(path, WAN, base=base)
    merged = copy.deepcopy(base)
    merge_adapter(merged, again)
    torch.testing.assert_close(run(merged), run(model), atol=5e-6, rtol=0)
    with pytest.raises(ValueError, match="pass the base model"):
        read_adapter(path, WAN)


def test_foreign_dora_scale_needs_a_word(base, tmp_path: Path):
    """LyCORIS divides by the norm of the sum; the file does not say so."""
    model, tensors, _ = trained(base, dora=True)
    file = spell({k: v for k, v in tensors.items() if "magnitude" not in k}, "kohya", alpha=4)
    for module in ALL:
        magnitude = tensors[f"{module}.lora_magnitude_vector"]
        file["lora_unet_" + original(module).replace(".", "_") + ".dora_scale"] = magnitude[:, None]
    path = tmp_path / "a.safetensors"
    save_file(file, path)
    with pytest.raises(ValueError, match=r"--dora-scale comfyui .* or merged"):
        read_adapter(path, WAN, base=base)
    check(read_adapter(path, WAN, base=base, dora_scale="merged"), base, run(model))
    with pytest.raises(ValueError, match=r"the base model has no layer blocks\.1"):
        read_adapter(path, WAN, base=torch.nn.ModuleDict({"blocks": base.blocks[:1]}), dora_scale="merged")
    other = read_adapter(path, WAN, base=base, dora_scale="comfyui")
    weight = base.get_parameter("blocks.0.ffn.net.2.weight").detach()
    a, b = (tensors[f"blocks.0.ffn.net.2.lora_{x}.weight"] for x in "AB")
    wanted = comfyui(tensors["blocks.0.ffn.net.2.lora_magnitude_vector"][:, None], weight, b @ a)
    torch.testing.assert_close(weight + effective_delta(other, "blocks.0.ffn.net.2", weight), wanted)


def test_dora_scale_by_input_becomes_a_full_rank_lora(base, tmp_path: Path):
    _, tensors, _ = trained(base)
    file = spell(tensors, "comfyui", alpha=4)
    generator = torch.Generator().manual_seed(3)
    for module in ALL:
        n_in = base.get_submodule(module).weight.shape[1]
        file[f"diffusion_model.{original(module)}.dora_scale"] = 0.2 + torch.rand(
            1, n_in, generator=generator
        )
    save_file(file, tmp_path / "a.safetensors")
    adapter = read_adapter(tmp_path / "a.safetensors", WAN, base=base, shapes=layer_shapes(base))
    assert not adapter.dora
    assert "exact LoRA of full rank" in adapter.notes[0]
    for module in ALL:
        name, weight = f"diffusion_model.{original(module)}", base.get_submodule(module).weight.detach()
        delta = file[f"{name}.lora_B.weight"] @ file[f"{name}.lora_A.weight"]
        wanted = comfyui(file[f"{name}.dora_scale"], weight, delta)
        torch.testing.assert_close(weight + effective_delta(adapter, module, weight), wanted)
    model = copy.deepcopy(base)
    attach_adapter(model, adapter)
    merged = copy.deepcopy(base)
    merge_adapter(merged, adapter)
    torch.testing.assert_close(run(model), run(merged), atol=5e-6, rtol=0)
    key = "diffusion_model.blocks.0.self_attn.q.dora_scale"
    for shape, reason in [
        ((24, 1), "per input column in some layers and per output row in others"),
        ((7, 1), r"shape \(7, 1\)"),
    ]:
        save_file({**file, key: torch.ones(shape)}, tmp_path / "a.safetensors")
        with pytest.raises(ValueError, match=reason):
            read_adapter(tmp_path / "a.safetensors", WAN, base=base, dora_scale="merged")


# --- exports ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("to", ["comfyui", "kohya"])
def test_exports_pass_the_stock_converters(base, tmp_path: Path, to: Target):
    model, tensors, config = trained(base, alpha=3, rank_pattern={"ffn.net.2": 2})
    write_diffusers(tmp_path, tensors, config)
    path = export_adapter(read_adapter(tmp_path, WAN), to, tmp_path / "out", family=WAN)
    assert path == tmp_path / "out" / f"{to}.safetensors"
    pipe = pipeline(copy.deepcopy(base))
    pipe.load_lora_weights(str(path))
    torch.testing.assert_close(run(pipe.transformer), run(model), atol=2e-6, rtol=0)
    check_close = read_adapter(path, WAN)
    merged = copy.deepcopy(base)
    merge_adapter(merged, check_close)
    torch.testing.assert_close(run(merged), run(model), atol=2e-6, rtol=0)


@pytest.mark.parametrize("to", ["comfyui", "kohya"])
def test_no_names_are_made_up(base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: Target):
    _, tensors, config = trained(base)
    write_diffusers(tmp_path, tensors, config)
    adapter = read_adapter(tmp_path, WAN)
    monkeypatch.setattr(WAN, "original_names", ())
    with pytest.raises(ValueError, match=f"no {to} layout is known for Wan; use `diffusers` or `merged`"):
        export_adapter(adapter, to, tmp_path / "out", family=WAN)
    assert not (tmp_path / "out").exists()


def test_kohya_is_filled_with_zeros(base, tmp_path: Path):
    model, tensors, config = trained(base, alpha=2, modules=["blocks.1.attn1.to_q"])
    write_diffusers(tmp_path, tensors, config)
    adapter = read_adapter(tmp_path, WAN)
    with pytest.raises(ValueError, match="pass the base model"):
        export_adapter(adapter, "kohya", tmp_path / "k.safetensors", family=WAN)
    path = export_adapter(adapter, "kohya", tmp_path / "k.safetensors", family=WAN, base=base)
    assert len(load_file(path)) == 2 * 10 * 3
    pipe = pipeline(copy.deepcopy(base))
    pipe.load_lora_weights(str(path))
    torch.testing.assert_close(run(pipe.transformer), run(model), atol=2e-6, rtol=0)


def test_an_export_that_differs_is_not_left_behind(base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    _, tensors, config = trained(base)
    write_diffusers(tmp_path, tensors, config)
    adapter = read_adapter(tmp_path, WAN)
    wrong = {k: v * 1.001 if ".lora_B" in k else v for k, v in spell(tensors, "comfyui", alpha=4).items()}
    monkeypatch.setattr(write, "_comfyui", lambda *_: wrong)
    with pytest.raises(AssertionError, match="differs after export"):
        export_adapter(adapter, "comfyui", tmp_path / "c.safetensors", family=WAN)
    assert not (tmp_path / "c.safetensors").exists()


def test_merging_refuses_what_it_would_break(base, tmp_path: Path):
    _, tensors, config = trained(base, lora_bias=True)
    write_diffusers(tmp_path, tensors, config)
    adapter = read_adapter(tmp_path, WAN)
    model = copy.deepcopy(base)
    model.blocks[0].attn1.to_q.bias = None
    with pytest.raises(ValueError, match="to_q has no bias"):
        merge_adapter(model, adapter)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, base.state_dict()[name]), "nothing changes before everything was checked"
    model = copy.deepcopy(base)
    layer = model.blocks[1].ffn.net[2]
    layer.weight = torch.nn.Parameter(layer.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"ffn.net.2 is quantized"):
        merge_adapter(model, adapter)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"already exists|cannot be written"):
        export_adapter(adapter, "merged", tmp_path / "file" / "out", family=WAN, base=copy.deepcopy(base))


def test_kohya_refuses_what_it_cannot_hold(base, tmp_path: Path):
    for options, reason in [
        ({"dora": True}, "no other program reads DoRA"),
        ({"modules": [*ALL, "proj_out"]}, "cannot represent proj_out"),
        ({"lora_bias": True}, "no biases"),
    ]:
        _, tensors, config = trained(base, **options)
        write_diffusers(tmp_path, tensors, config)
        with pytest.raises(ValueError, match=reason):
            export_adapter(
                read_adapter(tmp_path, WAN), "kohya", tmp_path / "k.safetensors", family=WAN, base=base
            )
        assert not (tmp_path / "k.safetensors").exists()


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_merged_is_a_diffusers_folder(base, tmp_path: Path, dora: bool):
    from diffusers import WanTransformer3DModel

    model, tensors, config = trained(base, alpha=3, dora=dora)
    write_diffusers(tmp_path / "adapter", tensors, config)
    adapter = read_adapter(tmp_path / "adapter", WAN)
    out = export_adapter(adapter, "merged", tmp_path / "merged", family=WAN, base=copy.deepcopy(base))
    assert sorted(p.name for p in out.iterdir()) == ["config.json", "diffusion_pytorch_model.safetensors"]
    torch.testing.assert_close(run(WanTransformer3DModel.from_pretrained(out)), run(model), atol=2e-6, rtol=0)
    with pytest.raises(ValueError, match="already exists"):
        export_adapter(adapter, "merged", out, family=WAN, base=copy.deepcopy(base))
    with pytest.raises(ValueError, match="requires the base model"):
        export_adapter(adapter, "merged", tmp_path / "other", family=WAN)
    with pytest.raises(ValueError, match="merge into a network without adapters"):
        export_adapter(adapter, "merged", tmp_path / "other", family=WAN, base=model)


def test_merging_rounds_once(base, tmp_path: Path):
    """In bfloat16 the sum is made in float32 and then rounded; other weights and types stay."""
    _, tensors, config = trained(base, dora=True)
    write_diffusers(tmp_path, tensors, config)
    adapter = read_adapter(tmp_path, WAN)
    half = copy.deepcopy(base).to(torch.bfloat16)
    half.blocks[0].norm2.float()
    before = {k: v.clone() for k, v in half.state_dict().items()}
    merge_adapter(half, adapter)
    for key, after in half.state_dict().items():
        module = key.removesuffix(".weight")
        wanted = before[key]
        if module in adapter.alpha:
            delta = effective_delta(adapter, module, before[key])
            wanted = (before[key].float() + delta).to(torch.bfloat16)
        assert after.dtype == before[key].dtype
        torch.testing.assert_close(after, wanted, atol=1e-6, rtol=1e-2 if module in adapter.alpha else 0)


# --- refusals -----------------------------------------------------------------------------------------------


def refused(tmp_path: Path, tensors, match: str, header=None, **options) -> None:
    path = tmp_path / "bad.safetensors"
    save_file(tensors, path, metadata=header)
    with pytest.raises(ValueError, match=match) as caught:
        read_adapter(path, WAN, **options)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_tensors_that_nobody_would_use(base, tmp_path: Path):
    _, tensors, _ = trained(base)
    file = spell(tensors, "diffusers")
    one = torch.ones(4, 24)
    key = "transformer.blocks.0.attn1.to_q"
    refused(
        tmp_path,
        {**file, "transformer.domain_emb": one},
        r"1 tensors match no layer of Wan .*domain_emb",
    )
    refused(tmp_path, {**file, "transformer.blocks.0.attn3.to_q.lora_A.weight": one}, "attn3")
    refused(tmp_path, {**file, "text_encoder.layer.lora_A.weight": one}, "text_encoder.layer")
    refused(tmp_path, {**file, f"{key}.lora_A.bias": one}, "match no layer")
    refused(tmp_path, {**file, f"transformer_2.{ALL[0]}.lora_A.weight": one}, "one file per expert")
    refused(tmp_path, {**file, f"diffusion_model.{original(ALL[0])}.lora_A.weight": one}, "is present twice")
    refused(
        tmp_path,
        {k: v for k, v in file.items() if k != f"{key}.lora_B.weight"},
        "lack a factor, A or B .*to_q has A",
    )
    refused(tmp_path, {**file, "transformer.blocks.0.norm2.diff": one}, "1 full weight differences")
    refused(tmp_path, {**file, "transformer.blocks.0.diff_m": one}, "1 full weight differences")
    refused(
        tmp_path,
        {**file, "transformer.proj_out.diff_b": torch.ones(4)},
        "lack a factor, A or B .*proj_out has diff_b",
    )


def test_files_of_other_kinds(base, tmp_path: Path):
    _, tensors, _ = trained(base)
    file = spell(tensors, "bare")
    twice = {**spell(tensors, "diffsynth"), "blocks.0.self_attn.q.lora_A.other.weight": torch.ones(4, 24)}
    refused(
        tmp_path, {"unet.down.0.attn.lora_A.weight": torch.ones(2, 2)}, "no tensor matches a layer of Wan"
    )
    refused(
        tmp_path, {"blocks.0.attn1.to_q.weight": torch.ones(2, 2)}, "another architecture, or not an adapter"
    )
    refused(tmp_path, {"lora_unet_blocks_0_self_attn_q.lokr_w1": torch.ones(2, 2)}, "LyCORIS")
    refused(tmp_path, {}, "no tensors at all")
    refused(tmp_path, twice, "several adapters|is present twice")
    halves = {k: v for i, (k, v) in enumerate(spell(tensors, "diffusers").items()) if i < 20}
    refused(tmp_path, {**halves, **dict(list(file.items())[20:])}, "mixes layouts")
    for config, reason in [
        ({"transformer.peft_type": "LOHA"}, "peft_type LOHA"),
        ({"transformer.init_lora_weights": "pissa"}, "init_lora_weights=pissa, which changes the base"),
        ({"transformer.use_dora": True}, "has use_dora, but the file has no magnitudes"),
        ({"transformer.lora_alpha": "high"}, "not a LoRA configuration in JSON"),
        ([1], "not a LoRA configuration in JSON"),
    ]:
        refused(tmp_path, file, reason, {"lora_adapter_metadata": json.dumps(config)})


def test_values_and_shapes(base, tmp_path: Path):
    _, tensors, _ = trained(base, dora=True)
    file = spell(tensors, "bare")
    q = "blocks.0.attn1.to_q"
    refused(
        tmp_path,
        {**file, f"{q}.lora_A.weight": torch.ones(3, 24)},
        r"to_q: factors of shapes \(3, 24\) and \(24, 4\)",
    )
    refused(tmp_path, {**file, f"{q}.lora_A.weight": torch.full((4, 24), torch.nan)}, "not finite")
    refused(
        tmp_path,
        {**file, f"{q}.lora_magnitude_vector": torch.ones(5)},
        "magnitude has 5 values for 24 outputs",
    )
    refused(tmp_path, {**file, f"{q}.alpha": torch.zeros(())}, "alpha is 0")
    without = {k: v for k, v in file.items() if k != f"{q}.lora_magnitude_vector"}
    refused(tmp_path, without, "DoRA with 1 layers without a magnitude .*to_q")
    refused(tmp_path, {**file, f"{q}.lora_B.bias": torch.ones(24)}, "DoRA with trained biases")


def test_another_size_of_the_model(base, tmp_path: Path):
    wide = {}
    for module in ALL[:8]:
        wide |= {
            f"{module}.lora_A.weight": torch.ones(2, 5120),
            f"{module}.lora_B.weight": torch.ones(5120, 2),
        }
    small = dict.fromkeys(ALL, (1536, 1536))
    refused(
        tmp_path,
        wide,
        r"to_k is 5120 x 5120 \(Wan 14B\) in the adapter and 1536 x 1536 \(Wan 1.3B\)",
        shapes=small,
    )
    refused(tmp_path, wide, "trained on a network of another size", shapes=layer_shapes(base))
    deep = {k.replace("blocks.0", "blocks.39"): v for k, v in wide.items()}
    refused(
        tmp_path,
        deep,
        r"the network lacks 8 of the adapter's 8 layers \(blocks.39",
        shapes=layer_shapes(base),
    )
    save_file(wide, tmp_path / "wide.safetensors")
    adapter = read_adapter(tmp_path / "wide.safetensors", WAN)
    for use in (merge_adapter, attach_adapter):
        with pytest.raises(ValueError, match="trained on a network of another size"):
            use(copy.deepcopy(base), adapter)


class Evil:
    def __reduce__(self):
        return Path.touch, (Path("pwned"),)


BAD_FILES = {
    "empty.safetensors": (b"", "empty"),
    "empty.pt": (b"", "empty"),
    "text.safetensors": (b"hello, this is no tensor file", "not a safetensors file"),
    "short.safetensors": (b"\x01", "not a safetensors file"),
    "pickle.safetensors": (pickle.dumps({"a": Evil()}), "a pickle with the extension of a safetensors file"),
    "evil.pt": (
        pickle.dumps({"a": Evil()}, 2),
        "a pickle that (calls getattr|runs code): not loaded",
    ),
    "garbage.bin": (b"\x00" * 40, "neither a safetensors nor a torch file"),
    "header.safetensors": (
        struct.pack("<Q", 10**6) + b'{"a":',
        "truncated: the header alone needs 1000008 bytes",
    ),
    "junk.safetensors": (struct.pack("<Q", 3) + b"{a}", "truncated or damaged"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_damaged_and_dangerous_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str):
    monkeypatch.chdir(tmp_path)
    content, reason = BAD_FILES[name]
    (tmp_path / name).write_bytes(content)
    for look in (lambda p: read_adapter(p, WAN), inspect_path):
        with pytest.raises(ValueError, match=reason) as caught:
            look(tmp_path / name)
        assert name in str(caught.value)
        assert "\n" not in str(caught.value)
    assert not Path("pwned").exists()


def test_torch_files_of_something_else(tmp_path: Path):
    for value in ([torch.ones(1)], {"step": 3, "weights": torch.ones(1)}):
        torch.save(value, tmp_path / "a.pt")
        with pytest.raises(ValueError, match="not a mapping of names to tensors"):
            read_adapter(tmp_path / "a.pt", WAN)


def test_a_torch_archive_under_a_safe_name(tmp_path: Path):
    torch.save({"a": torch.ones(2)}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="a pickle with the extension of a safetensors file"):
        read_adapter(tmp_path / "a.safetensors", WAN)


def test_truncated_files_at_every_place(base, tmp_path: Path):
    _, tensors, config = trained(base)
    whole = write_diffusers(tmp_path, tensors, config).read_bytes()
    path = tmp_path / "cut.safetensors"
    for size in (1, 8, 9, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        for look in (lambda p: read_adapter(p, WAN), inspect_path):
            with pytest.raises(ValueError, match=r"truncated|not a safetensors"):
                look(path)


def test_folders_without_one_adapter(base, tmp_path: Path):
    with pytest.raises(ValueError, match="no such file or folder"):
        read_adapter(tmp_path / "nowhere", WAN)
    with pytest.raises(ValueError, match="no adapter file"):
        read_adapter(tmp_path, WAN)
    for name in "ab":
        save_file({"x": torch.ones(1)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(ValueError, match=r"2 candidate files \(a.safetensors, b.safetensors\); pass one"):
        read_adapter(tmp_path, WAN)


# --- inspect and the model card -----------------------------------------------------------------------------


def test_inspect_an_adapter(base, tmp_path: Path):
    _, tensors, config = trained(base, rank=4, alpha=8, dora=True)
    write_diffusers(tmp_path / "adapter", tensors, config, {"inlaid_step": "120"})
    for path in (tmp_path / "adapter", tmp_path / "adapter" / WEIGHTS):
        found = inspect_path(path)
        assert found.kind == "adapter"
        facts = dict(found.facts)
        assert (facts["family"], facts["layout"], facts["rank"]) == ("wan", "diffusers", "4")
        assert facts["alpha"].startswith("8, from the file's header")
        assert facts["DoRA"].startswith("yes, magnitudes")
        assert facts["modules"].startswith("20 in 2 blocks: attn1.to_k")
        assert facts["inlaid_step"] == "120"
        assert facts["types"] == "float32"
    text = describe(inspect_path(tmp_path / "adapter"))
    assert re.search(r"  layout +diffusers\n", text)
    assert "kB" in text


@pytest.mark.parametrize("layout", LAYOUTS)
def test_inspect_names_the_layout(base, tmp_path: Path, layout: str):
    _, tensors, _ = trained(base)
    save_file(spell(tensors, layout), tmp_path / "a.safetensors")
    found = inspect_path(tmp_path / "a.safetensors")
    assert (found.facts["family"], found.facts["layout"]) == ("wan", LAYOUTS[layout])
    assert found.facts["alpha"] == "not stored; alpha = rank = 4 assumed"
    assert found.facts["DoRA"] == "no"


def test_inspect_says_what_cannot_be_imported(base, tmp_path: Path):
    _, tensors, _ = trained(base, modules=ALL[10:])
    path = tmp_path / "a.safetensors"
    save_file({**spell(tensors, "comfyui"), "diffusion_model.blocks.0.diff_m": torch.ones(1)}, path)
    found = inspect_path(path)
    assert "cannot be imported: 1 full weight differences" in found.notes[0]
    assert "(1)" in found.facts["modules"]
    save_file({"unet.a.lora_A.weight": torch.ones(1)}, path)
    assert "matches no installed family" in inspect_path(path).notes[0]
    save_file({**spell(tensors, "comfyui"), "diffusion_model.blocks.0.ffn.0.dora_scale": torch.ones(1)}, path)
    assert "relative to an unnamed norm" in inspect_path(path).facts["DoRA"]
    torch.save(spell(tensors, "diffsynth"), tmp_path / "a.pt")
    assert inspect_path(tmp_path / "a.pt").facts["layout"] == "original"


def test_inspect_other_things(base, tmp_path: Path, tiny_wan: Path):
    save_file(
        {"latents": torch.ones(16, 3, 4, 4)},
        tmp_path / "item.safetensors",
        {"inlaid_cache": "1", "caption": "x " * 90},
    )
    found = inspect_path(tmp_path / "item.safetensors")
    assert found.kind == "cached item"
    assert found.facts["latents"] == "float32 [16, 3, 4, 4]"
    assert found.facts["caption"].endswith("...")
    pipe = inspect_path(tiny_wan)
    assert pipe.kind == "pipeline"
    assert pipe.facts["vae"] == "AutoencoderKLWan"
    model = inspect_path(tiny_wan / "transformer")
    assert model.facts["class"] == "WanTransformer3DModel"
    assert model.facts["num_layers"] == "2"
    assert "values" in model.facts["tensors"]
    assert model.kind == "model"
    (tiny_wan_copy := tmp_path / "broken").mkdir()
    (tiny_wan_copy / "config.json").write_text("{", "utf-8")
    for path in (tiny_wan_copy, tmp_path / "none", tmp_path / "empty"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(ValueError, match=r"broken|none|empty"):
            inspect_path(path)


def test_inspect_runs_and_checkpoints(base, tmp_path: Path):
    _, tensors, config = trained(base)
    run_folder = tmp_path / "run"
    step = run_folder / "checkpoints" / "step-000040"
    write_diffusers(run_folder / "adapter", tensors, config)
    write_diffusers(step / "adapter", tensors, config)
    save_file({f"weights.{k}": v for k, v in tensors.items()}, step / "trainer.safetensors")
    (step / "state.json").write_text('{"step": 40}', "utf-8")
    (run_folder / "config.yaml").write_text("run: x\n", "utf-8")
    found = inspect_path(run_folder)
    assert (found.kind, found.facts["checkpoints"], found.parts[0].kind) == ("run", "40", "adapter")
    found = inspect_path(step)
    assert (found.kind, found.facts["step"]) == ("checkpoint", "40")
    assert [p.kind for p in found.parts] == ["adapter", "tensors"]
    assert "trainer.safetensors: tensors" in describe(found)
    assert read_adapter(run_folder, WAN).modules == read_adapter(step, WAN).modules


@pytest.mark.parametrize("kind", ["lora", "lokr", "loha", "full"])
def test_model_card_of_scenes(kind: str):
    raw = {
        "run": "runs/x",
        "model": {"family": "midi", "checkpoint": "VAST-AI/MIDI-3D"},
        "data": {"sources": "scenes"},
        "tuner": {"kind": kind},
    }
    card = model_card(recipes.Config.model_validate(raw), step=300, task="image-to-3d")
    front = yaml.safe_load(card.split("---")[1])
    assert front["library_name"] == "inlaid" and "image-to-3d" in front["tags"]
    code = card.split("```python\n")[1].split("```")[0]
    compile(code, "card", "exec")
    assert "DiffusionPipeline" not in code and "| size |" not in card


@pytest.mark.parametrize("kind", ["lora", "dora", "full"])
def test_model_card(kind: str, tiny_a14b: Path):
    tuner = {"kind": kind} if kind == "full" else {"kind": kind, "rank": 16}
    raw = {
        "run": "runs/x",
        "model": {"family": "wan", "checkpoint": "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"},
        "data": {"sources": "clips", "trigger": "sks: dog"},
        "tuner": tuner,
    }
    card = model_card(recipes.Config.model_validate(raw), step=300, prompts=["a sks: dog | surfing"])
    front = yaml.safe_load(card.split("---")[1])
    assert front["base_model"] == "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
    assert front["library_name"] == "diffusers"
    assert front["instance_prompt"] == "sks: dog"
    assert {"inlaid", "wan", kind} <= set(front["tags"])
    code = card.split("```python\n")[1].split("```")[0]
    compile(code, "card", "exec")
    assert ("load_lora_weights" in code) == (kind != "full")
    assert "| steps | 300 |" in card
    raw["model"]["options"] = {"latents": "raw"}
    assert "| latents | raw |" in model_card(recipes.Config.model_validate(raw), step=300)
    raw["model"] = {"family": "wan", "checkpoint": str(tiny_a14b), "expert": "low"}
    card = model_card(recipes.Config.model_validate(raw), step=300)
    assert "base_model" not in card
    assert str(tiny_a14b.parent) not in card
    assert "transformer_2" in card


def test_the_header_is_small_and_portable(base, tmp_path: Path):
    """Another release of peft refuses unknown settings, so only what changes the function is stored."""
    from peft import LoraConfig

    _, tensors, config = trained(base, dora=True)
    path = write_diffusers(tmp_path, tensors, {**config, "base_model_name_or_path": "/home/me/secret"})
    with safe_open(path, "pt") as file:
        stored = json.loads(file.metadata()["lora_adapter_metadata"])
    own = {k.removeprefix("transformer."): v for k, v in stored.items()}
    assert "secret" not in json.dumps(stored)
    assert len(own) == 10
    assert LoraConfig(**own).use_dora
    assert sorted(own["target_modules"]) == sorted(ALL)
