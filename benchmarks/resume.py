"""Test exact resume: after `kill -9` at random times and a restart, results must be bit-identical.

    python benchmarks/resume.py [--times 10] [--seed N]
    python benchmarks/resume.py --matrix [--kills 100] [--minutes 10]

Trains a tiny random Wan DoRA once without interruption, then `--times` times with one to three kills each,
and compares every tensor of the last checkpoint: weights, EMA and optimizer state. Writes
`benchmarks/results/resume.json`.

`--matrix` kills train, evaluate and export of ten kinds of runs at file-system events and at random times,
and compares every file of the run folder; see `resume_matrix.py`. Writes
`benchmarks/results/resume-matrix.json` and `.md`.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

STEPS = 150
RESULTS = Path(__file__).parent / "results/resume.json"


def recipe(folder: Path, name: str) -> list[str]:
    """Write a recipe and return the command that trains it."""
    values = {
        "run": str(folder / name),
        "model": {"family": "wan", "checkpoint": str(folder / "model")},
        "data": {
            "sources": str(folder / "clips"),
            "size": [32, 32],
            "frames": 9,
            "cache": str(folder / "cache"),
        },
        "tuner": {"kind": "dora", "rank": 4},
        "optim": {"lr": 1e-3, "ema": 0.99},
        "train": {
            "steps": STEPS,
            "save_every": 7,
            "log_every": 5,
            "batch": 2,
            "accumulate": 2,
            "trackers": [],
        },
    }
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps(values), "utf-8")
    return [sys.executable, "-m", "inlaid", "train", str(path)]


def run_matrix(kills: int, seed: int, minutes: float) -> int:
    """Run the matrix, write its results, and return the exit code."""
    os.environ["OMP_NUM_THREADS"] = "1"
    sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "tests")]
    import resume_matrix
    import torch

    from inlaid.console import quiet
    from inlaid.runs.folder import environment
    from support.forks import preload

    torch.set_num_threads(1)
    quiet()
    preload()
    with tempfile.TemporaryDirectory() as name:
        found = resume_matrix.matrix(Path(name), kills, seed, 60 * minutes)
    RESULTS.parent.mkdir(exist_ok=True)
    about = {**found, "packages": environment()["packages"]}
    (RESULTS.parent / "resume-matrix.json").write_text(json.dumps(about, indent=1), "utf-8")
    text = resume_matrix.table(found)
    (RESULTS.parent / "resume-matrix.md").write_text(text, "utf-8")
    print(text)
    return int(found["identical"] != found["kills"])


def main() -> None:
    """Run the benchmark and print a line per trial."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--times", type=int, default=10)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--matrix", action="store_true")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--minutes", type=float, default=60)
    args = parser.parse_args()
    if args.matrix:
        sys.exit(run_matrix(args.kills, args.seed, args.minutes))
    rng = random.Random(args.seed)
    from inlaid.media import video
    from inlaid.runs.folder import Run, environment
    from inlaid.tiny.random import build
    from inlaid.training.checkpoints import load_state

    exact, tries = 0, []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        build("wan", folder / "model")
        (folder / "clips").mkdir()
        for i in range(5):
            frames = np.random.default_rng(i).integers(0, 255, (9, 32, 32, 3), dtype=np.uint8)
            video.write_video(folder / f"clips/{i}.mp4", frames, 16)
            (folder / f"clips/{i}.txt").write_text(f"clip {i}", "utf-8")
        subprocess.run(recipe(folder, "whole"), check=True, capture_output=True)
        last = f"checkpoints/step-{STEPS:06d}"
        wanted, _ = load_state(folder / "whole" / last)
        for i in range(args.times):
            command, run = recipe(folder, f"killed{i}"), Run(folder / f"killed{i}")
            kills = []
            for _ in range(rng.randint(1, 3)):
                before = len(run.checkpoints())
                process = subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True)
                while len(run.checkpoints()) <= min(before, 2) and process.poll() is None:
                    time.sleep(0.005)
                time.sleep(rng.random() * 1.5)
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                kills.append(run.checkpoints()[-1].name if run.checkpoints() else "start")
            subprocess.run(command, check=True, capture_output=True)
            got, _ = load_state(run.folder / last)
            same = got.keys() == wanted.keys() and all(
                got[k].numpy().tobytes() == wanted[k].numpy().tobytes() for k in got
            )
            exact += same
            tries.append({"killed_after": kills, "bit_identical": same})
            print(
                f"trial {i + 1}: killed after {', '.join(kills)}: {'bit-identical' if same else 'DIFFERENT'}",
                flush=True,
            )
    found = {"times": args.times, "bit_identical": exact, "tensors": len(wanted), "seed": args.seed}
    RESULTS.parent.mkdir(exist_ok=True)
    about = {**found, "tries": tries, "packages": environment()["packages"]}
    RESULTS.write_text(json.dumps(about, indent=1), "utf-8")
    print(f"{exact} of {args.times} bit-identical ({len(wanted)} tensors each), seed {args.seed}")
    sys.exit(exact != args.times)


if __name__ == "__main__":
    main()
