"""Published adapters of joint transparency come in whole, at their own strength, or are refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from inlaid import config, families
from inlaid.adapters.read import read_adapter
from inlaid.alpha.joint import WEIGHTS
from inlaid.alpha.opening import build_family
from inlaid.networks.domain_embedding import EMBEDDING, NAME
from inlaid.networks.half_tokens import HalfTokens
from inlaid.tiny import random
from support.commands import inlaid

WIDTH = 24
LEAVES = ("to_q", "to_k", "to_v", "to_out.0")
Checkpoint = Callable[[str, str], Path]


def factors(rank: int = 128, width: int = WIDTH) -> tuple[Tensor, Tensor]:
    return torch.randn(rank, width), torch.randn(width, rank)


def cogvideox(blocks: int = 42, width: int = WIDTH, **changes: Tensor) -> dict[str, Tensor]:
    """As `cogvideox_rgba_lora.safetensors`: 336 tensors and a vector, no rank, no alpha."""
    out = {"domain_emb": torch.randn(1, 1, width)}
    for i in range(blocks):
        for leaf in LEAVES:
            name = f"transformer.transformer_blocks.{i}.attn1.{leaf}"
            out[f"{name}.lora_A.weight"], out[f"{name}.lora_B.weight"] = factors(width=width)
    return {**out, **changes}


def mochi(blocks: int = 48, width: int = WIDTH) -> dict[str, Tensor]:
    """As the `state_dict` of `checkpoint-{step}.pt`: 384 tensors."""
    out = {}
    for i in range(blocks):
        for leaf in ("q", "k", "v", "out"):
            name = f"block_{i}.to_{leaf}_lora"
            out[f"{name}.0.weight"], out[f"{name}.1.weight"] = factors(width=width)
    return out


def wan(blocks: int = 3) -> dict[str, Tensor]:
    """The recipe of the same authors for Wan, rank 256."""
    out = {"transformer.modality_embedding": torch.randn(1, WIDTH)}
    layers = [f"self_attn.{x}" for x in "qkvo"] + ["cross_attn.q", "cross_attn.o", "ffn.0", "ffn.2"]
    for i in range(blocks):
        for layer in layers:
            name = f"diffusion_model.blocks.{i}.{layer}"
            out[f"{name}.lora_A.weight"], out[f"{name}.lora_B.weight"] = factors(256)
    return out


def write(path: Path, tensors: Mapping[str, Tensor]) -> Path:
    if path.suffix == ".pt":
        torch.save({"state_dict": dict(tensors), "optimizer": {}, "lr_scheduler": {}, "global_step": 5}, path)
    else:
        save_file(dict(tensors), path)
    return path


FILES: dict[str, tuple[str, Callable[[], dict[str, Tensor]], int, int, str]] = {
    "cogvideox": ("cogvideox_rgba_lora.safetensors", cogvideox, 336, 128, "bias"),
    "mochi": ("checkpoint-2000.pt", mochi, 384, 128, "block"),
    "wan": ("joint.safetensors", wan, 48, 256, "block"),
}


@pytest.mark.parametrize("family", FILES)
def test_every_tensor_arrives_at_its_own_scale(family: str, tmp_path: Path) -> None:
    name, make, count, rank, rule = FILES[family]
    there = make()
    path = write(tmp_path / name, there)
    done = inlaid("import", path, tmp_path / "out", "--family", family)
    assert done.code == 0, done.output
    for words in (
        "joint transparency",
        "alpha is 1 in all published files",
        f"text_to_alpha: {rule}",
        "license",
    ):
        assert words in " ".join(done.output.split()), done.output
    found = load_file(tmp_path / "out" / WEIGHTS)
    assert len(found) == count
    adapter = read_adapter(tmp_path / "out", families.get(family))
    assert adapter.joint and {adapter.scale(m) for m in adapter.modules} == {1 / rank}
    before, after = (
        [t for k, t in sorted(x.items()) if t.ndim == 2 and t.shape[0] > 1] for x in (there, found)
    )
    assert len(before) == len(after) == count
    assert sum(any(torch.equal(a, b) for b in before) for a in after[:12]) == 12, "no number is changed"
    vector = tmp_path / "out" / EMBEDDING
    given = there.get("domain_emb", there.get("transformer.modality_embedding"))
    assert vector.exists() == (given is not None)
    if given is not None:
        assert torch.equal(load_file(vector)[NAME], given.flatten())
    with safe_open(tmp_path / "out" / WEIGHTS, "pt") as file:
        header = file.metadata()
    assert header["inlaid_alpha"] == "joint" and header["inlaid_text_to_alpha"] == rule
    assert header["inlaid_domain_embedding"] == ("no" if given is None else "yes")
    for place in (path, tmp_path / "out"):
        message = " ".join(inlaid("inspect", place).output.split())
        assert "transparency joint" in message and "cannot be imported" not in message, message
        assert "domain embedding" in message


def test_another_alpha_may_be_given(tmp_path: Path) -> None:
    path = write(tmp_path / "cogvideox_rgba_lora.safetensors", cogvideox(2))
    adapter = read_adapter(path, families.get("cogvideox"), alpha=128)
    assert {adapter.scale(m) for m in adapter.modules} == {1.0}


def drop(tensors: dict[str, Tensor], part: str) -> dict[str, Tensor]:
    return {k: v for k, v in tensors.items() if part not in k}


def other(tensors: dict[str, Tensor], part: str, rank: int = 64) -> dict[str, Tensor]:
    """The same with another rank where `part` is in the name."""
    out = dict(tensors)
    for key in (k for k in tensors if part in k):
        a, b = factors(rank)
        out[key] = a if ("lora_A" in key or ".0.weight" in key) else b
    return out


Q = "transformer.transformer_blocks.1.attn1.to_q"
WRONG: dict[str, tuple[str, dict[str, Tensor], str]] = {
    "half of a layer": (
        "cogvideox",
        drop(cogvideox(2), f"{Q}.lora_B"),
        "incomplete: 1 tensors are missing, such as those of to_q of block 1",
    ),
    "a layer": ("cogvideox", drop(cogvideox(2), Q), "incomplete: 2 tensors are missing"),
    "a block": (
        "cogvideox",
        drop(cogvideox(3), ".1."),
        "incomplete: 8 tensors are missing, such as those of to_k of",
    ),
    "only the vector": ("cogvideox", {"domain_emb": torch.zeros(1, 1, 8)}, "incomplete"),
    "more": (
        "cogvideox",
        cogvideox(1, extra=torch.zeros(2)),
        "1 unexpected tensors (extra)",
    ),
    "more layers": (
        "cogvideox",
        cogvideox(1, **{"transformer.transformer_blocks.0.ff.net.2.lora_A.weight": torch.zeros(2, 2)}),
        "unexpected tensors (transformer.transformer_blocks.0.ff.net.2.lora_A.weight)",
    ),
    "ranks": ("cogvideox", other(cogvideox(2), Q), "different ranks, 128 (7), 64 (1)"),
    "a vector for each token": (
        "cogvideox",
        cogvideox(1, domain_emb=torch.zeros(1, 4, WIDTH)),
        "the domain embedding has shape (1, 4, 24)",
    ),
    "half a Mochi": ("mochi", drop(mochi(2), "block_1.to_out_lora.1"), "such as those of out of block 1"),
    "more of Mochi": ("mochi", {**mochi(1), "step": torch.zeros(1)}, "unexpected tensors (step)"),
    "ranks of Mochi": ("mochi", other(mochi(2), "block_0.to_k"), "different ranks"),
    "of Wan and something": (
        "wan",
        {**wan(1), "transformer.x": torch.zeros(1)},
        "unexpected tensors (transformer.x)",
    ),
    "half a Wan": ("wan", drop(wan(2), "blocks.1.ffn.2.lora_B"), "1 layers lack a factor, A or B"),
    "no layer of Wan": (
        "wan",
        {**wan(1), "diffusion_model.x.lora_A.weight": torch.zeros(256, 2)},
        "match no layer",
    ),
    "another family": ("wan", cogvideox(1), "no tensor matches a layer of Wan"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_files_are_refused_with_a_sentence(name: str, tmp_path: Path) -> None:
    family, tensors, says = WRONG[name]
    path = write(tmp_path / ("x.pt" if "Mochi" in name else "x.safetensors"), tensors)
    done = inlaid("import", path, tmp_path / "out", "--family", family)
    assert done.code == 2 and "Traceback" not in done.output
    assert says.replace(" ", "") in "".join(done.output.split()), done.output
    assert not (tmp_path / "out").exists()


def test_made_for_another_size(checkpoint: Checkpoint, tmp_path: Path) -> None:
    path = write(tmp_path / "x.safetensors", cogvideox(2, width=24))
    done = inlaid(
        "import",
        path,
        tmp_path / "out",
        "--family",
        "cogvideox",
        "--checkpoint",
        checkpoint("cogvideox", "5b"),
    )
    assert done.code == 2 and "trained on a network of another size" in " ".join(done.output.split())


def fitting(network: Any, family: str) -> dict[str, Tensor]:
    blocks = len(network.transformer_blocks)
    width = network.config.num_attention_heads * network.config.attention_head_dim
    return cogvideox(blocks, width) if family == "cogvideox" else mochi(blocks, width)


@pytest.mark.parametrize("case", [("cogvideox", "5b"), ("mochi", "t2v")], ids="-".join)
def test_an_imported_file_does_what_its_numbers_say(
    case: tuple[str, str], checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """In our pipeline: the vector and the update, for alpha, at 1/128."""
    raw = {
        "run": "x",
        "model": {**random.model(*case), "checkpoint": str(checkpoint(*case))},
        "data": {"sources": "x"},
        "alpha": {"kind": "joint", "text_to_alpha": "bias", "domain_embedding": case[0] == "cogvideox"},
    }
    family: Any = build_family(config.build(raw))
    there = fitting(family.load_denoiser(torch.float32, meta=True), case[0])
    path = write(tmp_path / ("x.safetensors" if case[0] == "cogvideox" else "x.pt"), there)
    done = inlaid("import", path, tmp_path / "out", "--family", case[0], "--checkpoint", checkpoint(*case))
    assert done.code == 0, done.output
    pipe = family.pipeline(denoiser=None, device=torch.device("cpu"), dtype=torch.float32)
    family.load_adapter(pipe, tmp_path / "out")
    layer = pipe.transformer.transformer_blocks[1].attn1.to_v
    assert isinstance(layer, HalfTokens) and layer.scaling["inlaid"] == 1 / 128  # type: ignore[attr-defined]
    names = {"cogvideox": ["transformer.transformer_blocks.1.attn1.to_v.lora_A.weight", "lora_B"]}
    a, b = (
        (there[names["cogvideox"][0]], there[names["cogvideox"][0].replace("lora_A", "lora_B")])
        if case[0] == "cogvideox"
        else (there["block_1.to_v_lora.0.weight"], there["block_1.to_v_lora.1.weight"])
    )
    x = torch.randn(1, family.text_before + 8, a.shape[1])
    with torch.no_grad():
        change = layer(x) - layer.base_layer(x)  # type: ignore[attr-defined]
    assert not change[:, :-4].any()
    assert torch.allclose(change[:, -4:], x[:, -4:] @ a.T @ b.T / 128, atol=1e-4)
    if case[0] == "cogvideox":
        assert torch.equal(pipe.transformer.domain_embedding.weight, there["domain_emb"].flatten())


def test_stock_pipelines_take_such_a_file_for_all_tokens_at_the_right_scale(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """What the documentation says of them."""
    case = ("cogvideox", "5b")
    family = families.get("cogvideox")(config.Model(**random.model(*case), checkpoint=str(checkpoint(*case))))
    there = fitting(family.load_denoiser(torch.float32, meta=True), "cogvideox")
    raw = write(tmp_path / "x.safetensors", there)
    pipe = family.pipeline(denoiser=None, device=torch.device("cpu"), dtype=torch.float32)
    with pytest.raises(ValueError, match="lora"):
        pipe.load_lora_weights(str(raw))
    assert inlaid("import", raw, tmp_path / "out", "--family", "cogvideox").code == 0
    pipe.load_lora_weights(str(tmp_path / "out"), adapter_name="inlaid")
    layer = pipe.transformer.transformer_blocks[0].attn1.to_q
    x = torch.randn(1, 234, layer.in_features)
    assert layer.scaling["inlaid"] == 1 / 128 and (layer(x) - layer.base_layer(x)).abs().amin(-1).min() > 0


def test_joint_and_other_adapters_are_not_mistaken_for_each_other(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    case = ("cogvideox", "5b")
    raw = {
        "run": "x",
        "model": {**random.model(*case), "checkpoint": str(checkpoint(*case))},
        "data": {"sources": "x"},
        "alpha": {"kind": "joint"},
    }
    family: Any = build_family(config.build(raw))
    there = fitting(family.load_denoiser(torch.float32, meta=True), "cogvideox")
    write(tmp_path / "x.safetensors", there)
    assert inlaid("import", tmp_path / "x.safetensors", tmp_path / "out", "--family", "cogvideox").code == 0
    opaque = {k: v for k, v in there.items() if k != "domain_emb"}
    (tmp_path / "opaque").mkdir()
    write(tmp_path / "opaque" / WEIGHTS, opaque)
    pipe = family.pipeline(denoiser=None, device=torch.device("cpu"), dtype=torch.float32)
    with pytest.raises(ValueError, match=r"trained with alpha.kind=opaque, for all tokens"):
        family.load_adapter(pipe, tmp_path / "opaque")
    with pytest.raises(ValueError, match=r"trained with alpha.kind=joint"):
        family.single.accept({"inlaid_alpha": "joint"})
    (tmp_path / "out" / EMBEDDING).unlink()
    with pytest.raises(ValueError, match=r"domain_embedding.safetensors of this adapter is missing"):
        family.load_adapter(pipe, tmp_path / "out")
    with pytest.raises(ValueError, match=r"is missing"):
        read_adapter(tmp_path / "out", families.get("cogvideox"))
