"""Adapter files: every layout that exists for Wan loads exactly, or is refused with one clear sentence."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from inlaid.adapters.adapter import WEIGHTS, Adapter
from inlaid.adapters.layers import layer_shapes
from inlaid.adapters.merge import attach_adapter, effective_delta, merge_adapter
from inlaid.adapters.read import read_adapter
from inlaid.adapters.write import export_adapter, write_diffusers
from support.layouts import ALL, LAYOUTS, WAN, original, pipeline, run, spell, trained
from support.slow import slow


def check(adapter: Adapter, base, expected: torch.Tensor) -> None:
    """Attached by the stock loader and merged, the adapter does what it did in training."""
    model = copy.deepcopy(base)
    attach_adapter(model, adapter)
    assert torch.equal(run(model), expected)
    merged = copy.deepcopy(base)
    merge_adapter(merged, adapter)
    torch.testing.assert_close(run(merged), expected, atol=2e-6, rtol=0)


# --- layouts ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layout", "dora"),
    [
        (layout, dora) if dora or layout in ("diffusers", "parameter") else slow(layout, dora)
        for layout in LAYOUTS
        for dora in (False, True)
    ],
    ids=lambda x: x if isinstance(x, str) else ("lora", "dora")[x],
)  # a LoRA of the other layouts is read in `test_alpha_of_each_layer_is_kept`
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


@pytest.mark.parametrize("dora", [slow(False), True], ids=["lora", "dora"])
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
        slow([m for m in ALL if ".attn1." in m]),
        slow([m for m in ALL if m.startswith("blocks.1.")]),
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


@pytest.mark.parametrize("dora", [slow(False), True], ids=["lora", "dora"])
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
