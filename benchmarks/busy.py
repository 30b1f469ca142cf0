"""Measure the demo beside another program that keeps one core busy.

    python benchmarks/busy.py [--steps 30] [--whole]

Runs `inlaid train` with the demo's recipe and fewer steps, alone and beside one process that computes without
pause: once as installed, and once with the default of GNU OpenMP, by which waiting threads spin for
milliseconds. `--whole` also runs the whole `inlaid demo` both ways (20 minutes). Prints seconds per step
and the ratio, and writes `benchmarks/results/busy.json`. Meant for a machine with two cores and nothing else
to do. Fails if the demo's recipe beside the busy process takes more than 2.5 times as long.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results/busy.json"
LIMIT = 2.5
BUSY = "while True: pass"
SPINNING = "300000"  # the default of GNU OpenMP, by its documentation of GOMP_SPINCOUNT


def prepare(folder: Path) -> dict[str, Any]:
    """Write clips and return the demo's recipe without validation and samples, with a cache of its own."""
    from inlaid.cli import demo

    demo.CLIPS, demo.KNOWN = 8, 12
    demo.write_clips(folder)
    recipe = demo.recipe(folder)
    recipe["data"] |= {"validation": 0, "cache": str(folder / "cache")}
    return {**recipe, "sample": {}}


@contextmanager
def load(busy: bool) -> Iterator[None]:
    """Keep one core busy."""
    process = subprocess.Popen([sys.executable, "-c", BUSY]) if busy else None
    try:
        yield
    finally:
        if process:
            process.kill()
            process.wait()


def steps(folder: Path, recipe: dict[str, Any], name: str, n: int, env: dict[str, str]) -> float:
    """Train `n` steps and return the median seconds per step."""
    recipe = {**recipe, "run": str(folder / name)}
    recipe["train"] = {**recipe["train"], "steps": n, "save_every": n, "validate_every": n, "log_every": 1}
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps(recipe), "utf-8")
    command = [sys.executable, "-m", "inlaid", "train", str(path)]
    subprocess.run(command, check=True, env={**os.environ, **env}, stdout=subprocess.DEVNULL)
    rows = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text("utf-8").splitlines()]
    return statistics.median([r["seconds_per_step"] for r in rows if "seconds_per_step" in r][3:])


def whole(folder: Path, name: str) -> float:
    """Run the whole demo and return its seconds."""
    start = time.perf_counter()
    command = [sys.executable, "-m", "inlaid", "demo", "--out", str(folder / name)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def main() -> None:
    """Measure, print and write the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--whole", action="store_true")
    options = parser.parse_args()
    found: dict[str, Any] = {"cores": os.cpu_count(), "steps": options.steps}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        recipe = prepare(folder)
        steps(folder, recipe, "warm", 5, {})  # fills the cache
        for kind, env in (("inlaid", {}), ("spinning", {"GOMP_SPINCOUNT": SPINNING})):
            row: dict[str, float] = {}
            for busy in (False, True):
                with load(busy):
                    row["busy" if busy else "alone"] = steps(
                        folder, recipe, f"{kind}-{busy}", options.steps, env
                    )
            found[kind] = {**row, "ratio": row["busy"] / row["alone"]}
            print(f"{kind}: {row['alone']:.3f} s a step alone, {row['busy']:.3f} beside a busy process:",
                  f"{found[kind]['ratio']:.2f} times")  # fmt: skip
        if options.whole:
            row = {}
            for busy in (False, True):
                with load(busy):
                    row["busy" if busy else "alone"] = whole(folder, f"demo-{busy}")
            found["demo"] = {**row, "ratio": row["busy"] / row["alone"]}
            print(f"demo: {row['alone']:.0f} s alone, {row['busy']:.0f} s beside a busy process")
    RESULTS.write_text(json.dumps(found, indent=1), "utf-8")
    sys.exit(found.get("demo", found["inlaid"])["ratio"] > LIMIT)


if __name__ == "__main__":
    main()
