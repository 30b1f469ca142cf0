"""Adapters that cannot be used as they are end in one clear message."""

from __future__ import annotations

import copy
import json
import pickle
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from inlaid.adapters.inspect import inspect_path
from inlaid.adapters.layers import layer_shapes
from inlaid.adapters.merge import attach_adapter, merge_adapter
from inlaid.adapters.read import read_adapter
from inlaid.adapters.write import write_diffusers
from support.layouts import ALL, WAN, original, spell, trained

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
        "1 full weight differences, which an adapter cannot represent .*proj_out.diff_b",
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
