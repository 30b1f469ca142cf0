"""The reference implementation's DoRA, through our importer, into the stock transformer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from inlaid import families
from inlaid.adapters.merge import attach_adapter, merge_adapter
from inlaid.adapters.read import read_adapter
from inlaid.adapters.write import export_adapter
from support.clients import adapters as clients

WAN = families.get("wan")
LIMIT = 5e-5
"""The stock transformer computes the time sinusoid in float32, the reference in float64: that makes 1e-5."""


@pytest.fixture(scope="module")
def golden(goldens_root: Path):
    path = goldens_root / "wan_dora.safetensors"
    if not path.is_file():
        pytest.skip(f"no {path.name} in the goldens folder")
    with safe_open(path, "pt") as file:
        return {k: file.get_tensor(k) for k in file.keys()}, json.loads(file.metadata()["config"])  # noqa: SIM118


@pytest.fixture
def transformer(golden):
    from diffusers import WanTransformer3DModel

    tensors, c = golden
    model = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=c["num_heads"],
        attention_head_dim=c["dim"] // c["num_heads"],
        in_channels=c["in_dim"],
        out_channels=c["out_dim"],
        text_dim=c["text_dim"],
        freq_dim=c["freq_dim"],
        ffn_dim=c["ffn_dim"],
        num_layers=c["num_layers"],
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
    )
    weights = {k.removeprefix("weights."): v for k, v in tensors.items() if k.startswith("weights.")}
    original = {k: v for k, v in weights.items() if ".lora_" not in k}
    model.load_state_dict(WAN.original.to_diffusers(original, model.state_dict()))
    return model.eval()


@pytest.fixture
def adapter(golden, tmp_path: Path):
    tensors, _ = golden
    own = {k.removeprefix("weights."): v for k, v in tensors.items() if ".lora_" in k}
    save_file(own, tmp_path / "epoch.safetensors")
    return read_adapter(tmp_path / "epoch.safetensors", WAN)


@torch.no_grad()
def difference(model, tensors, name: str) -> float:
    inputs = (tensors[f"inputs.{k}"] for k in ("hidden_states", "timestep", "encoder_hidden_states"))
    return (model(*inputs, return_dict=False)[0] - tensors[f"outputs.{name}"]).abs().max().item()


def test_the_published_layout_is_recognised(adapter):
    assert (adapter.layout, adapter.dora, len(adapter.modules)) == ("original", True, 20)
    assert set(adapter.rank.values()) == {4}
    assert all(adapter.scale(m) == 1 for m in adapter.modules)
    assert any("alpha" in note for note in adapter.notes)


def test_base(golden, transformer):
    assert difference(transformer, golden[0], "base") <= LIMIT


def test_dora_through_the_stock_loader(golden, transformer, adapter):
    attach_adapter(transformer, adapter)
    assert difference(transformer, golden[0], "dora") <= LIMIT


def test_another_ratio_scales_the_update_but_not_the_magnitude(golden, transformer, adapter):
    attach_adapter(transformer, adapter)
    transformer.set_adapters("inlaid", golden[1]["other_ratio"])
    assert difference(transformer, golden[0], "dora_other_ratio") <= LIMIT


def test_merged(golden, transformer, adapter):
    merge_adapter(transformer, adapter)
    merged = transformer.get_parameter("blocks.0.attn1.to_q.weight")
    expected = golden[0]["outputs.merged.blocks.0.self_attn.q.weight"]
    assert (merged - expected).abs().max().item() <= 1e-6
    assert difference(transformer, golden[0], "dora") <= LIMIT


def test_a_folder_written_by_us_loads_alone(golden, transformer, adapter, tmp_path: Path):
    from diffusers import WanPipeline

    export_adapter(adapter, "diffusers", tmp_path / "adapter", family=WAN)
    pipe = WanPipeline(tokenizer=None, text_encoder=None, vae=None, scheduler=None, transformer=transformer)
    pipe.load_lora_weights(str(tmp_path / "adapter"))
    assert difference(transformer, golden[0], "dora") <= LIMIT


def test_back_to_the_layout_that_it_came_in(golden, adapter, tmp_path: Path):
    """The golden file, exported for Wan-Alpha again: the same names but for `.default`, the same values."""
    path = export_adapter(adapter, "wan-alpha", tmp_path / "dora.safetensors", family=WAN)
    weights = {k.removeprefix("weights."): v for k, v in golden[0].items() if k.startswith("weights.")}
    file = load_file(path)
    original = {k: v for k, v in weights.items() if ".lora_" in k}
    assert {f"diffusion_model.{k.replace('.default', '')}" for k in original} == file.keys()
    for key, value in original.items():
        assert torch.equal(file[f"diffusion_model.{key.replace('.default', '')}"].flatten(), value.flatten())
    base = {k: v for k, v in weights.items() if ".lora_" not in k}
    new, unused = clients.load_dora(base, file)
    assert unused == []
    expected = golden[0]["outputs.merged.blocks.0.self_attn.q.weight"]
    assert (new["blocks.0.self_attn.q.weight"] - expected).abs().max().item() <= 1e-6
