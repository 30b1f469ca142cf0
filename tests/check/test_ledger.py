"""A training step moves no more bytes than it did: they limit the speed of small networks on a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from inlaid import config
from inlaid.alpha.opening import build_family
from inlaid.check import estimate
from inlaid.families.grid import Extent, SceneExtent, VideoExtent
from inlaid.tiny import random
from inlaid.training.trained import trained_by
from support.slow import slow

PER_BLOCK = {"wan": (3849, 516), "cogvideox": (3607, 266), "mochi": (13602, 631), "midi": (1756, 600)}
"""Kilobytes that a block moves, and kernels that it starts, with a LoRA and recomputed; update these values
if fewer are needed."""


def counted(family: str, layers: int, folder: Path) -> estimate.Counts:
    checkpoint = random.build(family, folder / f"{layers}", layers=layers)
    made = config.build(
        {
            "run": "x",
            "model": {**random.model(family, next(v for f, v in random.cases() if f == family))}
            | {"checkpoint": str(checkpoint)},
            "data": {"sources": "x"},
            "tuner": {"kind": "lora", "rank": 4},
        }
    )
    opened = build_family(made)
    extent: Extent = VideoExtent(9, 64, 64) if opened.modality == "video" else SceneExtent(2, 32, 32)
    network, _ = estimate._network(opened, trained_by(made, opened), torch.bfloat16)
    return estimate.count_operations(opened, network, extent, 1, checkpointing=True)


@pytest.mark.parametrize("family", ["wan", slow("cogvideox"), slow("mochi"), slow("midi")])
def test_a_block_moves_no_more_bytes_than_before(family: str, tmp_path: Path) -> None:
    few, many = (counted(family, layers, tmp_path) for layers in (2, 4))
    kilobytes, kernels = (many.moved - few.moved) / 2000, (many.launches - few.launches) / 2
    print(f'"{family}": ({kilobytes:.0f}, {kernels:.0f}),')
    known = PER_BLOCK[family]
    assert kilobytes <= 1.03 * known[0], f"{kilobytes:.0f} instead of {known[0]} kilobytes"
    assert kernels <= 1.03 * known[1], f"{kernels:.0f} instead of {known[1]} kernels"
