"""Files of other programs have exactly the effect after import that they have there, or are refused."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from inlaid import config, families
from inlaid.adapters.adapter import WEIGHTS
from inlaid.adapters.importing import import_adapter
from inlaid.adapters.inspect import describe, inspect_path
from support import imports as made
from support.imports import Case, Make
from support.slow import mostly_slow

LIMIT = 1e-5
"""Largest deviation, relative to the largest change of a weight."""

Checkpoint = Callable[[str, str], Path]


@pytest.fixture(scope="module")
def networks(checkpoint: Checkpoint) -> Callable[..., tuple[Path, nn.Module]]:
    """A function that gives a random checkpoint and its network, loaded once; not to be changed."""
    known: dict[tuple[str, str, str | None], tuple[Path, nn.Module]] = {}

    def get(family: str, variant: str, expert: str | None = None) -> tuple[Path, nn.Module]:
        if (family, variant, expert) not in known:
            folder = checkpoint(family, variant)
            model = config.Model(family=family, checkpoint=str(folder), expert=expert)  # type: ignore[arg-type]
            known[family, variant, expert] = folder, families.get(family)(model).load_denoiser(torch.float32)
        return known[family, variant, expert]

    return get


def effect(folder: Path, network: nn.Module) -> dict[str, Tensor]:
    """The change of every parameter by an adapter that diffusers, or for LoHa peft, loads and merges."""
    import peft
    from peft.tuners.tuners_utils import BaseTunerLayer

    before = {k: v.clone() for k, v in network.state_dict().items()}
    model: Any = copy.deepcopy(network)
    with safe_open(folder / WEIGHTS, "pt") as file:
        about = json.loads(file.metadata()["lora_adapter_metadata"])
    if about["transformer.peft_type"] == "LOHA":
        about = {k.removeprefix("transformer."): v for k, v in about.items() if not k.endswith("peft_type")}
        model = peft.inject_adapter_in_model(peft.LoHaConfig(**about), model)
        tensors = {k.removeprefix("transformer."): v for k, v in load_file(folder / WEIGHTS).items()}
        assert not peft.set_peft_model_state_dict(model, tensors).unexpected_keys
    else:
        model.load_lora_adapter(folder, prefix="transformer", weight_name=WEIGHTS, use_safetensors=True)
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.merge()
    after = {k.replace(".base_layer.", "."): v for k, v in model.state_dict().items()}
    changed = {k: after[k] - v for k, v in before.items()}
    return {k: v for k, v in changed.items() if v.any()}


FIGURES: dict[str, tuple[float, float]] = {}
"""Of each case: the largest deviation, and the largest change of a weight."""


def compare(name: str, got: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """The same parameters change, each by the same amount."""
    assert got.keys() == wanted.keys()
    largest = max(v.abs().max().item() for v in wanted.values())
    error = max((got[k] - wanted[k].reshape(got[k].shape)).abs().max().item() for k in wanted)
    FIGURES[name] = error, largest
    assert error <= LIMIT * max(1.0, largest), name
    assert largest > 0.01


CASES: dict[str, tuple[tuple[str, str], Callable[[Make], Case]]] = {
    **{f"LoRA, {s}": (("wan", "t2v"), lambda m, s=s: made.spelled(m, s)) for s in made.SPELLINGS},
    "peft, adapter_model.bin": (("wan", "t2v"), made.peft_bin),
    "peft, patterns in original names": (("wan", "t2v"), lambda m: made.patterns(m, originals=True)),
    "peft, patterns in diffusers names": (("wan", "t2v"), lambda m: made.patterns(m, originals=False)),
    "peft, patterns with rslora": (("wan", "t2v"), lambda m: made.patterns(m, originals=True, rslora=True)),
    "peft, bias lora_only": (("wan", "t2v"), lambda m: made.of_peft(m, bias="lora_only")),
    "peft, modules_to_save": (("wan", "t2v"), lambda m: made.of_peft(m, modules_to_save=["proj_out"])),
    "peft, lora_bias": (("wan", "t2v"), lambda m: made.of_peft(m, lora_bias=True)),
    "peft, DoRA": (("wan", "t2v"), lambda m: made.of_peft(m, use_dora=True)),
    **{
        f"alpha in the header, {key}": (("wan", "t2v"), lambda m, key=key: made.plain_alpha(m, key))
        for key in ("lora_alpha", "ss_network_alpha", "network_alpha", "alpha")
    },
    "axes of size 1, convolution": (("wan", "t2v"), lambda m: made.odd_shapes(m, False)),
    "axes of size 1, flat convolution": (("wan", "t2v"), lambda m: made.odd_shapes(m, True)),
    **{
        f"{p}, {' and '.join(w)} expert": (("wan", "a14b"), lambda m, p=p, w=w: made.experts(m, p, w))
        for p in made.EXPERTS
        for w in (("low",), ("high", "low"))
    },
    "ai-toolkit, high expert": (("wan", "a14b"), lambda m: made.experts(m, "ai-toolkit", ("high",))),
    "ai-toolkit LoKr, full": (
        ("wan", "t2v"),
        lambda m: made.lokr(m, "comfyui", full=True, alpha=9999999999.0, says="two full factors"),
    ),
    "ai-toolkit LoKr, full, alpha inf": (
        ("wan", "t2v"),
        lambda m: made.lokr(m, "comfyui", full=True, alpha=9999999999.0, dtype=torch.float16),
    ),
    "ai-toolkit LoKr, rank 2": (("wan", "t2v"), lambda m: made.lokr(m, "comfyui")),
    "ai-toolkit LoKr, flat": (("wan", "t2v"), lambda m: made.lokr(m, "ai-toolkit flat", rank=1)),
    "musubi LoKr": (("wan", "t2v"), lambda m: made.lokr(m, "musubi", factors={"attn": -1, "ffn": -1})),
    "SimpleTuner LoKr, both decomposed": (
        ("wan", "t2v"),
        lambda m: made.lokr(m, "SimpleTuner lycoris", both=True),
    ),
    "SimpleTuner LoKr, full w2 beside w1 of rank 2": (
        ("wan", "t2v"),
        lambda m: made.lokr(m, "SimpleTuner lycoris", both=True, full=True),
    ),
    "SimpleTuner LoKr, two factors": (
        ("wan", "t2v"),
        lambda m: made.lokr(
            m, "SimpleTuner lycoris", factors={"attn": 6, "ffn": 2}, says="converted to an exact LoRA"
        ),
    ),
    "diffusion-pipe LoKr": (("wan", "t2v"), lambda m: made.lokr(m, "comfyui", rule="peft")),
    "diffusion-pipe LoKr, full": (
        ("wan", "t2v"),
        lambda m: made.lokr(m, "comfyui", rule="peft", full=True, rank=32),
    ),
    "musubi LoHa": (("wan", "t2v"), lambda m: made.loha(m, "musubi", alphas=(3.0, 3.0))),
    "SimpleTuner LoHa, ranks and alphas differ": (
        ("wan", "t2v"),
        lambda m: made.loha(m, "SimpleTuner lycoris", ranks=(2, 3), alphas=(3.0, 1.0)),
    ),
    "dora_scale, ComfyUI": (("wan", "t2v"), lambda m: made.dora_scale(m, "comfyui")),
    "dora_scale, ComfyUI, some layers": (
        ("wan", "t2v"),
        lambda m: made.dora_scale(m, "comfyui", partial=True),
    ),
    "dora_scale, OneTrainer": (("wan", "t2v"), lambda m: made.dora_scale(m, "merged")),
    "dora_scale, OneTrainer, columns": (("wan", "t2v"), lambda m: made.dora_scale(m, "merged", columns=True)),
    "I2V image layers, ComfyUI": (("wan", "i2v"), lambda m: made.spelled(m, "comfyui", I2V)),
    "I2V image layers, musubi": (("wan", "i2v"), lambda m: made.spelled(m, "musubi", I2V)),
    "genmo Mochi": (("mochi", "t2v"), lambda m: made.genmo(m, "safetensors")),
    "genmo Mochi, torch file": (("mochi", "t2v"), lambda m: made.genmo(m, "pt")),
    "Mochi, ComfyUI": (("mochi", "t2v"), made.mochi_comfyui),
    **{
        f"SAT CogVideoX, {w or 'bare'}": (("cogvideox", "2b"), lambda m, w=w: made.sat(m, w))
        for w in ("module", "model", "state_dict", "")
    },
    "CogVideoX, ComfyUI": (("cogvideox", "5b"), lambda m: made.cogvideox(m, "comfyui")),
    "CogVideoX, kijai": (("cogvideox", "5b"), lambda m: made.cogvideox(m, "kijai")),
    **{
        f"MIDI lora_weights.pth, {p or 'bare'} {a or 'no adapter name'} {w or 'top level'}": (
            ("midi", "scene"),
            lambda m, p=p, a=a, w=w: made.midi(m, p, a, w),
        )
        for p, w in (("base_model.model.", ""), ("transformer.", "state_dict"), ("", "model"))
        for a in ("", ".default")
    },
}
"""Name -> family and variant of the checkpoint, and the file."""

I2V = [
    *made.LAYERS,
    *(f"blocks.{i}.attn2.add_{x}_proj" for i in range(2) for x in "kv"),
    "condition_embedder.image_embedder.ff.net.0.proj",
    "condition_embedder.time_proj",
    "proj_out",
]


OFTEN = {
    "LoRA, SimpleTuner lycoris",
    "peft, patterns in original names",
    "axes of size 1, flat convolution",
    "ai-toolkit, high and low expert",
    "ai-toolkit LoKr, full, alpha inf",
    "SimpleTuner LoKr, two factors",
    "SimpleTuner LoHa, ranks and alphas differ",
    "Mochi, ComfyUI",
    "SAT CogVideoX, module",
}
"""Cases that `make test` runs."""

ASKS = ("dora_scale", "peft, bias", "peft, modules_to_save", "axes of size 1, flat", "Mochi, ComfyUI")
"""Files that cannot be imported without the checkpoint, by the start of their name."""


@pytest.mark.parametrize("name", mostly_slow(CASES, OFTEN.__contains__))
def test_effect(networks: Callable[..., tuple[Path, nn.Module]], tmp_path: Path, name: str) -> None:
    (family, variant), write = CASES[name]
    expert = "high" if variant == "a14b" else None
    folder, network = networks(family, variant, expert)
    case = write(Make(network, tmp_path / "in"))
    out, notes = import_adapter(case.path, tmp_path / "out", family, str(folder), **case.options)
    assert case.says in "\n".join(notes)
    if not case.parts:
        compare(name, effect(out.parent, network), case.effect)
    for part, wanted in case.parts.items():
        compare(f"{name}: {part}", effect(tmp_path / "out" / part, network), wanted)
    text = describe(inspect_path(case.path))
    assert family in text and ("cannot be imported" in text) <= name.startswith((*ASKS, "SAT"))
    try:  # without the checkpoint: the same file, or a request for it
        import_adapter(case.path, tmp_path / "alone", family, **case.options)
    except ValueError as error:
        assert name.startswith(ASKS) and "pass the base model" in str(error)
        return
    assert not name.startswith(ASKS)
    for path in (tmp_path / "out").rglob(WEIGHTS):
        one, two = load_file(path), load_file(tmp_path / "alone" / path.relative_to(tmp_path / "out"))
        assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


def test_table() -> None:
    """Prints one row for each case above: run the file with `-s` and all marks."""
    print(f"\n{'file':<60} {'deviation':>10} {'of':>8}")
    for name, (error, largest) in FIGURES.items():
        print(f"{name:<60} {error:>10.1e} {largest:>8.3f}")
    assert all(error <= LIMIT * max(1.0, largest) for error, largest in FIGURES.values())
