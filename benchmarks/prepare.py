"""Measure the CPU time of `inlaid prepare` per clip of 81 frames at 480x832, reading and writing.

    python benchmarks/prepare.py [--media MEDIA] [--repeats 3] [--out prepare.json]

Generates 8 s sources as `decode.py` does (with grain, which is hard to encode), and a color and alpha pair,
and writes one clip in each format in this process, pinned to one core. With MEDIA, also the real clips in
`MEDIA/press`. `cpu` is the CPU time of a clip on all cores; the start of the program is
not counted. `error` is the mean error of the written color on a scale of 0 to 255.
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

from inlaid import config
from inlaid.data.clips import Clip, VideoWindow
from inlaid.data.dataset_formats import Cut, write_cut
from inlaid.families.grid import VideoExtent
from inlaid.media import video

sys.path.insert(0, str(Path(__file__).parent))
import decode

LIMIT = 1.5
"""CPU seconds of a clip that the formats without alpha should not exceed."""


def cut(path: Path, matte: Path | None = None) -> Cut:
    """Return the cut of a window of 81 frames that starts after one second."""
    clip = Clip(path, path.name, "a caption", 0, None, "video", matte=matte)
    how = config.Matte(premultiplied=False) if matte else None
    extent = VideoExtent(decode.FRAMES, *decode.SIZE)
    probe = video.probe(path)
    return Cut(
        "clip-000", VideoWindow(clip, extent, "", 1.0, decode.FPS, how), "", (probe.height, probe.width)
    )


def measure(what: Cut, folder: Path, target: Any, repeats: int) -> dict[str, float]:
    """Return CPU seconds and megabytes of the fastest of several clips, and the error of its color."""
    cpus = []
    for _ in range(repeats):
        cpu = time.process_time()
        made = write_cut(what, folder, target, 17)
        cpus.append(time.process_time() - cpu)
        assert not made.problem, made.problem
    row = {"cpu": round(min(cpus), 2), "MB": round(sum(made.files.values()) / 1e6, 2)}
    if target != "npz":
        wanted = what.read()[..., :3].astype(np.int16)
        written = video.read_frames(
            folder / next(iter(made.files)), 0, decode.FRAMES, decode.FPS, decode.SIZE
        )
        row["error"] = round(float(np.abs(written - wanted).mean()), 2)
    return row


def main() -> None:
    """Run the benchmark and print the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--media", type=Path, help="folder with real clips")
    parser.add_argument("--out", type=Path, help="also write the JSON to this file")
    options = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    rows: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for name, (height, width) in decode.SOURCES.items():
            path = folder / f"{name}.mp4"
            decode.source(path, height, width)
            for target in ("clips", "npz"):
                rows[f"{name} as {target}"] = measure(cut(path), folder, target, options.repeats)
        for path in sorted((options.media / "press").glob("*.mp4")) if options.media else ():
            rows[f"{path.name} as clips"] = measure(cut(path), folder, "clips", options.repeats)
        alpha = folder / "alpha.mp4"
        decode.source(alpha, *decode.SOURCES["480p"])
        pair = cut(folder / "480p.mp4", alpha)
        rows["480p pair as rgba-pairs"] = measure(pair, folder, "rgba-pairs", options.repeats)
    print(f"one clip of {decode.FRAMES} frames at {decode.SIZE[0]}x{decode.SIZE[1]}, one core\n")
    print(f"{'source and format':<26}{'cpu s':>7}{'MB':>8}{'error':>7}")
    for name, row in rows.items():
        print(f"{name:<26}{row['cpu']:>7.2f}{row['MB']:>8.2f}{row.get('error', 0):>7.2f}")
    if options.out:
        options.out.write_text(json.dumps({"limit": LIMIT, "rows": rows}, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    main()
