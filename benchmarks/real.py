"""Run check, cache, train and generate on real clips at 480x832x81.

    python benchmarks/real.py MEDIA [--out runs/real]    # writes benchmarks/results/real.json, row by row

MEDIA holds `clips/` (prompts.txt + videos.txt, metadata.csv, train.jsonl) and `press/` (videos with sidecar
captions). The cache is shared, so later layouts of the same clips are not encoded again. The network is a
random Wan in the diffusers classes, small enough for two cores; clips, latents and text have real sizes.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path


def layouts(media: Path) -> dict[str, dict]:
    """Return the data source of each layout, by name."""
    clips = media / "clips"
    return {
        "press folder": {"path": str(media / "press")},
        "prompts.txt + videos.txt": {"path": str(clips), "layout": "lines"},
        "csv": {"path": str(clips / "metadata.csv")},
        "jsonl": {"path": str(clips / "train.jsonl")},
    }


RESULTS = Path(__file__).parent / "results/real.json"


def timed(*command: str) -> dict[str, float]:
    """Run an inlaid command and return its wall-clock and CPU time; exit if it fails."""
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-m", "inlaid", *command], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"inlaid {' '.join(command)}: exit {done.returncode}\n{done.stderr}")
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = used.ru_utime + used.ru_stime - before.ru_utime - before.ru_stime
    return {"seconds": round(time.perf_counter() - start, 1), "cpu_seconds": round(cpu, 1)}


def main() -> None:
    """Run the four layouts and print a line for each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("media", type=Path)
    parser.add_argument("--out", type=Path, default=Path("runs/real"))
    args = parser.parse_args()
    from inlaid.runs.folder import environment
    from inlaid.tiny import random

    args.out.mkdir(parents=True, exist_ok=True)
    model = random.build("wan", args.out / "model", layers=1)
    rows = []
    for name, source in layouts(args.media).items():
        run = args.out / name.replace(" ", "-")
        recipe = {
            "run": str(run),
            "model": {"family": "wan", "checkpoint": str(model)},
            "data": {
                "sources": [source],
                "size": [480, 832],
                "frames": 81,
                "validation": 0,
                "cache": str(args.out / "cache"),
            },
            "tuner": {"rank": 4},
            "train": {"steps": 2, "log_every": 1},
            "sample": {"steps": 1, "guidance": 1.0},
        }
        path = args.out / f"{run.name}.yaml"
        path.write_text(json.dumps(recipe), "utf-8")
        before = items(args.out)
        commands = [("check", path), ("cache", path), ("train", path), ("generate", run, "a hydraulic press")]
        steps = {c[0]: timed(*map(str, c)) for c in commands}
        video = next((run / "samples/generated").glob("*.mp4"))
        rows.append(
            {
                "layout": name,
                "clips": json.loads((run / "check/report.json").read_text("utf-8"))["clips"],
                "precomputed": len(items(args.out)) - len(before),
                "cached_megabytes": max(items(args.out).values()) / 1e6,
                "generated_bytes": video.stat().st_size,
                **steps,
            }
        )
        times = ", ".join(
            f"{k} {v['seconds']:.0f} s ({v['cpu_seconds']:.0f} s CPU)" for k, v in steps.items()
        )
        print(f"{name:<26} {rows[-1]['clips']} clips, {rows[-1]['precomputed']} encoded; {times}", flush=True)
        about = {"size": [480, 832], "frames": 81, "threads": os.environ.get("OMP_NUM_THREADS"), "rows": rows}
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps({**about, "packages": environment()["packages"]}, indent=1), "utf-8")


def items(out: Path) -> dict[Path, int]:
    """Return the sizes of the cached clips in bytes."""
    return {p: p.stat().st_size for p in (out / "cache/media").rglob("*.safetensors")}


if __name__ == "__main__":
    main()
