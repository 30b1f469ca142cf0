"""Networks of joint transparency, and what they are given."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from inlaid import config, families
from inlaid.alpha.opening import build_family
from inlaid.tiny import random
from support.slow import mostly_slow

CPU = torch.device("cpu")
CASES = [("wan", "t2v"), ("wan", "ti2v"), ("mochi", "t2v"), *(("cogvideox", v) for v in ("5b", "2b", "1.5"))]
every_case = pytest.mark.parametrize("case", CASES, ids="-".join)
FEW = [("wan", "t2v"), ("mochi", "t2v"), ("cogvideox", "5b")]
"""One checkpoint of each family, for what does not depend on its kind."""
mostly_few_cases = pytest.mark.parametrize("case", mostly_slow(CASES, FEW.__contains__), ids="-".join)
ONE_SEQUENCE = [c for c in CASES if c[0] != "wan"]
"""Where text and video attend to each other."""
Checkpoint = Callable[[str, str], Path]


def opened(checkpoint: Checkpoint, case: tuple[str, str], **section: Any) -> Any:
    raw = {
        "run": "x",
        "model": {**random.model(*case), "checkpoint": str(checkpoint(*case))},
        "data": {"sources": "x"},
        "alpha": {"kind": "joint", **section},
    }
    return build_family(config.build(raw))


def size(family: families.Family) -> tuple[int, int, int]:
    """Two latent frames or more, not square."""
    grid = family.grid
    return grid.offset + grid.temporal, grid.spatial * 2, grid.spatial * 3


def pipeline_inputs(family: families.Family, n: int = 2) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Noisy latents of both clips, times and texts of different lengths."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, *family.shapes(*size(family))["latents"], generator=generator)
    text = family.encode_text(
        family.load_text_encoder(CPU, torch.float32), ["a cat", "two dogs run", "x"][:n]
    )
    return x, torch.linspace(0.3, 0.8, n), family.collate(text)


def network(family: families.Family) -> Any:
    return family.load_denoiser(torch.float32).eval().requires_grad_(False)


def swap(x: Tensor) -> Tensor:
    return torch.cat(x.chunk(2, 2)[::-1], 2)
