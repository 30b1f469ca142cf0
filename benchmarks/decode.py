"""Measure the time to read one clip on one core: decode, select 81 frames by time, scale and crop to 480x832.

    python benchmarks/decode.py [--repeats 5] [--out decode.json]

Generates 8 s H.264 sources (24 fps, a key frame every 250 frames, moving texture with grain) at 480p, 720p
and 1080p, reads a window at 16 fps from the start and one from 2 s, and prints a table and JSON. `cpu` is CPU
time on all cores; `wall` is wall-clock time with the process pinned to one core.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image

from inlaid.media import video

SOURCES = {"480p": (480, 832), "720p": (720, 1280), "1080p": (1080, 1920)}
FRAMES, FPS, SIZE = 81, 16, (480, 832)


def source(path: Path, height: int, width: int, *, seconds: int = 8, fps: int = 24) -> None:
    """Write a moving texture with grain, about as hard to encode as a hand-held shot."""
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (height // 12, width // 6, 3), dtype=np.uint8))
    texture = np.asarray(coarse.resize((2 * width, height), Image.Resampling.BICUBIC)).astype(np.int16)
    grain = rng.integers(-6, 7, (height, width + 64, 1), dtype=np.int16)
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("libx264", rate=fps)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.options = {"preset": "veryfast", "crf": "20"}
        for k in range(seconds * fps):
            left, shift = k * width // (seconds * fps), int(rng.integers(0, 64))
            pixels = texture[:, left : left + width] + grain[:, shift : shift + width]
            frame = av.VideoFrame.from_ndarray(pixels.clip(0, 255).astype(np.uint8), format="rgb24")
            frame.pts, frame.time_base = k, Fraction(1, fps)
            container.mux(stream.encode(frame.reformat(format="yuv420p")))
        container.mux(stream.encode())


def measure(path: Path, start: float, repeats: int) -> dict[str, float]:
    """Return wall and CPU seconds of the fastest of several reads."""
    walls, cpus = [], []
    for _ in range(repeats):
        wall, cpu = time.perf_counter(), time.process_time()
        frames = video.read_frames(path, start, FRAMES, FPS, SIZE)
        walls.append(time.perf_counter() - wall)
        cpus.append(time.process_time() - cpu)
        assert frames.shape == (FRAMES, *SIZE, 3)
    return {"wall": round(min(walls), 3), "cpu": round(min(cpus), 3)}


def main() -> None:
    """Run the benchmark and print the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, help="also write the JSON to this file")
    options = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    result: dict[str, Any] = {"frames": FRAMES, "fps": FPS, "size": SIZE, "av": av.__version__, "clips": {}}
    print(f"{FRAMES} frames at {FPS} fps to {SIZE[0]}x{SIZE[1]}, one core, best of {options.repeats}\n")
    print(f"{'source':<8}{'MB':>6}{'from 0 s':>18}{'from 2 s':>18}{'probe':>18}")
    print(f"{'':<14}" + f"{'wall':>10}{'cpu':>8}" * 3)
    with tempfile.TemporaryDirectory() as folder:
        for name, (height, width) in SOURCES.items():
            path = Path(folder) / f"{name}.mp4"
            source(path, height, width)
            rows = {
                "from_0": measure(path, 0.0, options.repeats),
                "from_2": measure(path, 2.0, options.repeats),
            }
            wall, cpu = time.perf_counter(), time.process_time()
            video.probe(path)
            took = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
            rows["probe"] = {k: round(v, 3) for k, v in took.items()}
            result["clips"][name] = rows
            cells = "".join(f"{r['wall']:>8.2f} s{r['cpu']:>6.2f} s" for r in rows.values())
            print(f"{name:<8}{path.stat().st_size / 1e6:>6.1f}{cells}", flush=True)
    print("\n" + json.dumps(result))
    if options.out:
        options.out.write_text(json.dumps(result, indent=2), "utf-8")


if __name__ == "__main__":
    main()
