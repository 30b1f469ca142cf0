"""Two processes that train together, and how their runs are compared with one process's."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from inlaid import runtime


def together(raw: dict, path: Path, mode: str, *overrides: str) -> Path:
    """Trains a recipe with two processes."""
    path.write_text(json.dumps(raw), "utf-8")  # JSON is YAML
    launch = ["--standalone", "--nproc-per-node", "2"]  # on a free port
    words = [str(path), f"runtime.parallel={mode}", *overrides]
    command = [sys.executable, "-m", "torch.distributed.run", *launch, "-m", "inlaid", "train", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    return Path(raw["run"])


def difference(a: Path, b: Path, step: int) -> float:
    """The largest relative difference of what two checkpoints hold: weights, average, each moment, adapter.

    Over all tensors of a kind together. A tensor alone may differ more where its gradient nearly cancels:
    Adam divides a difference of 1e-12 by as small a root.
    """
    gaps: dict[str, list[torch.Tensor]] = {}
    place = f"checkpoints/step-{step:06d}"
    files = [p.relative_to(a / place) for p in (a / place).rglob("*.safetensors")]
    assert len(files) == 2 + any(f.name == "domain_embedding.safetensors" for f in files)
    for file in files:
        x, y = (load_file(r / place / file) for r in (a, b))
        assert x.keys() == y.keys() and x
        for key in x:
            assert x[key].dtype == y[key].dtype and x[key].shape == y[key].shape, key
            kind = key.split(".")[-1 if key.startswith("optimizer") else 0]
            total = gaps.setdefault(f"{file.name} {kind}", [])
            total.append(torch.stack([(x[key].double() - y[key].double()).norm(), y[key].double().norm()]))
    sums = {kind: torch.stack(pairs).square().sum(0).sqrt() for kind, pairs in gaps.items()}
    return max(float(gap / size.clamp(min=1e-12)) for gap, size in sums.values())


def held_out(run: Path) -> dict[int, float]:
    lines = runtime.read_metrics(run / "metrics.jsonl")
    return {int(x["step"]): x["held_out_loss"] for x in lines if "held_out_loss" in x}
