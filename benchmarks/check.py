"""Measure the CPU time of `inlaid check` over folders of many clips, the first and the second time.

    python benchmarks/check.py [--clips 300 2000]

The clips are 64 x 64 pixels and 2.5 s long, each with a caption. All checks run in one process, so that the
imports (`start`, with a check of one clip) are paid once. The figures are the CPU seconds beyond those of a
later check of one clip. The second check reads the probes that the first one stored. Writes
`benchmarks/results/check.json`; exits with 1 above the limits.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from inlaid.cli import main as cli
from inlaid.media import video

RESULTS = Path(__file__).parent / "results/check.json"
LIMITS = {300: (5.0, 2.0), 2000: (25.0, 4.0)}
"""Clips: CPU seconds beyond the imports, at most, of the first and the second check."""


def recipe(folder: Path, clips: int) -> Path:
    """Write a folder of clips with captions and the recipe that reads it; return the recipe."""
    data = folder / f"{clips}-clips"
    data.mkdir()
    noise = np.random.default_rng(clips)
    for k in range(clips):
        frames = np.repeat(noise.integers(0, 256, (40, 8, 8, 3), np.uint8), 8, 1).repeat(8, 2)
        video.write_video(data / f"{k:04d}.mp4", frames, 16)
        (data / f"{k:04d}.txt").write_text(f"clip {k}", "utf-8")
    values = {
        "run": str(folder / f"run-{clips}"),
        "model": {"family": "wan", "checkpoint": "tiny:wan"},
        "data": {"sources": str(data), "size": [64, 64], "frames": 17},
        "tuner": {"kind": "lora", "rank": 4},
    }
    path = folder / f"{clips}.yaml"
    path.write_text(json.dumps(values), "utf-8")
    return path


def check(path: Path) -> float:
    """Return the CPU seconds of one check in this process, in all its threads."""
    sys.argv = ["inlaid", "check", str(path)]
    start = time.process_time()
    try:
        cli.main()
    except SystemExit as ended:
        if ended.code:
            raise
    return time.process_time() - start


def main() -> None:
    """Measure, print and write the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clips", type=int, nargs="+", default=list(LIMITS))
    options = parser.parse_args()
    worst = False
    with tempfile.TemporaryDirectory() as name:
        one = recipe(Path(name), 1)
        start = check(one)  # imports everything
        found: dict[str, Any] = {"cores": os.cpu_count(), "start": round(start, 2)}
        for clips in options.clips:
            path = recipe(Path(name), clips)
            alone, first, second, again = map(check, (one, path, path, one))
            beyond = [round(seconds - (alone + again) / 2, 2) for seconds in (first, second)]
            found[str(clips)] = beyond
            worst |= any(is_ > limit for is_, limit in zip(beyond, LIMITS.get(clips, beyond), strict=True))
            print(f"{clips} clips: {beyond[0]:.1f} s the first time, {beyond[1]:.1f} s the second,",
                  f"beyond {(alone + again) / 2:.1f} s of a check of one clip", file=sys.stderr)  # fmt: skip
    RESULTS.write_text(json.dumps(found, indent=1), "utf-8")
    sys.exit(worst)


if __name__ == "__main__":
    main()
