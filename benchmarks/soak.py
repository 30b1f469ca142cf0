"""Test for leaks: memory and open files of a long run must stay constant.

    python benchmarks/soak.py [--steps 10000] [--every 250]

Trains a LoRA on the tiny Wan in a process of its own, with checkpoints, validation and samples, and reads the
process's resident memory and open file descriptors from `/proc` (Linux) whenever a step is logged. Writes
`benchmarks/results/soak.json`. Fails if resident memory after the first 500 steps varies by more than 2 %,
or if the number of open files at the logged steps differs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results/soak.json"
WARM, LIMIT = 500, 0.02


def recipe(folder: Path, steps: int, every: int) -> Path:
    """Write clips of the tiny model's world, and a recipe that saves, validates and samples."""
    from inlaid.media.video import write_video
    from inlaid.tiny import world

    clips = folder / "clips"
    clips.mkdir()
    for i, (frames, caption) in enumerate(world.subject_clips(8)):
        write_video(clips / f"{i}.mp4", frames, world.FPS)
        (clips / f"{i}.txt").write_text(caption, "utf-8")
    values = {
        "run": str(folder / "run"),
        "model": {"family": "wan", "checkpoint": "tiny:wan"},
        "data": {"sources": str(clips), "size": [64, 64], "frames": 17, "validation": 2},
        "tuner": {"kind": "lora", "rank": 4},
        "train": {
            "steps": steps,
            "save_every": every,
            "validate_every": every,
            "log_every": 50,
            "keep": 2,
            "trackers": [],
        },
        "sample": {"prompts": ["a small zorble moving up"], "every": 2 * every, "steps": 2},
        "memory": {"gradient_checkpointing": False},
    }
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(values), "utf-8")
    return path


def observe(pid: int) -> tuple[float, int]:
    """Return resident memory in MB and the number of open files of a process."""
    status = Path(f"/proc/{pid}/status").read_text("utf-8")
    resident = next(line for line in status.splitlines() if line.startswith("VmRSS:"))
    return int(resident.split()[1]) / 1024, len(list(Path(f"/proc/{pid}/fd").iterdir()))


def last_step(metrics: Path) -> int:
    """Return the step of the last line of the metrics file; 0 if there is none."""
    try:
        lines = metrics.read_text("utf-8").splitlines()
        return int(json.loads(lines[-1])["step"]) if lines else 0
    except (OSError, ValueError, KeyError):
        return 0


def main() -> None:
    """Run the benchmark and print a line per thousand steps."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--every", type=int, default=250, help="steps between checkpoints")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        command = [sys.executable, "-m", "inlaid", "train", str(recipe(folder, args.steps, args.every))]
        start, seen = time.monotonic(), 0
        with (folder / "log").open("w") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log)
            while process.poll() is None:
                step = last_step(folder / "run/metrics.jsonl")
                if step > seen:
                    seen = step
                    try:
                        memory, files = observe(process.pid)
                    except (OSError, StopIteration):
                        break
                    rows.append({"step": step, "mb": round(memory, 1), "files": files})
                    if step % 1000 < 50:
                        print(f"step {step}: {memory:.0f} MB, {files} open files", flush=True)
                time.sleep(0.2)
        if process.wait():
            sys.exit((folder / "log").read_text("utf-8")[-2000:])
    late = [r for r in rows if r["step"] > WARM]
    usual = statistics.median(r["mb"] for r in late)
    # A single reading includes what a checkpoint or a sample holds for a moment: compare means of tenths.
    tenth = max(1, len(late) // 10)
    means = [statistics.mean(r["mb"] for r in late[i : i + tenth]) for i in range(0, len(late), tenth)]
    spread = (max(means) - min(means)) / usual
    counts = sorted({r["files"] for r in late})
    found = {
        "steps": args.steps,
        "seconds": round(time.monotonic() - start),
        "median_mb": usual,
        "spread": round(spread, 4),
        "first_and_last_tenth_mb": [round(means[0], 1), round(means[-1], 1)],
        "open_files": counts,
        "readings": rows[:: max(1, len(rows) // 100)],
    }
    RESULTS.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    print({k: v for k, v in found.items() if k != "readings"})
    if spread > LIMIT or counts[-1] > counts[0] + 2:
        sys.exit("memory or open files grow")


if __name__ == "__main__":
    main()
