"""Mutilated adapter files: read, or refused by a sentence of ours; never by an error of the code."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from inlaid import families
from inlaid.adapters.inspect import describe, inspect_path
from inlaid.adapters.layers import layer_shapes
from inlaid.adapters.read import read_adapter, read_any
from support import imports as made
from support.imports import Make
from support.layouts import WAN
from support.slow import slow

SUFFIXES = (
    "lora_A.weight", "lora_B.weight", "lora_down.weight", "lora_up.weight", "lora_B.bias", "lora_A", "alpha",
    "dora_scale", "lora_magnitude_vector", "diff", "diff_b", "diff_m", "lokr_w1", "lokr_w1_a", "lokr_w1_b",
    "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2", "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b",
    "weight", "bias", "base_layer.weight", "base_layer.bias", "modules_to_save.default.weight", "matrix_A.0",
)  # fmt: skip

PREFIXES = (
    "", "transformer.", "transformer_2.", "diffusion_model.", "diffusion_model.transformer_1.", "lora_unet_",
    "lora_unet__", "lycoris_", "lora_transformer_", "base_model.model.", "pipe.dit.", "text_encoder.", "x.y.",
)  # fmt: skip

SHAPES = (
    (),
    (0,),
    (1,),
    (24,),
    (24, 1),
    (1, 24),
    (3, 24),
    (24, 3),
    (24, 24),
    (3, 24, 1, 1),
    (2, 2, 2),
    (0, 24),
)

DTYPES = (
    torch.float16,
    torch.bfloat16,
    torch.float64,
    torch.int64,
    torch.bool,
    torch.complex64,
    torch.float8_e4m3fn,
)

VALUES: tuple[Any, ...] = (
    None,
    0,
    -1,
    1.5,
    7,
    1e300,
    "x",
    "",
    [],
    {},
    True,
    ["to_q"],
    {"to_q": 3},
    {"q": "a"},
    {"(": 1},
)

FIELDS = (
    "r", "alpha", "lora_alpha", "rank_pattern", "alpha_pattern", "bias", "modules_to_save", "peft_type",
    "use_dora", "use_rslora", "target_modules", "init_lora_weights", "decompose_factor",
)  # fmt: skip

BUGS = (
    TypeError,
    AttributeError,
    KeyError,
    IndexError,
    AssertionError,
    StopIteration,
    ZeroDivisionError,
    RuntimeError,
)
"""Errors of the code, which `reading` turns into a sentence that names no cause."""


def mutated(tensors: dict[str, Any], header: dict[str, str], rng: random.Random) -> tuple[dict, dict]:
    """Change one to four things of a file, as damage or another program would."""
    tensors, header = dict(tensors), dict(header)
    for _ in range(rng.randint(1, 4)):
        key = rng.choice([*tensors])
        tensor, stem = tensors[key], key.rsplit(".", 2 if key.endswith("weight") else 1)[0]
        match rng.randrange(9):
            case 0:
                del tensors[key]
            case 1:
                tensors[f"{stem}.{rng.choice(SUFFIXES)}"] = tensors.pop(key)
            case 2:
                tensors[f"{stem}.{rng.choice(SUFFIXES)}"] = tensor.clone()
            case 3:
                tensors[rng.choice(PREFIXES) + key.split(".", 1)[-1]] = tensors.pop(key)
            case 4:
                tensors[key.replace("0", str(rng.choice((1, 7, "x"))), 1)] = tensors.pop(key)
            case 5:
                tensors[key] = torch.ones(rng.choice(SHAPES))
            case 6:
                tensors[key] = tensor.to(rng.choice(DTYPES))
            case 7:
                factor = rng.choice((0.0, float("nan"), float("inf"), 1e30, -1.0))
                tensors[key] = tensor if tensor.dtype == torch.float8_e4m3fn else tensor * factor
            case 8 if rng.random() < 0.5:
                name = rng.choice(("lora_alpha", "alpha", "ss_network_alpha", "kwargs", "inlaid_dora_scale"))
                header[name] = rng.choice(("4", "0", "nan", "x", "{}", '{"qkv_proj_lora_rank": 3}', "merged"))
            case _:
                values = {rng.choice(FIELDS): rng.choice(VALUES) for _ in range(3)}
                header["lora_adapter_metadata"] = json.dumps(
                    {f"transformer.{k}": v for k, v in values.items()}
                )
        if not tensors:
            break
    return tensors, header


FILES: dict[str, Callable[[Make], made.Case]] = {
    "LoRA": lambda m: made.spelled(m, "comfyui"),
    "flat LoRA": lambda m: made.spelled(m, "SimpleTuner lycoris"),
    "LoKr": lambda m: made.lokr(m, "comfyui"),
    "LoHa": lambda m: made.loha(m, "musubi", alphas=(1.0, 2.0)),
    "dora_scale": lambda m: made.dora_scale(m, "comfyui"),
    "experts": lambda m: made.experts(m, "ai-toolkit", ("high", "low")),
    "convolution": lambda m: made.odd_shapes(m, True),
    "whole layers": lambda m: made.of_peft(m, bias="all", modules_to_save=["proj_out"]),
}


@pytest.mark.parametrize("count", [6, slow(400)])
@pytest.mark.parametrize("name", FILES)
def test_mutations(base, tmp_path: Path, name: str, count: int) -> None:
    path = FILES[name](Make(base, tmp_path / "in")).path
    path = path if path.is_file() else path / "adapter_model.safetensors"
    tensors, shapes, rng = load_file(path), layer_shapes(base), random.Random(f"{name} {count}")
    read = refused = 0
    for i in range(count):
        own, header = mutated(tensors, {}, rng)
        save_file({k: v.contiguous() for k, v in own.items()}, path, metadata=header)
        how: dict[str, Any] = {"shapes": shapes, "base": base, "skip_missing": i % 2 == 0}
        for look in (
            lambda: read_any(path, WAN),
            lambda how=how: read_any(path, WAN, dora_scale="merged", **how),
            lambda: read_adapter(path, WAN, shapes=shapes, base=base, merging=True, expert="low"),
            lambda: describe(inspect_path(path)),
        ):
            try:
                look()
                read += 1
            except ValueError as error:
                refused += 1
                assert path.parent.name in str(error) and "\n" not in str(error), own.keys()
                assert not isinstance(error.__cause__, BUGS), (repr(error.__cause__), str(error))
    assert read and refused


@pytest.mark.parametrize("count", [6, slow(300)])
@pytest.mark.parametrize("name", ["genmo", "SAT"])
def test_mutations_of_other_families(tmp_path: Path, name: str, count: int) -> None:
    kind = families.get("mochi" if name == "genmo" else "cogvideox")
    tensors: dict[str, Any] = {}
    for i in range(2):
        if name == "genmo":
            for part in ("qkv_x", "proj_x"):
                rows = 24 if part == "qkv_x" else 8
                tensors[f"blocks.{i}.attn.{part}.lora_A"] = torch.ones(3, 8)
                tensors[f"blocks.{i}.attn.{part}.lora_B"] = torch.ones(rows, 3)
            continue
        for part, k in (("query_key_value", 0), ("query_key_value", 2), ("dense", 0)):
            tensors[f"model.layers.{i}.attention.{part}.matrix_A.{k}"] = torch.ones(3, 8)
            tensors[f"model.layers.{i}.attention.{part}.matrix_B.{k}"] = torch.ones(8, 3)
    settings = {f"{k}_lora_{x}": 3 for k in ("qkv_proj", "out_proj") for x in ("rank", "alpha")}
    rng, path = random.Random(name), tmp_path / "a.safetensors"
    refused = 0
    for _ in range(count):
        own, header = mutated(tensors, {"kwargs": json.dumps(settings)}, rng)
        save_file({k: v.contiguous() for k, v in own.items()}, path, metadata=header)
        for look in (lambda: read_any(path, kind, alpha=3), lambda: describe(inspect_path(path))):
            try:
                look()
            except ValueError as error:
                refused += 1
                assert not isinstance(error.__cause__, BUGS), (repr(error.__cause__), str(error))
    assert refused
