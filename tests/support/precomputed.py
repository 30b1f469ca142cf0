"""Clips that another trainer has encoded, and recipes for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from inlaid import config, families
from inlaid.alpha.opening import open_family
from inlaid.data.prepare import CachedDataset, build_cache
from inlaid.media import video
from inlaid.runs.folder import open_run
from inlaid.runs.launch import Context
from inlaid.tiny import random
from inlaid.tiny.random import TEXT_WIDTH

CPU = Context(torch.device("cpu"), torch.float32, "adamw")
SHAPES = {"mochi": (7, 32, 48), "5b": (9, 32, 64), "2b": (9, 48, 32), "1.5": (13, 32, 64), "i2v": (9, 32, 32)}
"""Frames, height and width of the clips."""
CASES = [("mochi", "t2v"), ("cogvideox", "5b"), ("cogvideox", "i2v"), ("cogvideox", "1.5")]
Checkpoint = Callable[[str, str], Path]


def mochi(folder: Path, name: str, moments: Tensor, text: Tensor, genmo: bool = False) -> None:
    """Files as finetrainers writes them, or genmo: raw moments in bfloat16, text padded to 256 tokens."""
    n, width = text.shape
    padded, mask = torch.zeros(1, 256, width), torch.zeros(1, 256, dtype=torch.bool)
    padded[0, :n], mask[0, :n] = text, True
    mean, logvar = moments[None].chunk(2, dim=1)
    latent = {"mean": mean, "logvar": logvar} if genmo else {"ldist": moments[None]}
    embed = {"prompt_embeds": padded, "prompt_attention_mask": mask}
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    torch.save(latent, folder / f"{name}.latent.pt")
    torch.save({"y_feat": [padded], "y_mask": [mask]} if genmo else embed, folder / f"{name}.embed.pt")


def cogvideox(folder: Path, name: str, moments: Tensor, text: Tensor, image: Tensor | None = None) -> None:
    """Files as the CogVideoX scripts of finetrainers write them: bare tensors in folders of their own."""
    parts = {"video_latents": moments, "prompt_embeds": text, "image_latents": image}
    for part, tensor in parts.items():
        if tensor is not None:
            (folder / part).mkdir(parents=True, exist_ok=True)
            torch.save(tensor, folder / part / f"{name}.pt")


def shape(kind: tuple[str, str]) -> tuple[int, int, int]:
    return SHAPES[kind[1] if kind[0] == "cogvideox" else kind[0]]


def recipe(kind: tuple[str, str], checkpoint: Checkpoint, run: Path, source: Any, **changes: Any) -> dict:
    """A small complete recipe; keyword `section__key` changes a value."""
    frames, *size = shape(kind)
    raw: dict[str, Any] = {
        "run": str(run),
        "model": {**random.model(*kind), "checkpoint": str(checkpoint(*kind))},
        "data": {"sources": source, "size": size, "frames": frames, "validation": 1, "caption_dropout": 0.5},
        "tuner": {"kind": "lora", "rank": 2},
        "optim": {"lr": 1e-2},
        "train": {"steps": 4, "save_every": 2, "log_every": 1, "validate_every": 2, "trackers": []},
        "sample": {"prompts": ["a cat"], "steps": 2},
    }
    if kind[1].endswith("i2v"):
        picture = run.parent / "start.png"
        if not picture.exists():
            from PIL import Image

            Image.new("RGB", (64, 64), "teal").save(picture)
        raw["sample"]["images"] = [str(picture)]
    for key, value in changes.items():
        section, _, name = key.partition("__")
        raw[section] = {**raw.get(section, {}), name: value}
    return raw


def built(raw: dict) -> CachedDataset:
    settings = config.build(raw)
    with open_run(settings, CPU) as run:
        return build_cache(settings, open_family(settings), run, CPU)


def clips(folder: Path, kind: tuple[str, str], fps: float, n: int = 3) -> Path:
    """Clips of exactly the size and rate that is asked for."""
    folder.mkdir()
    frames, height, width = shape(kind)
    for i in range(n):
        pixels = np.random.default_rng(i).integers(0, 255, (frames, height, width, 3), dtype=np.uint8)
        video.write_video(folder / f"{i}.mp4", pixels, fps)
        (folder / f"{i}.txt").write_text(f"clip number {i}", "utf-8")
    return folder


def encode(raw: dict, made: CachedDataset, folder: Path, genmo: bool = False) -> list[Mapping[str, Tensor]]:
    """Writes what is cached as another trainer would have, and gives the items."""
    family = families.get(raw["model"]["family"])(config.build(raw).model)
    items = []
    for window, name, text in zip(made.plan.train, made.media, made.text, strict=True):
        item, stem = made.store.read("media", name), Path(window.clip.name).stem
        items.append(item)
        words = made.store.read("text", text)["text"]
        if raw["model"]["family"] == "mochi":
            mochi(folder, stem, item["moments"], words, genmo)
        else:
            cogvideox(folder, stem, item["moments"], words, item["image"][0] if family.images else None)
    return items


def write(folder: Path, kind: tuple[str, str], n: int = 4) -> Path:
    """Random encoded clips; the last is of another size where the checkpoint has any."""
    frames, height, width = shape(kind)
    t = 1 + (frames - 1) // (6 if kind[0] == "mochi" else 4)
    generator = torch.Generator().manual_seed(0)
    for i in range(n):
        wide = 2 * width if i == n - 1 and kind[1] != "i2v" else width
        size = (height // 8, wide // 8)
        if kind[0] == "mochi":
            text = torch.randn(5 + i, TEXT_WIDTH, generator=generator)
            moments = torch.randn(24, t, *size, generator=generator).bfloat16()
            mochi(folder, f"deep/{i}", moments, text, genmo=i % 2 == 1)
        else:
            text = torch.randn(226, TEXT_WIDTH, generator=generator)
            moments = torch.randn(32, t, *size, generator=generator)
            cogvideox(folder, str(i), moments, text, moments[:, :1].clone() if kind[1] == "i2v" else None)
    return folder
