"""Measure time and stored bytes of gradient checkpointing with and without stored attention results.

    python benchmarks/checkpointing.py [--tokens 4096] [--passes 5] [--device cpu]

One forward and backward pass of a random Wan transformer (4 blocks of width 512) with a LoRA on attention and
feed-forward layers, for `memory.gradient_checkpointing` false, true and `attention`, in turn. Prints CPU
seconds (on CUDA: seconds) of the fastest pass, and the bytes stored for the backward pass, and writes
`benchmarks/results/checkpointing-DEVICE.json`. Gradients are compared bit by bit.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from inlaid import config
from inlaid.adapters import tuners
from inlaid.console import quiet
from inlaid.families.wan import Wan
from inlaid.runs.folder import environment
from inlaid.tiny import random
from inlaid.training import memory

BOXES: list[list[Any]] = []
"""Stored results of attention, of each block."""

SETTINGS: dict[str, Any] = {"false": False, "true": True, "attention": "attention"}


def network(folder: Path, which: Any, device: str) -> nn.Module:
    """Return a network with a LoRA and one kind of checkpointing."""
    wan = Wan(config.Model(family="wan", checkpoint=str(folder)))
    denoiser = wan.load_denoiser(torch.float32).train().to(device)
    if which:
        memory.enable_checkpointing(denoiser, which)
    trained = tuners.attach(config.LowRank(rank=16), Wan.targets, denoiser, seed=1)
    torch.manual_seed(0)
    for parameter in trained.values():
        parameter.data = 0.02 * torch.randn(parameter.shape).to(device)
    return denoiser


def one_pass(
    denoiser: nn.Module, x: torch.Tensor, text: torch.Tensor
) -> tuple[float, int, list[torch.Tensor]]:
    """Return the seconds of a forward and backward pass, the stored bytes, and the gradients."""
    sizes: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    clock = time.perf_counter if x.is_cuda else time.process_time
    BOXES.clear()
    denoiser.zero_grad()
    start = clock()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        out = denoiser(x, torch.tensor([500.0]).to(x.device), text, return_dict=False)[0]
    for tensor in (each[0] for box in BOXES for kept in box for each in kept if isinstance(each, tuple)):
        note(tensor)
    stored = sum(sizes.values())
    out.square().mean().backward()
    if x.is_cuda:
        torch.cuda.synchronize()
    return clock() - start, stored, [p.grad for p in denoiser.parameters() if p.grad is not None]


def observe() -> None:
    """Make the results of attention that are stored visible in `BOXES`."""
    real = memory.keep_attention

    def observed() -> Any:
        contexts: Any = real()
        BOXES.append(contexts[0].box)
        return contexts

    memory.keep_attention = observed


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--passes", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    quiet()
    observe()
    side = int((options.tokens / 4) ** 0.5) * 2
    with tempfile.TemporaryDirectory() as place:
        folder = random.build("wan", Path(place) / "wan", heads=4, head=128, layers=4, ffn=2048)
        networks = {name: network(folder, which, options.device) for name, which in SETTINGS.items()}
        x = torch.randn(1, 16, 4, side, side, device=options.device)
        text = torch.randn(1, 512, 32, device=options.device)
        found: dict[str, list[tuple[float, int, list[torch.Tensor]]]] = {name: [] for name in networks}
        for _ in range(options.passes):
            for name, denoiser in networks.items():
                found[name].append(one_pass(denoiser, x, text))
                equal = zip(found[name][-1][2], found["false"][0][2], strict=True)
                assert all(torch.equal(a, b) for a, b in equal), f"{name} has other gradients"
    rows = {
        name: {"seconds": min(s for s, _, _ in passes), "stored_bytes": passes[0][1]}
        for name, passes in found.items()
    }
    full = rows["true"]
    print(f"{side // 2 * (side // 2) * 4} tokens\n")
    print("| gradient_checkpointing | seconds | against `true` | stored |\n|---|---|---|---|")
    for name, row in rows.items():
        ratio = row["seconds"] / full["seconds"]
        print(f"| {name} | {row['seconds']:.2f} | {ratio:.2f} | {row['stored_bytes'] / 1e6:,.0f} MB |")
    out = Path(__file__).parent / f"results/checkpointing-{options.device}.json"
    about = {"tokens": options.tokens, "machine": platform.processor(), "environment": environment()}
    out.write_text(json.dumps({**about, "rows": rows}, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    main()
