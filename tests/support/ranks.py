"""Two processes that train together, and how their runs are compared with one process's."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from subprocess import CompletedProcess

import torch
from safetensors.torch import load_file

from inlaid.runs.folder import read_metrics
from support import forks

Launch = Callable[[Sequence[object]], CompletedProcess[str]]


def free_port() -> int:
    """Of those that nobody listens on."""
    with socket.socket() as listening:
        listening.bind(("localhost", 0))
        return listening.getsockname()[1]


def launch(
    words: Sequence[object],
    processes: int = 2,
    timeout: float = 300,
    program: Sequence[str] = ("-m", "inlaid"),
) -> CompletedProcess[str]:
    """What `torchrun --nproc-per-node PROCESSES -m inlaid WORDS...` does, in forks; or another program.

    As there, a process that fails stops the others, all write to the same streams, and the code is 1.
    """
    shared = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes), "GROUP_RANK": "0"}
    shared |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    command = [str(forks.python()), *program, *map(str, words)]
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        ranks = [
            subprocess.Popen(
                command,
                stdout=out,
                stderr=err,
                env={**os.environ, **shared, "RANK": str(k), "LOCAL_RANK": str(k)},
            )
            for k in range(processes)
        ]
        until = time.monotonic() + timeout
        try:
            while any(rank.poll() is None for rank in ranks) and not any(rank.returncode for rank in ranks):
                if time.monotonic() > until:
                    raise subprocess.TimeoutExpired(command, timeout)
                time.sleep(0.01)
            for rank in ranks:
                if rank.poll() is None:
                    rank.terminate()
            for rank in ranks:
                rank.wait(timeout=30)
        finally:
            for rank in ranks:
                if rank.poll() is None:
                    rank.kill()
                    rank.wait()
        for stream in (out, err):
            stream.seek(0)
        return CompletedProcess(command, int(any(r.returncode for r in ranks)), out.read(), err.read())


def torchrun(words: Sequence[object], processes: int = 2, timeout: float = 500) -> CompletedProcess[str]:
    """The launch itself, as people do it: every process imports on its own."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]  # on a free port
    command += ["--nproc-per-node", str(processes), "-m", "inlaid", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout)


def together(raw: dict, path: Path, mode: str, *overrides: str, start: Launch = launch) -> Path:
    """Trains a recipe with two processes, or as many as `start` starts."""
    path.write_text(json.dumps(raw), "utf-8")  # JSON is YAML
    done = start(["train", path, f"runtime.parallel={mode}", *overrides])
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


def validation(run: Path) -> dict[int, float]:
    lines = read_metrics(run / "metrics.jsonl")
    return {int(x["step"]): x["validation_loss"] for x in lines if "validation_loss" in x}
