"""Whole models in one file: detected by ComfyUI's rules, with exactly the tensors of its network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from inlaid import config, families
from inlaid.adapters.whole_model import read_folder, write_original
from support.clients.comfy_models import detect, network
from support.slow import mostly_slow


def made(family: str, folder: Path, **sizes: Any) -> tuple[Any, Any]:
    """A checkpoint of two blocks whose fixed sizes are those of the published models, and its denoiser."""
    import diffusers

    checkpoint = next(c for c in families.get(family).published if c in sizes["of"])
    values = dict(families.get(family).published[checkpoint]["transformer"])
    kind = getattr(diffusers, values.pop("_class_name"))
    torch.manual_seed(0)
    denoiser = kind.from_config({**values, "num_layers": 2, **sizes["smaller"]})
    denoiser.save_pretrained(folder / "transformer")
    return families.get(family)(
        config.Model(family=family, checkpoint=checkpoint, **sizes.get("model", {}))
    ), denoiser


WAN: dict[str, Any] = {"num_attention_heads": 1, "ffn_dim": 256}
CASES = {
    "t2v": ("wan", {"of": ["Wan-AI/Wan2.1-T2V-1.3B-Diffusers"], "smaller": WAN}, "wan-t2v"),
    "i2v": (
        "wan",
        {"of": ["Wan-AI/Wan2.1-I2V-14B-480P-Diffusers"], "smaller": {**WAN, "added_kv_proj_dim": 128}},
        "wan-i2v",
    ),
    "flf2v": (
        "wan",
        {"of": ["Wan-AI/Wan2.1-FLF2V-14B-720P-diffusers"], "smaller": {**WAN, "added_kv_proj_dim": 128}},
        "wan-i2v",
    ),
    "ti2v": ("wan", {"of": ["Wan-AI/Wan2.2-TI2V-5B-Diffusers"], "smaller": WAN}, "wan-2.2"),
    "a14b": (
        "wan",
        {"of": ["Wan-AI/Wan2.2-I2V-A14B-Diffusers"], "smaller": WAN, "model": {"expert": "high"}},
        "wan-t2v",
    ),
    "cog-5b": (
        "cogvideox",
        {"of": ["THUDM/CogVideoX-5b"], "smaller": {"num_attention_heads": 1}},
        "cogvideox",
    ),
    "cog-2b": (
        "cogvideox",
        {"of": ["THUDM/CogVideoX-2b"], "smaller": {"num_attention_heads": 1}},
        "cogvideox",
    ),
    "cog-1.5-i2v": (
        "cogvideox",
        {"of": ["THUDM/CogVideoX1.5-5B-I2V"], "smaller": {"num_attention_heads": 1}},
        "cogvideox-i2v",
    ),
}


@pytest.mark.parametrize("case", mostly_slow(list(CASES), ("i2v", "cog-2b").__contains__))
def test_comfyui_builds_the_network_of_the_file(case: str, tmp_path: Path) -> None:
    name, sizes, kind = CASES[case]
    family, denoiser = made(name, tmp_path, **sizes)
    assert family.export_problem("comfyui", True) is None and family.export_notes("comfyui", True) == ()
    extra = family.comfyui_tensors()
    if case == "cog-2b":
        family.transformer["num_attention_heads"] = 1
        extra = family.comfyui_tensors()
        table = denoiser.patch_embed.pos_embedding
        torch.testing.assert_close(extra["patch_embed.pos_embedding"], table.float(), rtol=0, atol=1e-6)
    path = write_original(
        tmp_path / "m.safetensors",
        read_folder(tmp_path / "transformer"),
        family,
        extra=extra,
        dtype=torch.bfloat16,
    )
    file = load_file(path)
    shapes = {k: tuple(t.shape) for k, t in file.items()}
    found = detect(shapes)
    assert found is not None and found[0] == kind
    assert shapes == network(*found)
    assert {t.dtype for t in file.values()} == {torch.bfloat16} and all(
        t.is_contiguous() for t in file.values()
    )
    assert detect({k: tuple(t.shape) for k, t in denoiser.state_dict().items()}) is None
    back = family.original.to_diffusers(
        {k: t for k, t in file.items() if k not in extra}, denoiser.state_dict()
    )
    assert all(torch.equal(back[k], t.bfloat16()) for k, t in denoiser.state_dict().items())


def test_mochi_in_one_file_runs_as_before(tmp_path: Path) -> None:
    """ComfyUI's sizes are fixed, so a small file cannot load there; the weights come back to the last bit."""
    from inlaid.tiny import random

    folder = random.build("mochi", tmp_path / "model")
    family = families.get("mochi")(config.Model(family="mochi", checkpoint=str(folder)))
    assert "num_layers 2 instead of 48" in family.export_notes("comfyui", True)[0]
    denoiser: Any = family.load_denoiser(torch.float32).eval()
    path = write_original(tmp_path / "m.safetensors", denoiser.state_dict(), family)
    assert {"t5_yproj.weight", "blocks.1.attn.qkv_y.weight", "final_layer.mod.bias"} <= load_file(path).keys()
    again: Any = type(denoiser).from_config(denoiser.config).eval()
    again.load_state_dict(family.original.to_diffusers(load_file(path), again.state_dict()))
    x, text = torch.randn(1, 12, 2, 4, 4), torch.randn(1, 6, denoiser.config.text_embed_dim)
    inputs = x, text, torch.tensor([300.0]), torch.ones(1, 6, dtype=torch.bool)
    with torch.no_grad():
        assert torch.equal(*(net(*inputs, return_dict=False)[0] for net in (denoiser, again)))


def test_a_file_that_differs_is_not_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wan = families.get("wan")
    state = {"blocks.0.norm2.weight": torch.ones(3), "scale_shift_table": torch.zeros(1, 2, 3)}
    right = wan.original.to_original
    monkeypatch.setattr(wan.original, "to_original", lambda s: {k: t + 1 for k, t in right(s).items()})
    with pytest.raises(AssertionError, match="differs in the file"):
        write_original(tmp_path / "m.safetensors", state, wan)
    monkeypatch.setattr(wan.original, "to_original", lambda s: dict(list(right(s).items())[:1]))
    with pytest.raises(AssertionError, match="not written: scale_shift_table"):
        write_original(tmp_path / "m.safetensors", state, wan)
    assert not list(tmp_path.iterdir())
