"""Measure gradient error and memory of quantized base models, and memory of gradient checkpointing.

    python benchmarks/small_base.py [--device cpu]

One forward and backward pass of a random Wan transformer of 5 M parameters, with adapters far from their
initialization. For every scheme, tuner and precision: the relative error of the adapter's gradient against
float32, and the size of the model. For `gradient_checkpointing`: the bytes stored for the backward pass.
Prints Markdown and writes `benchmarks/results/small-base-DEVICE.json`.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from inlaid import config
from inlaid.adapters import tuners
from inlaid.console import quiet
from inlaid.families.wan import Wan
from inlaid.networks import quantize
from inlaid.runs.folder import environment
from inlaid.tiny import random
from inlaid.training import memory

KINDS = ("lora", "dora", "lokr", "loha")
SCHEMES: dict[str, dict[str, Any]] = {
    "none": {},
    "quantize=int8": {"quantize": "int8"},
    "quantize=float8": {"quantize": "float8"},
    "quantize=int4": {"quantize": "int4"},
    "quantize=nf4": {"quantize": "nf4"},
    "layerwise_casting=bfloat16": {"layerwise_casting": "bfloat16"},
    "layerwise_casting=float8": {"layerwise_casting": "float8"},
}


def network(family: Wan, kind: str, device: torch.device, dtype: torch.dtype, section: dict) -> tuple:
    """Return a network and its trained weights; the adapter is the same for every storage scheme."""
    denoiser = family.load_denoiser(dtype).train()
    quantize.shrink_weights(config.Memory(**section), denoiser, device, dtype)
    tuner = config.LowRank(kind=kind, rank=16)  # type: ignore[arg-type]
    trained = tuners.attach(tuner, family.targets, denoiser, seed=1)
    generator = torch.Generator().manual_seed(2)
    for name, p in trained.items():
        noise = 0.05 * torch.randn(p.shape, generator=generator).to(device)
        p.data = p.data * (1 + noise) if "vector" in name else noise
    return denoiser, list(trained.values())


def loss(denoiser: nn.Module, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return the loss of a fixed batch."""
    g = torch.Generator().manual_seed(3)
    x, text = (torch.randn(*s, generator=g).to(device, dtype) for s in ((1, 16, 3, 16, 16), (1, 512, 32)))
    return (
        denoiser(x, torch.tensor([700.0], device=device), text, return_dict=False)[0].float().square().mean()
    )


def size(tensor: Tensor) -> int:
    """Return the bytes of a tensor, or of the plain tensors of which a tensor subclass consists."""
    if hasattr(tensor, "__tensor_flatten__"):
        return sum(size(getattr(tensor, n)) for n in tensor.__tensor_flatten__()[0])
    state = getattr(tensor, "quant_state", None)
    return tensor.nbytes + (state.absmax.nbytes if state is not None else 0)


def gradients(family: Wan, device: torch.device) -> list[dict[str, Any]]:
    """Return the gradient errors and model sizes, one row per scheme and precision."""
    rows = []
    wanted = {}
    for dtype in (torch.float32, torch.bfloat16):
        for name, section in SCHEMES.items():
            row: dict[str, Any] = {"scheme": name, "precision": str(dtype).removeprefix("torch.")}
            for kind in KINDS:
                raw = {"run": "x", "model": {"family": "wan", "checkpoint": "a/b"}, "data": {"sources": "x"}}
                try:
                    cfg = config.build({**raw, "memory": section, "tuner": {"kind": kind}})
                    wrong = memory.problems(cfg, device, dtype)
                except ValueError as error:
                    wrong = [str(error)]
                if wrong:
                    row[kind] = "refused"
                    continue
                denoiser, trained = network(family, kind, device, dtype, section)
                loss(denoiser, device, dtype).backward()
                found = torch.cat([p.grad.flatten().cpu() for p in trained])
                wanted.setdefault(kind, found)
                row[kind] = float((found - wanted[kind]).norm() / wanted[kind].norm())
                row["bytes"] = sum(size(p) for p in denoiser.parameters() if not p.requires_grad)
            rows.append(row)
    whole = next(r["bytes"] for r in rows)
    return [{**r, "of_float32": r["bytes"] / whole} if "bytes" in r else r for r in rows]


def activations(family: Wan, device: torch.device) -> dict[str, int]:
    """Return the bytes stored for the backward pass, for each value of `gradient_checkpointing`."""
    out = {}
    for every in (False, 4, 2, True):
        denoiser, _ = network(family, "lora", device, torch.float32, {})
        if every:
            memory.enable_checkpointing(denoiser, every)
        kept: dict[int, int] = {}
        known = {p.untyped_storage().data_ptr() for p in denoiser.parameters()}

        def note(t: Tensor, kept: dict[int, int] = kept, known: set[int] = known) -> Tensor:
            if t.untyped_storage().data_ptr() not in known:
                kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            value = loss(denoiser, device, torch.float32)
        value.backward()
        out[str(every).lower()] = sum(kept.values())
    return out


def main() -> None:
    """Run the benchmark, print the tables and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    device = torch.device(parser.parse_args().device)
    quiet()
    with tempfile.TemporaryDirectory() as folder:
        random.build("wan", Path(folder) / "wan", heads=4, head=64, layers=4, ffn=1024)
        family = Wan(config.Model(family="wan", checkpoint=str(Path(folder) / "wan")))
        rows, kept = gradients(family, device), activations(family, device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.machine()
    about = {"device": f"{device.type}, {name}", "packages": environment()["packages"]}
    result = {**about, "gradients": rows, "activations": kept}
    path = Path(__file__).parent / f"results/small-base-{device.type}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n", "utf-8")
    print(f"| scheme | compute dtype | model size | {' | '.join(KINDS)} |")
    print("|---|---|---|" + "---|" * len(KINDS))
    for r in rows:
        share = f"{r['of_float32']:.0%}" if "of_float32" in r else ""
        cells = [r[k] if isinstance(r[k], str) else f"{r[k]:.1%}" for k in KINDS]
        print(f"| `{r['scheme']}` | {r['precision']} | {share} | {' | '.join(cells)} |")
    print("\n| `gradient_checkpointing` | stored for the backward pass |\n|---|---|")
    for every, n in kept.items():
        print(f"| `{every}` | {n / 1e6:.1f} MB |")


if __name__ == "__main__":
    main()
