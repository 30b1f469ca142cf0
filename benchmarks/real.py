"""Real clips at real size through the whole job: check, cache, train and generate at 480x832x81.

    python benchmarks/real.py MEDIA [--out runs/real]

MEDIA holds `clips/` (prompts.txt + videos.txt, metadata.csv, train.jsonl) and `press/` (videos with sidecar
captions). The cache is shared, so the later layouts of the same clips encode nothing. The network is a
random Wan of real classes, small enough for two cores; the sizes of clips, latents and text are the real
ones.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path


def layouts(media: Path) -> dict[str, dict]:
    """Sources by name."""
    clips = media / "clips"
    return {
        "press folder": {"path": str(media / "press")},
        "prompts.txt + videos.txt": {"path": str(clips), "layout": "lines"},
        "csv": {"path": str(clips / "metadata.csv")},
        "jsonl": {"path": str(clips / "train.jsonl")},
    }


def timed(*command: str) -> float:
    """Runs a command of inlay and gives its seconds; stops with what it said if it fails."""
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "inlay", *command], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"inlay {' '.join(command)}: exit {done.returncode}\n{done.stderr}")
    return time.perf_counter() - start


def main() -> None:
    """Runs the four layouts and prints a line each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("media", type=Path)
    parser.add_argument("--out", type=Path, default=Path("runs/real"))
    args = parser.parse_args()
    from inlay.twins import tiny

    args.out.mkdir(parents=True, exist_ok=True)
    model = tiny.build("wan", args.out / "model", layers=1)
    for name, source in layouts(args.media).items():
        run = args.out / name.replace(" ", "-")
        recipe = {
            "run": str(run),
            "model": {"family": "wan", "checkpoint": str(model)},
            "data": {
                "sources": [source],
                "size": [480, 832],
                "frames": 81,
                "held_out": 0,
                "cache": str(args.out / "cache"),
            },
            "tuner": {"rank": 4},
            "train": {"steps": 2, "log_every": 1},
            "sample": {"steps": 1, "guidance": 1.0},
        }
        path = args.out / f"{run.name}.yaml"
        path.write_text(json.dumps(recipe), "utf-8")
        seconds = [timed("check", str(path)), timed("cache", str(path)), timed("train", str(path))]
        seconds.append(timed("generate", str(run), "a hydraulic press"))
        items = [p.stat().st_size for p in (args.out / "cache/media").rglob("*.safetensors")]
        steps = "check {:.0f} s, cache {:.0f} s, train {:.0f} s, generate {:.0f} s".format(*seconds)
        print(f"{name:<26} {len(items)} clips, {max(items) / 1e6:.2f} MB each cached; {steps}", flush=True)


if __name__ == "__main__":
    main()
