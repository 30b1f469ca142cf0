"""`inlaid export` of runs of every family and tuner to every target: exact in the program, or refused.

Run with `-s`, this prints the matrix with the largest difference of all weights in each cell.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from inlaid import config
from inlaid.adapters import lycoris
from inlaid.adapters.adapter import WEIGHTS
from inlaid.adapters.convert import export_run
from inlaid.adapters.programs import PROGRAMS, refusal
from inlaid.adapters.read import read_adapter
from inlaid.alpha.opening import build_family
from support.clients import adapters as clients
from support.exports import State, fused, make_run, trained_weights
from support.slow import slow

FAMILIES = {"wan": "t2v", "mochi": "t2v", "cogvideox": "5b", "midi": None}
TUNERS = ("lora", "dora", "lokr", "loha", "full")
ALWAYS = [("wan", "dora"), ("mochi", "lokr"), ("cogvideox", "full")]
CASES = [(family, tuner) for family in FAMILIES for tuner in TUNERS]

Matrix = dict[tuple[str, str], dict[str, str]]


@pytest.fixture(scope="module")
def matrix() -> Iterator[Matrix]:
    cells: Matrix = {}
    yield cells
    for (family, tuner), row in cells.items():
        print(f"\n{family} {tuner}")
        for target, cell in row.items():
            print(f"  {target:<20} {cell}")


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory, checkpoint: Callable[[str, str], Path]) -> Any:
    def made(family: str, tuner: str, variant: str | None = None, **alpha: Any) -> Path:
        variant = variant or FAMILIES[family] or default(family)
        folder = tmp_path_factory.mktemp("runs") / f"{family}-{tuner}"
        return make_run(folder, family, tuner, checkpoint(family, variant), variant, **alpha)

    return made


def default(family: str) -> str:
    from inlaid.tiny import random

    return next(variant for name, variant in random.cases() if name == family)


def diffusers(folder: Path, family: Any) -> State:
    """The stock loader of adapters into a network; LoHa, which it does not read, by the loader of inlaid."""
    network = family.load_denoiser(torch.float32)
    if not any("hada_" in k for k in load_file(folder / WEIGHTS)):
        network.load_lora_adapter(folder, prefix="transformer", weight_name=WEIGHTS)
    else:
        lycoris.load(network, folder)
    return fused(network)


def midi(folder: Path, family: Any, *, dora: bool) -> State:
    """MIDI's own loader: a new adapter with the printed settings, then its state without strictness."""
    from peft import LoraConfig, inject_adapter_in_model

    network, tensors = family.load_denoiser(torch.float32), load_file(folder / "lora_weights.safetensors")
    state = {k.removeprefix("transformer."): t for k, t in tensors.items()}
    layers = sorted({k.split(".lora_")[0] for k in state})
    rank = next(t.shape[0] for k, t in state.items() if ".lora_A." in k)
    settings = LoraConfig(r=rank, lora_alpha=rank, use_dora=dora, target_modules=layers)
    inject_adapter_in_model(settings, network, "default")
    assert state.keys() == {k for k in network.state_dict() if ".lora_" in k}
    network.load_state_dict(state, strict=False)
    return fused(network)


def read(
    target: str, whole: bool, path: Path, family: Any, base: State, tuner: str
) -> tuple[State, list[str]]:
    """The weights that the program makes of the file, by its own names, and the keys that it did not use."""
    name = type(family).__name__.lower()
    if whole and path.is_dir():
        return family.load_denoiser(torch.float32, folder=path).state_dict(), []
    if whole:
        return load_file(path), []
    if target == "genmo":
        with safe_open(path, "pt") as file:
            header = file.metadata()
        return clients.genmo(base, load_file(path), header)
    if target == "diffusers":
        return diffusers(path.parent, family), []
    if target == "midi-3d":
        return midi(path, family, dora=tuner == "dora"), []
    program = {"musubi": clients.musubi, "diffsynth": clients.diffsynth, "wan-alpha": clients.load_dora}
    if target in program:
        return program[target](base, load_file(path))
    return clients.comfy(base, load_file(path), name)


@pytest.mark.parametrize(("family", "tuner"), [c if c in ALWAYS else slow(*c) for c in CASES])
def test_every_cell(family: str, tuner: str, make: Any, matrix: Matrix, tmp_path: Path) -> None:
    run = make(family, tuner)
    opened, base, merged = trained_weights(run)
    row = matrix.setdefault((family, tuner), {})
    for target in PROGRAMS:
        for whole in {tuner == "full", True}:
            if whole and target == "merged" and tuner != "full":
                continue
            cell = target + (" whole" if whole and target != "merged" else "")
            reason = refusal(target, opened, tuner, whole=whole)
            out = tmp_path / cell.replace(" ", "-")
            if reason is not None:
                with pytest.raises(ValueError, match="--to: "):
                    export_run(run, target, out, merge=whole)
                assert not out.exists()
                row[cell] = f"refused: {reason}"
                continue
            path = export_run(run, target, out, merge=whole)
            row[cell] = compare(target, whole or target == "merged", path, opened, base, merged, tuner)


def compare(target: str, whole: bool, path: Path, family: Any, base: State, merged: State, tuner: str) -> str:
    """The largest difference of all weights to the merged network; none may differ or be missing."""
    names = family.original
    if not path.is_dir() and target not in ("diffusers", "merged"):
        base, merged = (names.to_original(s) for s in (base, merged))
        extra = family.comfyui_tensors() if whole and target == "comfyui" else {}
        merged = {**merged, **extra}
    new, unused = read(target, whole, path, family, base, tuner)
    assert unused == []
    assert new.keys() == merged.keys()
    worst = max((new[k] - merged[k]).abs().max().item() for k in merged)
    change = max((merged[k] - base[k]).abs().max().item() for k in base)
    assert worst <= 1e-5 * change, (target, worst, change)
    return f"exact: {worst:.1e} of {change:.2f}"


def test_alpha_is_folded_for_diffusers_too(make: Any, tmp_path: Path) -> None:
    run = make("wan", "lora")
    path = export_run(run, "diffusers", tmp_path / "d")
    family, _, _ = trained_weights(run)
    adapter, before = read_adapter(path, family), read_adapter(run / "adapter", family)
    assert adapter.alpha == dict.fromkeys(adapter.modules, 3.0) != before.alpha
    for module in adapter.modules:
        a, b = (adapter.tensors[f"{module}.lora_{x}.weight"] for x in "AB")
        c, d = (before.tensors[f"{module}.lora_{x}.weight"] for x in "AB")
        torch.testing.assert_close(b @ a, 7 / 3 * d @ c, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("family", "rule", "embedding"), [("cogvideox", "bias", True), ("mochi", "block", False)]
)
def test_joint_alpha_goes_to_transpixeler(
    family: str, rule: str, embedding: bool, make: Any, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    run = make(family, "lora", kind="joint", text_to_alpha=rule, domain_embedding=embedding)
    path = export_run(run, "transpixeler")
    assert path.name == f"{family}-lora-transpixeler" + (".pt" if family == "mochi" else ".safetensors")
    file = torch.load(path, weights_only=True)["state_dict"] if family == "mochi" else load_file(path)
    updates, vector, unused = clients.transpixeler(family, 2, file)
    assert unused == [] and all(u.any() for u in updates.values()) and len(updates) == 8
    assert embedding == (vector is not None and bool(vector.any()))
    assert "TransPixeler's inference script: --lora_path" in capsys.readouterr().err
    opened = build_family(config.load(run)).single
    again, before = read_adapter(path, opened), read_adapter(run / "adapter", opened)
    for module in before.modules:
        one, two = (
            x.scale(module) * x.tensors[f"{module}.lora_B.weight"] @ x.tensors[f"{module}.lora_A.weight"]
            for x in (again, before)
        )
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)
    for target in ("comfyui", "merged"):
        with pytest.raises(ValueError, match=rf"--to: {target} applies an adapter to all tokens"):
            export_run(run, target, tmp_path / target)


def test_experts_are_named_in_the_file(make: Any, checkpoint: Any, tmp_path: Path) -> None:
    folder = tmp_path / "cats"
    make_run(folder, "wan", "lora", checkpoint("wan", "a14b"), "a14b")
    expert = config.load(folder).model.expert
    assert export_run(folder, "comfyui").name == f"cats-{expert}_noise-comfyui.safetensors"
    assert export_run(folder, "kohya").name == f"cats-{expert}_noise-kohya.safetensors"
    assert export_run(folder, "comfyui", merge=True).name == f"cats-{expert}_noise-comfyui-model.safetensors"
    with pytest.raises(ValueError, match=r"Wan-Alpha runs Wan 2.1 text-to-video only"):
        export_run(folder, "wan-alpha")
