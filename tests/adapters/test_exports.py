"""Adapters go out to other programs, and say what they are."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from inlaid import config as recipes
from inlaid.adapters import layouts
from inlaid.adapters.adapter import WEIGHTS
from inlaid.adapters.inspect import describe, inspect_path
from inlaid.adapters.merge import effective_delta, merge_adapter
from inlaid.adapters.model_card import model_card
from inlaid.adapters.read import read_adapter
from inlaid.adapters.write import export_adapter, write_diffusers
from support.layouts import ALL, LAYOUTS, WAN, pipeline, run, spell, trained

# --- exports ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("to", ["comfyui", "kohya"])
def test_exports_pass_the_stock_converters(base, tmp_path: Path, to: str):
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
def test_no_names_are_made_up(base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str):
    _, tensors, config = trained(base)
    write_diffusers(tmp_path, tensors, config)
    adapter = read_adapter(tmp_path, WAN)
    monkeypatch.setattr(WAN, "programs", ())
    with pytest.raises(ValueError, match=f"no {to} layout is known for Wan; use `diffusers`, `merged`"):
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
    wrong = layouts.SPELLINGS["comfyui"].write
    monkeypatch.setattr(
        type(layouts.SPELLINGS["comfyui"]),
        "write",
        lambda _, layers: {k: v * 1.001 if ".lora_B" in k else v for k, v in wrong(layers).items()},
    )
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
        ({"dora": True}, "cannot represent DoRA"),
        ({"modules": [*ALL, "patch_embedding"]}, "cannot represent convolutions .patch_embedding."),
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
