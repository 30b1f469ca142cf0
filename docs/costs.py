"""Fill in the memory tables of the how-to pages from the estimate of `inlaid check`: `python docs/costs.py`.

A table row begins with a recipe (with optional overrides) and a size; this script writes its last three
cells. A test checks that the tables are current.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import torch

from inlaid import config
from inlaid.alpha.opening import build_family
from inlaid.check import estimate

ROOT = Path(__file__).parent.parent
PAGES = {name: ROOT / f"docs/how-to/train-{name}.md" for name in ("wan", "cogvideox", "mochi")}
ROW = re.compile(r"\| `(?P<recipe>[^`]+)` \| (?P<size>\d+x\d+, \d+) \|[^|]*\|[^|]*\|[^|]*\|")


def figures(family: str, recipe: str, size: str) -> tuple[str, str, str]:
    """Return tokens, peak memory and compute per step on CUDA in bfloat16.

    Args:
        family: folder of the recipe.
        recipe: name of the recipe, followed by overrides.
        size: height, width and frames, such as `480x832, 81`.
    """
    name, *overrides = recipe.split()
    settings = config.load(ROOT / f"recipes/{family}/{name}.yaml", overrides)
    opened = build_family(settings)
    height, width, frames = map(int, re.findall(r"\d+", size))
    window = (frames, height, width)
    found = estimate.estimate_recipe(
        opened,
        settings,
        {window: 1},
        {window: 1},
        [],
        device=torch.device("meta"),
        precision=torch.bfloat16,
        optimizer=settings.optim.name,
    )
    return f"{opened.tokens(*window):,}", f"{found.peak / 1e9:.1f} GB", f"{found.flops / 1e12:,.0f} TFLOP"


def cells(family: str, row: re.Match[str]) -> str:
    """Return a table row with current values."""
    found = figures(family, row["recipe"], row["size"])
    words = [f"`{row['recipe']}`", row["size"], *found]
    return f"| {' | '.join(words)} |"


def filled(family: str, text: str) -> Iterator[str]:
    """Yield the lines of a page with current table rows."""
    for line in text.splitlines():
        row = ROW.fullmatch(line)
        yield cells(family, row) if row else line


if __name__ == "__main__":
    for family, page in PAGES.items():
        page.write_text("\n".join(filled(family, page.read_text("utf-8"))) + "\n", "utf-8")
