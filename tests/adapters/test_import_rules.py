"""What an import compares, asks for, leaves out aloud, or refuses."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from inlaid.adapters.adapter import WEIGHTS
from inlaid.adapters.importing import import_adapter
from inlaid.adapters.inspect import describe, inspect_path
from inlaid.adapters.layers import layer_shapes
from inlaid.adapters.merge import attach_adapter, merge_adapter
from inlaid.adapters.read import read_adapter, read_any
from support import imports as made
from support.commands import inlaid
from support.imports import LAYERS, Make, original, product
from support.layouts import WAN


@pytest.fixture
def make(base, tmp_path: Path) -> Make:
    return Make(base, tmp_path / "in")


def plain(make: Make, name: str = "diffusion_model.{}", alpha: float | None = 7.0) -> dict[str, Tensor]:
    """A LoRA of all layers under original names."""
    out = {}
    for module in LAYERS:
        a, b = make.lora(module)
        key = name.format(original(module))
        out |= {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b}
        out |= {} if alpha is None else {f"{key}.alpha": torch.tensor(alpha)}
    return out


def refused(make: Make, path: Path, match: str, **options: Any) -> None:
    with pytest.raises(ValueError, match=match) as caught:
        read_any(path, WAN, **options)
    assert "\n" not in str(caught.value)


# --- biases and whole layers of peft ------------------------------------------------------------------------


def test_whole_biases_need_the_base_model_and_are_compared_with_it(make: Make, base) -> None:
    case = made.of_peft(make, bias="lora_only")
    refused(
        make, case.path, r"20 whole weights or biases .*pass the base model \(inlaid import --checkpoint\)"
    )
    adapter = read_adapter(case.path, WAN, base=base)
    merged = copy.deepcopy(base)
    merge_adapter(merged, adapter)
    for key, delta in case.effect.items():
        torch.testing.assert_close(
            merged.state_dict()[key] - base.state_dict()[key], delta, atol=1e-6, rtol=0
        )
    assert sum(k.endswith(".bias") for k in case.effect) == 20


def test_untrained_biases_are_left_out_aloud(make: Make, base) -> None:
    tensors = plain(make, "base_model.model.{}")
    biases = {f"base_model.model.{original(m)}.base_layer.bias": base.get_submodule(m).bias for m in LAYERS}
    make.save({**tensors, **biases}, "adapter_model.safetensors")
    make.config(r=3, lora_alpha=7, bias="lora_only")
    adapter = read_adapter(make.folder, WAN, base=base)
    assert "ignored 20 weights and biases that equal those of the base model" in adapter.notes
    assert not any(k.endswith(".bias") for k in adapter.tensors)


def test_biases_of_other_layers_are_refused_if_they_differ(make: Make, base) -> None:
    """`bias="all"` trains the biases of the whole network, of which an adapter cannot hold those of norms."""
    case = made.of_peft(make, bias="all", target_modules=LAYERS)
    with pytest.raises(
        ValueError, match=r"whole weights that differ .* norm2\.bias|whole weights that differ"
    ):
        read_adapter(case.path, WAN, base=base)
    merged = copy.deepcopy(base)
    merge_adapter(merged, read_adapter(case.path, WAN, base=base, merging=True))
    for key, delta in case.effect.items():
        torch.testing.assert_close(
            merged.state_dict()[key] - base.state_dict()[key], delta, atol=1e-6, rtol=0
        )


def test_weights_of_another_base_model_are_refused(make: Make, base) -> None:
    tensors = plain(make, "{}")
    key = f"{original(LAYERS[0])}.base_layer.weight"
    weight = base.get_submodule(LAYERS[0]).weight.detach()
    path = make.save({**tensors, key: weight.bfloat16()})
    assert "ignored 1 weights and biases that equal" in "".join(read_adapter(path, WAN, base=base).notes)
    assert "were not compared" in "".join(read_adapter(path, WAN).notes)
    path = make.save({**tensors, key: weight + 0.1})
    refused(make, path, "1 weights of the base model differ .*trained on another base model", base=base)


# --- full differences ---------------------------------------------------------------------------------------


def distillation(make: Make, base) -> tuple[Path, dict[str, Tensor]]:
    """A file as of LightX2V and AccVid, and its effect."""
    tensors, effect = {}, {}
    for module in LAYERS:
        (a, b), bias = make.lora(module), make.rand(base.get_submodule(module).bias.numel())
        name = f"diffusion_model.{original(module)}"
        tensors |= {f"{name}.lora_down.weight": a, f"{name}.lora_up.weight": b, f"{name}.diff_b": bias}
        tensors[f"{name}.alpha"] = torch.tensor(1.0)
        effect |= {f"{module}.weight": product(a, b, 1 / 3), f"{module}.bias": bias}
    full = {
        "blocks.0.norm3.diff": "blocks.0.norm2.weight",
        "blocks.0.norm3.diff_b": "blocks.0.norm2.bias",
        "blocks.1.self_attn.norm_q.diff": "blocks.1.attn1.norm_q.weight",
        "blocks.1.cross_attn.norm_k.diff": "blocks.1.attn2.norm_k.weight",
        "blocks.0.diff_m": "blocks.0.scale_shift_table",
        "blocks.1.modulation.diff": "blocks.1.scale_shift_table",
        "head.diff_m": "scale_shift_table",
        "patch_embedding.diff": "patch_embedding.weight",
        "head.head.diff": "proj_out.weight",
        "time_projection.1.diff_b": "condition_embedder.time_proj.bias",
    }
    for theirs, ours in full.items():
        effect[ours] = make.rand(*base.get_parameter(ours).shape)
        tensors[f"diffusion_model.{theirs}"] = effect[ours]
    return make.save(tensors), effect


def test_distillation_loras_are_refused_as_adapters_and_merged_exactly(make: Make, base) -> None:
    path, effect = distillation(make, base)
    refused(
        make,
        path,
        r"10 full weight differences, .*merge them into a model with `inlaid export RUN --to merged",
    )
    before = {k: v.clone() for k, v in base.state_dict().items()}
    adapter = read_adapter(path, WAN, base=base, shapes=layer_shapes(base), merging=True)
    with pytest.raises(ValueError, match="can only be merged"):
        attach_adapter(copy.deepcopy(base), adapter)
    merged = copy.deepcopy(base)
    merge_adapter(merged, adapter)
    after = merged.state_dict()
    for key, weight in before.items():
        wanted = effect[key].reshape(weight.shape) if key in effect else torch.zeros(weight.shape)
        torch.testing.assert_close(after[key] - weight, wanted, atol=2e-6, rtol=0)
    assert all(not torch.equal(after[k], before[k]) for k in effect)


def test_differences_that_do_not_fit(make: Make, base) -> None:
    path, _ = distillation(make, base)
    tensors = load_file(path)
    options = {"base": base, "shapes": layer_shapes(base), "merging": True}
    for extra, says in [
        (
            {"diffusion_model.blocks.7.norm3.diff": torch.ones(24)},
            r"does not have \(diffusion_model.blocks.7",
        ),
        (
            {"diffusion_model.blocks.1.norm3.diff": torch.ones(7)},
            r"do not fit .*norm3.diff \(7,\) for \(24,\)",
        ),
        ({"diffusion_model.blocks.1.norm3.diff": torch.full((24,), torch.nan)}, "not finite"),
        (
            {f"diffusion_model.{original(LAYERS[0])}.diff": torch.ones(24, 24)},
            "both factors and a full weight",
        ),
    ]:
        path = make.save({**tensors, **extra})
        with pytest.raises(ValueError, match=says):
            read_adapter(path, WAN, **options)
    path = make.save({**tensors, "diffusion_model.blocks.7.norm3.diff": torch.ones(24)})
    notes = read_adapter(path, WAN, skip_missing=True, **options).notes
    assert "left out 1 differences of parameters that the base model does not have" in "".join(notes)


# --- LoRA alpha ---------------------------------------------------------------------------------------------


def test_the_order_of_the_sources_of_alpha(make: Make) -> None:
    tensors, bare = plain(make, alpha=5.0), plain(make, alpha=None)
    header = {"lora_adapter_metadata": json.dumps({"transformer.r": 3, "transformer.lora_alpha": 4})}
    numbers = {"ss_network_alpha": "2", "ss_network_dim": "3"}

    def alpha(tensors, header, **options) -> tuple[set[float], str, str]:
        found = read_adapter(make.save(tensors, header=header), WAN, **options)
        return set(found.alpha.values()), found.alpha_from, " ".join(found.notes)

    assert alpha(tensors, {**header, **numbers})[:2] == ({5.0}, "the file (.alpha of each layer)")
    assert "alpha is 2 in the file's header (ss_network_alpha), but 5" in alpha(tensors, numbers)[2]
    assert alpha(tensors, {"ss_network_alpha": "5.0"})[2] == ""
    assert alpha(bare, {**header, **numbers})[0] == {4.0}
    assert alpha(bare, numbers) == ({2.0}, "the file's header (ss_network_alpha)", "")
    assert alpha(bare, {"alpha": "none", "lora_alpha": "2.5"})[0] == {2.5}
    assert "`alpha: nan` in the header is not a number above 0" in alpha(bare, {"alpha": "nan"})[2]
    assert "alpha = rank is assumed" in alpha(bare, {"alpha": "nan"})[2]
    assert alpha(bare, {}, alpha=6)[:2] == ({6.0}, "alpha argument")
    two = {"lora_alpha": "4", "network_alpha": "8"}
    with pytest.raises(
        ValueError, match=r"the header has lora_alpha 4 and network_alpha 8: pass the right one"
    ):
        alpha(bare, two)
    assert alpha(bare, two, alpha=8)[0] == {8.0}
    with pytest.raises(ValueError, match=r"--alpha is 1, but the file stores alpha 2"):
        alpha(bare, numbers, alpha=1)


def test_a_configuration_beside_a_file_of_another_name_is_not_ignored_in_silence(make: Make) -> None:
    make.config(r=3, lora_alpha=12)
    path = make.save(plain(make, alpha=None), "epoch-3.safetensors")
    adapter = read_adapter(path, WAN)
    assert set(adapter.alpha.values()) == {3.0}
    assert "adapter_config.json beside the file is not used" in adapter.notes[0]


def test_a_part_that_is_stated_twice_is_refused(make: Make) -> None:
    tensors, key = plain(make), f"diffusion_model.{original(LAYERS[0])}"
    for two in (("lora_B.bias", "diff_b"), ("lora_magnitude_vector", "dora_scale")):
        own = {f"{key}.{name}": torch.ones(24) for name in two}
        refused(make, make.save({**tensors, **own}), "both .* which state the same thing")


def test_settings_that_make_other_layers_are_refused(make: Make) -> None:
    make.save(plain(make, "base_model.model.{}", alpha=None), "adapter_model.safetensors")
    for settings, says in [
        ({"layer_replication": [[0, 1], [0, 1]]}, "trained with layer_replication"),
        ({"init_lora_weights": "pissa_niter_4"}, "which changes the base model"),
        ({"modules_to_save": 3}, "`modules_to_save` is no list of names"),
        ({"rank_pattern": {"(a+)+": 4}}, "rank_pattern repeats a group"),
        ({"rank_pattern": {"to_q": 0}}, "rank of `to_q` is 0"),
    ]:
        make.config(r=3, lora_alpha=7, **settings)
        refused(make, make.folder, says)


def test_sat_files_ask_for_alpha(checkpoint, tmp_path: Path) -> None:
    from inlaid import config, families

    family = families.get("cogvideox")
    model = config.Model(family="cogvideox", checkpoint=str(checkpoint("cogvideox", "2b")))
    case = made.sat(Make(family(model).load_denoiser(torch.float32), tmp_path / "in"), "module")
    with pytest.raises(ValueError, match=r"store no LoRA alpha: pass --alpha\. .* alpha 1"):
        read_adapter(case.path, family)
    torch.save({"x.layers.0.mlp.matrix_A.0": torch.ones(2, 2)}, tmp_path / "b.pt")
    with pytest.raises(ValueError, match="factors of unknown layers of CogVideoX"):
        read_adapter(tmp_path / "b.pt", family, alpha=1)


def test_genmo_settings_that_disagree_are_refused(tmp_path: Path) -> None:
    from inlaid import families

    mochi = families.get("mochi")
    tensors = {
        "blocks.0.attn.qkv_x.lora_A": torch.ones(4, 8),
        "blocks.0.attn.qkv_x.lora_B": torch.ones(24, 4),
    }
    good = {"qkv_proj_lora_rank": 4, "qkv_proj_lora_alpha": 8}
    path = tmp_path / "a.safetensors"
    for settings, says in [
        ({**good, "qkv_proj_lora_rank": 8}, r"it has rank 8 for qkv_proj, the tensors have \[4\]"),
        ({"qkv_proj_lora_rank": 4}, "rank and alpha of qkv_proj are 4 and None"),
        ([], "found list"),
    ]:
        save_file(tensors, path, {"kwargs": json.dumps(settings)})
        with pytest.raises(ValueError, match=says):
            read_adapter(path, mochi)
    save_file(tensors, path, {"kwargs": json.dumps(good)})
    adapter = read_adapter(path, mochi)
    assert set(adapter.alpha.values()) == {8.0} and len(adapter.modules) == 3
    torch.save(tensors, tmp_path / "own.pt")  # the trainer's own file has no settings
    assert "alpha = rank is assumed" in read_adapter(tmp_path / "own.pt", mochi).notes[-1]


# --- experts and layers -------------------------------------------------------------------------------------


def test_experts(checkpoint, base, tmp_path: Path) -> None:
    """A checkpoint with two networks needs to know which; a file that states it is enough."""
    from inlaid import config, families

    folder = str(checkpoint("wan", "a14b"))
    high = families.get("wan")(config.Model(family="wan", checkpoint=folder, expert="high"))
    make = Make(high.load_denoiser(torch.float32), tmp_path / "in")
    path = make.save(plain(make))
    with pytest.raises(ValueError, match=r"--expert: .* has two experts; choose `high` .* or `low`"):
        import_adapter(path, tmp_path / "a", "wan", folder)
    for expert in ("high", "low"):
        _, notes = import_adapter(path, tmp_path / expert, "wan", folder, expert=expert)
        assert any("load_into_transformer_2=True" in n for n in notes) == (expert == "low")
    with pytest.raises(ValueError, match="the file names no expert"):
        import_adapter(path, tmp_path / "b", "wan", expert="high")
    with pytest.raises(ValueError, match="`both` is not high or low"):
        import_adapter(path, tmp_path / "b", "wan", expert="both")
    lone = made.experts(make, "diffusers", ("low",)).path
    import_adapter(lone, tmp_path / "lone", "wan")
    with pytest.raises(ValueError, match="an adapter of the low-noise expert, not of the high-noise expert"):
        import_adapter(lone, tmp_path / "b", "wan", folder, expert="high")
    both = made.experts(make, "ai-toolkit", ("high", "low")).path
    with pytest.raises(
        ValueError, match=r"adapters of two experts, high \(60 tensors\) and low \(60 tensors\)"
    ):
        read_adapter(both, WAN)
    out, _ = import_adapter(both, tmp_path / "one", "wan", folder, expert="low")
    assert out == tmp_path / "one" / WEIGHTS
    text = describe(inspect_path(both))
    assert "high noise" in text and "low noise" in text and "cannot be imported" not in text
    mixed = {**load_file(both), **{k: v for k, v in plain(make, "{}").items() if "q" in k}}
    refused(make, make.save(mixed), "name no expert, beside tensors of the experts high and low")


def test_layers_that_the_model_does_not_have(make: Make, base, tiny_wan: Path, tmp_path: Path) -> None:
    """Image layers of 2.1 on a model without them: refused, or left out by a flag that names them."""
    tensors = plain(make)
    extra = {"diffusion_model.blocks.1.cross_attn.k_img.lora_A.weight": torch.ones(3, 24)}
    extra["diffusion_model.blocks.1.cross_attn.k_img.lora_B.weight"] = torch.ones(24, 3)
    path = make.save({**tensors, **extra})
    with pytest.raises(ValueError, match=r"the network lacks 1 of the adapter's 21 layers \(.*add_k_proj\)"):
        import_adapter(path, tmp_path / "out", "wan", str(tiny_wan))
    _, notes = import_adapter(path, tmp_path / "out", "wan", str(tiny_wan), skip_missing=True)
    says = "left out 1 layers that the base model does not have (blocks.1.attn2.add_k_proj)"
    assert any(says in n for n in notes)
    with pytest.raises(ValueError, match="--skip-missing: needs --checkpoint"):
        import_adapter(path, tmp_path / "c", "wan", skip_missing=True)


def test_a_flat_convolution_needs_the_checkpoint(make: Make) -> None:
    case = made.odd_shapes(make, flat_convolution=True)
    refused(make, case.path, "the factors of patch_embedding do not state the size of the kernel")


def test_files_of_other_families_are_not_taken_for_wan(make: Make) -> None:
    """The blocks of CogVideoX have layers of the same names, under another name of the list."""
    a, b = torch.ones(3, 24), torch.ones(24, 3)
    for name in ("transformer.transformer_blocks.0.attn1.to_q", "lora_unet_transformer_blocks_0_attn1_to_q"):
        path = make.save({f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b})
        refused(make, path, "no tensor matches a layer of Wan")
    for name in ("pipe.vace.vace_blocks.0.self_attn.q", "lora_unet_vace_blocks_0_self_attn_q"):
        path = make.save({f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b})
        assert read_adapter(path, WAN).modules == ["vace_blocks.0.attn1.to_q"]


def test_a_name_that_depends_on_the_block(tmp_path: Path) -> None:
    from inlaid import families

    key = "diffusion_model.blocks.0.mod_y"
    tensors = {f"{key}.lora_A.weight": torch.ones(2, 8), f"{key}.lora_B.weight": torch.ones(8, 2)}
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"`blocks.0.mod_y` stands for .*norm1_context.linear or .*linear_1"):
        read_adapter(tmp_path / "a.safetensors", families.get("mochi"))


# --- LyCORIS ------------------------------------------------------------------------------------------------


def test_lycoris_files_that_cannot_be_read(make: Make) -> None:
    whole = load_file(made.lokr(make, "comfyui").path)
    key = f"diffusion_model.{original(LAYERS[0])}"
    for change, says in [
        ({f"{key}.dora_scale": torch.ones(24, 1)}, "lokr with dora_scale: weight decomposition of LyCORIS"),
        ({f"{key}.lokr_t2": torch.ones(2, 2, 1, 1)}, "Tucker decomposition is not supported"),
        (
            {f"{key}.lokr_w2_a": torch.ones(6, 5)},
            r"factors of shapes \(2, 6\) and \(6, 5\) cannot be multiplied",
        ),
        ({f"{key}.lokr_w1": torch.ones(4)}, r"lokr_w1 has shape \(4,\), not two axes"),
        ({f"{key}.lokr_w1": torch.full((4, 4), torch.inf)}, "1 layers with values that are not finite"),
        ({f"{key}.alpha": torch.tensor(torch.inf)}, "1 layers with values that are not finite"),
        ({f"{key}.lokr_w2": torch.ones(6, 6)}, "1 layers lack a factor of a LyCORIS adapter"),
    ]:
        refused(make, make.save({**whole, **change}), says)
    without = {k: v for k, v in whole.items() if k != f"{key}.lokr_w1"}
    refused(
        make,
        make.save(without),
        r"1 layers lack a factor of a LyCORIS adapter \(.*attn1.to_q has alpha, lokr_w2",
    )
    make.save(whole, "adapter_model.safetensors")
    make.config(peft_type="LOHA", r=2, alpha=2)
    refused(make, make.folder / "adapter_model.safetensors", "has peft_type LOHA, the tensors are of LOKR")
    make.config(peft_type="VERA", r=2)
    refused(make, make.folder / "adapter_model.safetensors", "has peft_type VERA, not LORA, LOKR or LOHA")


def test_a_lokr_that_would_be_too_large_as_a_lora(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = made.lokr(make, "SimpleTuner lycoris", factors={"attn": 6, "ffn": 2}, full=True)
    monkeypatch.setenv("INLAID_MAX_ARRAY_GB", "1e-5")
    with pytest.raises(ValueError, match=r"as an exact LoRA, the adapter has .* set INLAID_MAX_ARRAY_GB"):
        import_adapter(case.path, tmp_path / "out", "wan")
    assert not (tmp_path / "out").exists()


def test_a_lokr_can_be_merged_on_top(make: Make, base) -> None:
    """`--then` reads every kind as a LoRA."""
    for write in (made.lokr, lambda *of: made.loha(*of, alphas=(1.0, 3.0))):
        case = write(make, "musubi")
        merged = copy.deepcopy(base)
        merge_adapter(
            merged, read_adapter(case.path, WAN, base=base, shapes=layer_shapes(base), merging=True)
        )
        for key, delta in case.effect.items():
            got = merged.state_dict()[key] - base.state_dict()[key]
            torch.testing.assert_close(got, delta, atol=2e-6, rtol=0)


def test_a_lycoris_file_describes_itself(make: Make) -> None:
    text = describe(inspect_path(made.lokr(make, "ai-toolkit flat", full=True, alpha=9999999999.0).path))
    for part in ("family   wan", "layout   lycoris", "LoKr", "full factors", "not used: LyCORIS's rule"):
        assert part in text, text
    assert "cannot be imported" not in text


# --- MIDI ---------------------------------------------------------------------------------------------------


def test_an_own_adapter_of_all_layers_and_of_an_image_encoder(checkpoint, tmp_path: Path) -> None:
    """The demo's recipe trains `ff` and `skip_linear`; its adapter can be imported without the checkpoint."""
    from inlaid import config, families
    from inlaid.adapters import tuners

    model = config.Model(
        family="midi",
        checkpoint=str(checkpoint("midi", "scene")),
        options={"ff": True, "skip_linear": True, "image_encoders": "dino"},
    )
    family = families.get("midi")(model)
    network = family.load_denoiser(torch.float32)
    section = config.LowRank(kind="lora", rank=2)
    weights = tuners.attach(section, family.targets, network, seed=0)
    for p in weights.values():
        p.data.normal_(0, 0.1)
    tuners.save(section, network, tuners.weights(section, network), tmp_path / "run", metadata=family.about())
    out, notes = import_adapter(tmp_path / "run", tmp_path / "out", "midi")
    a, b = load_file(tmp_path / "run" / WEIGHTS), load_file(out)
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert any("skip_linear" in k for k in a) and any(".ff." in k for k in a)
    assert "copied the adapters of image_encoder_2 unchanged" in notes
    for file in (tmp_path / "run" / "image_encoder_2").iterdir():
        assert (tmp_path / "out" / "image_encoder_2" / file.name).read_bytes() == file.read_bytes()


# --- DoRA ---------------------------------------------------------------------------------------------------


def test_columns_in_some_layers_only(make: Make, base) -> None:
    """A `dora_scale` per input column makes a LoRA of full rank, which can stand beside plain layers."""
    case = made.dora_scale(make, "merged", columns=True, partial=True)
    adapter = read_adapter(case.path, WAN, base=base, shapes=layer_shapes(base))
    assert not adapter.dora
    merged = copy.deepcopy(base)
    merge_adapter(merged, adapter)
    for key, delta in case.effect.items():
        got = merged.state_dict()[key] - base.state_dict()[key]
        torch.testing.assert_close(got, delta, atol=2e-6, rtol=0)


# --- the command --------------------------------------------------------------------------------------------


def test_the_command(make: Make, tiny_wan: Path, tmp_path: Path) -> None:
    """Notes go to standard error, the path to standard output; a refusal is one sentence."""
    both = made.experts(make, "ai-toolkit", ("high", "low")).path
    done = inlaid("import", both, tmp_path / "two")
    assert done.code == 0, done.output
    assert done.out.strip() == str(tmp_path / "two")
    assert "note: adapters of two experts, in the folders high and low" in done.err
    assert "note: low: adapter of the low-noise expert: load it with load_into_transformer_2=True" in done.err
    path = make.save(plain(make))
    done = inlaid("import", path, tmp_path / "one", "--checkpoint", tiny_wan, "--skip-missing")
    assert done.code == 0 and done.out.strip() == str(tmp_path / "one" / WEIGHTS)
    path, _ = distillation(make, make.network)
    for options in ((), ("--alpha", "3"), ("--expert", "low"), ("--expert", "middle")):
        done = inlaid("import", path, tmp_path / "no", *options)
        assert done.code and "Traceback" not in done.output and not (tmp_path / "no").exists()


@pytest.mark.slow
def test_distillation_loras_are_merged_on_top_of_a_run(contract_run, tmp_path: Path) -> None:
    """`export --to merged --then FILE`: the base model, plus the run's adapter, plus all of the file."""
    from inlaid import families
    from inlaid.adapters.convert import export_run

    settings = contract_run(("wan", "t2v"))
    family = families.get("wan")(settings.model)
    base = family.load_denoiser(torch.float32)
    path, effect = distillation(Make(base, tmp_path / "in"), base)
    out = export_run(Path(settings.run), "merged", tmp_path / "merged", then=path)
    merged = family.load_denoiser(torch.float32, folder=out).state_dict()
    own = read_adapter(Path(settings.run) / "adapter", family)
    for key, weight in base.state_dict().items():
        wanted = effect[key].reshape(weight.shape).clone() if key in effect else torch.zeros(weight.shape)
        module = key.removesuffix(".weight")
        if module in own.alpha:
            a, b = (own.tensors[f"{module}.lora_{x}.weight"] for x in "AB")
            wanted += own.alpha[module] / a.shape[0] * b @ a
        torch.testing.assert_close(merged[key] - weight, wanted, atol=2e-6, rtol=0)
    with pytest.raises(ValueError, match="--skip-missing: applies to the adapter of --then"):
        export_run(Path(settings.run), "merged", tmp_path / "no", skip_missing=True)
