"""The code in model cards and on the pages about loading adapters is executed as it is printed.

Only the folders that it names are made: a checkpoint's name is a link to a random checkpoint.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from inlaid import config, families
from inlaid.adapters import tuners
from inlaid.adapters.model_card import model_card
from support.slow import slow

DOCS = Path(__file__).parent.parent.parent / "docs"

Checkpoint = Callable[[str, str], Path]


def trained(folder: Path, case: tuple[str, str], kind: str, checkpoint: Path, **model: Any) -> nn.Module:
    """A network with random weights of a tuner, saved to a folder as training saves it."""
    section = config.Full() if kind == "full" else config.LowRank(kind=kind, rank=2, alpha=3)  # type: ignore[arg-type]
    settings = config.Model(family=case[0], checkpoint=str(checkpoint), **model)
    family = families.get(case[0])(settings)
    network = family.load_denoiser(torch.float32)
    generator = torch.Generator().manual_seed(1)
    for parameter in tuners.attach(section, family.targets, network, seed=0).values():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    tuners.save(section, network, tuners.weights(section, network), folder, metadata=family.about())
    return network


def merged(network: nn.Module) -> dict[str, torch.Tensor]:
    """The weights of a network with its adapters merged by peft."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for module in network.modules():
        if isinstance(module, BaseTunerLayer):
            module.merge()
    state = {k.replace(".base_layer.", "."): v for k, v in network.state_dict().items()}
    marks = ("lora_", "lokr_", "hada_")
    return {k: v for k, v in state.items() if not any(mark in k for mark in marks)}


CARDS = [
    *((("wan", "t2v"), kind) for kind in ("lora", "dora", "lokr", "loha", "full")),
    *((("wan", "a14b"), kind) for kind in ("lora", "lokr", "full")),
    *((("midi", "scene"), kind) for kind in ("lora", "dora", "lokr", "loha", "full")),
    *((case, kind) for case in (("cogvideox", "5b"), ("mochi", "t2v")) for kind in ("lora", "lokr")),
]


OFTEN = ((("wan", "t2v"), "lokr"),)


@pytest.mark.parametrize(("case", "kind"), [c if c in OFTEN else slow(*c) for c in CARDS])
def test_model_cards(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: tuple[str, str], kind: str
) -> None:
    monkeypatch.chdir(tmp_path)
    source = checkpoint(*case)
    model = {"expert": "low"} if case[1] == "a14b" else {}
    network = trained(tmp_path / "path/to/this/folder", case, kind, source, **model)
    (tmp_path / "path/to" / source.name).symlink_to(source)
    raw = {
        "run": "runs/x",
        "model": {"family": case[0], "checkpoint": str(source), **model},
        "data": {"sources": "clips"},
        "tuner": {"kind": kind},
    }
    task = "image-to-3d" if case[0] == "midi" else "text-to-video"
    card = model_card(config.Config.model_validate(raw), step=3, task=task)
    code = card.split("```python\n")[1].split("```")[0]
    names: dict[str, Any] = {}
    exec(compile(code, "card", "exec"), names)
    component = "transformer_2" if model else "transformer"
    loaded = names["network"] if case[0] == "midi" else getattr(names["pipe"], component)
    wanted, got = merged(network), merged(loaded)
    base = families.get(case[0])(config.Model(**raw["model"])).load_denoiser(torch.float32).state_dict()
    assert got.keys() == wanted.keys() == base.keys()
    for key, weight in wanted.items():
        torch.testing.assert_close(got[key], weight, atol=1e-6, rtol=0)
    assert max((wanted[k] - v).abs().max().item() for k, v in base.items()) > 0.01


HUB = {
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": ("wan", "t2v"),
    "Wan-AI/Wan2.2-T2V-A14B-Diffusers": ("wan", "a14b"),
    "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers": ("wan", "i2v"),
    "MIDI-3D": ("midi", "scene"),
}
ADAPTERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "adapters/corgi": ("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "lokr", {}),
    "runs/pets/adapter": ("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "lora", {}),
    "runs/wan-1.3b-full/adapter": ("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "full", {}),
    "runs/wan-a14b-high/adapter": ("Wan-AI/Wan2.2-T2V-A14B-Diffusers", "lora", {"expert": "high"}),
    "runs/wan-a14b-low/adapter": ("Wan-AI/Wan2.2-T2V-A14B-Diffusers", "lora", {"expert": "low"}),
    "runs/wan-i2v-14b-lora/adapter": ("Wan-AI/Wan2.1-I2V-14B-480P-Diffusers", "lora", {}),
    "runs/scenes/adapter": ("MIDI-3D", "lora", {"options": {"image_encoders": "dino"}}),
}
PAGES = (
    "reference/formats.md",
    "how-to/import-adapters.md",
    "how-to/use-in-diffusers-and-comfyui.md",
    "how-to/train-midi.md",
)


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_pages(checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, page: str) -> None:
    """Pipelines stay on the CPU, and a call only checks that the pipeline has these arguments."""
    import diffusers
    from PIL import Image
    from safetensors.torch import save_file

    blocks = re.findall(r"```python\n(.*?)```", (DOCS / page).read_text("utf-8"), re.DOTALL)
    assert blocks
    text = "\n".join(blocks)
    monkeypatch.chdir(tmp_path)
    for name, case in HUB.items():
        if name in text:
            place = tmp_path / name
            place.parent.mkdir(exist_ok=True)
            place.symlink_to(checkpoint(*case))
    for name, (source, kind, model) in ADAPTERS.items():
        if name in text:
            trained(tmp_path / name, HUB[source], kind, checkpoint(*HUB[source]), **model)
    Image.new("RGB", (32, 32)).save(tmp_path / "start.png")
    factors = {f"blocks.0.self_attn.q.lora_{x}.weight": torch.ones(24, 24) for x in "AB"}
    save_file(factors, tmp_path / "epoch-4.safetensors")

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        inspect.signature(real[type(self)]).bind(self, *args, **kwargs)
        return SimpleNamespace(frames=[[]])

    kinds = (diffusers.WanPipeline, diffusers.WanImageToVideoPipeline)
    real = {kind: kind.__call__ for kind in kinds}
    for kind in kinds:
        monkeypatch.setattr(kind, "__call__", call)
    monkeypatch.setattr(diffusers.DiffusionPipeline, "to", lambda self, *_, **__: self)
    names: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, page, "exec"), names)
    if "pipe" in names:
        assert names["pipe"].transformer.peft_config
    if "network" in names:
        assert names["network"].peft_config
