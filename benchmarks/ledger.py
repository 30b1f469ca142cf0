"""Count floating-point operations, memory traffic, kernel launches and stored bytes of a training step.

    python benchmarks/ledger.py [--only TEXT]

One forward and backward pass of published networks on the meta device, at batch 1 in bfloat16, through the
same code as training. Every operation that is not a view counts as one launch that reads its inputs and
writes its outputs. Seconds are predicted for one H100 by

    attention FLOP / 580 T + product FLOP / 650 T + elementwise bytes / 2.9 TB

whose constants were fitted to two measured steps (Wan 2.1 1.3B and 14B). Two sizes of the same clip: `peer`,
384x576 with rank 16 on the attention layers, and `full`, 480x832 with the default adapter. Prints one JSON
object per row.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from inlaid import config
from inlaid.alpha.opening import build_family
from inlaid.check import estimate
from inlaid.console import quiet
from inlaid.training.trained import trained_by

ROOT = Path(__file__).parent.parent
RATES = {"attention": 580e12, "products": 650e12, "elementwise": 2.9e12}
"""Fitted rates of an H100: FLOP per second, and bytes per second."""

aten = torch.ops.aten
PRODUCTS = {aten.mm, aten.addmm, aten.bmm, aten.baddbmm, aten.convolution, aten.convolution_backward}
ATTENTION = {aten._scaled_dot_product_flash_attention, aten._scaled_dot_product_flash_attention_backward}

PEER = ["tuner.rank=16", "tuner.targets=[attn]"]
ROWS: dict[str, tuple[str, tuple[int, int, int], list[str]]] = {
    "Wan 1.3B peer": ("wan/t2v-1.3b-lora", (81, 384, 576), PEER),
    "Wan 1.3B full": ("wan/t2v-1.3b-lora", (81, 480, 832), []),
}


class Traffic(TorchDispatchMode):
    """Torch dispatch mode that counts bytes and launches by class of operation."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = dict.fromkeys((*RATES, "float32 products"), 0)
        self.launches = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.is_view:
            return out
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        outputs = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        if "empty" in func.overloadpacket.__name__:
            return out
        packet = func.overloadpacket
        kind = "attention" if packet in ATTENTION else "products" if packet in PRODUCTS else "elementwise"
        if kind == "products" and inputs[0].dtype is torch.float32:
            kind = "float32 products"
        self.bytes[kind] += sum(t.nbytes for t in (*inputs, *outputs))
        self.launches += 1
        return out


def count(recipe: str, extent: tuple[int, int, int], overrides: Sequence[str]) -> dict[str, Any]:
    """Return the counts of a forward and backward pass.

    Args:
        recipe: path below `recipes/`, without its suffix.
        extent: frames, height and width.
        overrides: `key=value` overrides of the recipe.
    """
    settings = config.load(ROOT / f"recipes/{recipe}.yaml", list(overrides))
    family = build_family(settings)
    network, trained = estimate._network(family, trained_by(settings, family), torch.bfloat16)
    with Traffic() as traffic:
        found = estimate.count_operations(
            family, network, extent, 1, checkpointing=settings.memory.gradient_checkpointing
        )
    products = found.linear + found.across
    seconds = {
        "attention": found.attention / RATES["attention"],
        "products": products / RATES["products"],
        "elementwise": traffic.bytes["elementwise"] / RATES["elementwise"],
        "float32 products": traffic.bytes["float32 products"] / RATES["elementwise"],
    }
    return {
        "tokens": family.tokens(*extent),
        "trained": trained,
        "attention_flop": found.attention,
        "product_flop": products,
        "bytes": traffic.bytes,
        "launches": traffic.launches,
        "activations": found.activations,
        "seconds": seconds,
    }


def main() -> None:
    """Count every row and write the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="rows whose name contains this text")
    parser.add_argument("overrides", nargs="*", help="key=value overrides of all recipes")
    options = parser.parse_args()
    quiet()
    for name, (recipe, extent, overrides) in ROWS.items():
        if options.only in name:
            row = count(recipe, extent, [*overrides, *options.overrides])
            print(name, json.dumps(row))


if __name__ == "__main__":
    main()
