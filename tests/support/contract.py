"""What every family owes is asked of the cases here: every family with every kind of tiny checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from inlaid import config, families
from inlaid.data.batch import Batch
from inlaid.families import Family
from inlaid.tiny import random
from support.slow import mostly_slow

CPU = torch.device("cpu")
CASES = random.cases()
IDS = ["-".join(case) for case in CASES]
every_case = pytest.mark.parametrize("case", CASES, ids=IDS)
FIRST = list({family: (family, variant) for family, variant in reversed(CASES)}.values())
"""One checkpoint of each family, for what does not depend on its kind."""
first_cases = pytest.mark.parametrize("case", FIRST, ids="-".join)
mostly_first_cases = pytest.mark.parametrize("case", mostly_slow(CASES, FIRST.__contains__), ids=IDS)
FEW = [("wan", "t2v"), ("midi", "scene")]
"""One checkpoint of each modality, for what no family does in a way of its own."""
mostly_few_cases = pytest.mark.parametrize("case", mostly_slow(CASES, FEW.__contains__), ids=IDS)


def open_family(folder: Path, case: tuple[str, str]) -> Family:
    return families.get(case[0])(config.Model(checkpoint=str(folder), **random.model(*case)))


def shape(family: Family) -> tuple[int, int, int]:
    """The smallest clip with two latent frames or more, two patches high and wide or more."""
    grid = family.grid
    return grid.offset + grid.temporal * (1 if grid.offset > 1 else 2), grid.spatial * 2, grid.spatial * 2


VIDEO = [case for case in CASES if families.get(case[0]).modality == "video"]
WORDLESS = {case[0] for case in CASES} - {case[0] for case in VIDEO}


def example(family: Family) -> Any:
    """What `encode_media` is given: frames, or a scene."""
    if family.modality == "video":
        return np.random.default_rng(0).integers(0, 255, (*shape(family), 3), dtype=np.uint8)
    from inlaid.media.scene import SceneObject, SceneSample

    rng, count = np.random.default_rng(0), shape(family)[0]
    masks = [np.arange(32)[:, None] // 8 + np.zeros((32, 32)) == i for i in range(count)]
    surfaces = rng.uniform(-0.5, 0.5, (count, 100, 6)).astype(np.float32)
    objects = [SceneObject(i + 1, m, s) for i, (m, s) in enumerate(zip(masks, surfaces, strict=True))]
    return SceneSample("scene", rng.integers(0, 255, (32, 32, 3), dtype=np.uint8), objects)


def adapter(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "adapter" / "pytorch_lora_weights.safetensors")


def metrics(run: Path, key: str) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    return [line[key] for line in lines if key in line]


def random_batch(family: Family, n: int = 1) -> Batch:
    generator = torch.Generator().manual_seed(0)
    clips = {k: torch.randn(n, *s, generator=generator) for k, s in family.shapes(*shape(family)).items()}
    encoder = family.load_text_encoder(CPU, torch.float32)
    text = family.encode_text(encoder, [f"clip {'x' * i}" for i in range(n)])
    return Batch(clips.pop("latents"), {**family.collate(text), **clips}, ["a"] * n)
