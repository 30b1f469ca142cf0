"""Run folders at the edges: what a run says, and its exit code. Needs root, for small and read-only disks.

    python benchmarks/run_edges.py

Writes `benchmarks/results/run-edges.md`.
"""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "tests")]

from resume_matrix import KINDS, RESULTS, fork, inside, prepare  # noqa: E402

LAST = "(nothing)"


def last_error(folder: Path) -> str:
    """Return the error of the last command, or the last line that it printed."""
    lines = [x for x in (folder / "log").read_text("utf-8").splitlines() if x.strip()]
    first = max((i for i, x in enumerate(lines) if "rror:" in x), default=len(lines) - 1)
    text = " ".join(lines[first:]) if lines else LAST
    return text.replace(str(folder), "").replace("|", "\\|")


def train(folder: Path, *overrides: str) -> tuple[str, int]:
    """Train in a folder; return the message and the exit code."""
    with inside(folder):
        (folder / "log").unlink(missing_ok=True)
        code = os.waitstatus_to_exitcode(os.waitpid(fork(["train", "r.yaml", *overrides]), 0)[1])
        return last_error(folder), code


def two_runs(folder: Path) -> tuple[str, int]:
    with inside(folder):
        first = fork(["train", "r.yaml", "train.steps=100000", "train.save_every=100000"])
        while not (folder / "run/metrics.jsonl").exists():
            time.sleep(0.02)
    found = train(folder)
    os.kill(first, 9)
    os.waitpid(first, 0)
    return found


def deleted(folder: Path) -> tuple[str, int]:
    with inside(folder):
        first = fork(["train", "r.yaml", "train.steps=100000"])
        while not (folder / "run/metrics.jsonl").exists():
            time.sleep(0.02)
        shutil.rmtree(folder / "run", ignore_errors=True)
        code = os.waitstatus_to_exitcode(os.waitpid(first, 0)[1])
    return last_error(folder), code


def on_disk(options: str, *, ready: bool = False) -> Callable[[Path], tuple[str, int]]:
    """Return a case whose run folder is on a disk of its own, with mount options."""

    def case(folder: Path) -> tuple[str, int]:
        (folder / "run").mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder / "run")]
        subprocess.run(mount, check=True)
        try:
            return train(folder, *(["data.cache=cache"] if ready else []))
        finally:
            subprocess.run(["umount", str(folder / "run")], check=True)

    return case


def mask(value: int) -> Callable[[Path], tuple[str, int]]:
    """Return a case with another umask."""

    def case(folder: Path) -> tuple[str, int]:
        old = os.umask(value)
        try:
            _, code = train(folder)
        finally:
            os.umask(old)
        modes = {oct(stat.S_IMODE(p.stat().st_mode)) for p in (folder / "run").rglob("*") if p.is_file()}
        return f"modes of all files: {', '.join(sorted(modes))}", code

    return case


def many_files(folder: Path) -> tuple[str, int]:
    """Train on 5,000 clips, of which one is not a video."""
    for i in range(4, 5000):
        os.link(folder / f"clips/{i % 4}.mp4", folder / f"clips/{i}.mp4")
        (folder / f"clips/{i}.txt").write_text(f"clip number {i}", "utf-8")
    broken = folder / "clips/2500.mp4"
    broken.unlink()
    broken.write_bytes(b"not a video")
    before = os.times()
    message, code = train(folder)
    after = os.times()
    seconds = sum(b - a for a, b in zip(before[2:4], after[2:4], strict=True))
    return f"{message} ({seconds:.0f} s of CPU time)", code


CASES: dict[str, Callable[[Path], tuple[str, int]]] = {
    "a second `train` on the folder": two_runs,
    "the folder is deleted meanwhile": deleted,
    "read-only folder": on_disk("ro,size=1m"),
    "disk of 4 kB (recipe)": on_disk("size=4k"),
    "disk of 16 kB (cache)": on_disk("size=16k"),
    "disk of 60 kB (first checkpoint)": on_disk("size=60k", ready=True),
    "disk of 160 kB (second checkpoint)": on_disk("size=160k", ready=True),
    "disk of 280 kB (third checkpoint)": on_disk("size=280k", ready=True),
    "disk of 360 kB (adapter)": on_disk("size=360k", ready=True),
    "name of 255 bytes": lambda f: train(f, f"run={'x' * 255}"),
    "name of 256 bytes": lambda f: train(f, f"run={'x' * 256}"),
    "5,000 clips, one of them broken": many_files,
    "umask 022": mask(0o022),
    "umask 077": mask(0o077),
}


def main() -> None:
    """Run all cases and write the table."""
    import torch

    from inlaid.console import quiet
    from support.forks import preload

    torch.set_num_threads(1)
    quiet()
    preload()
    lines = ["| case | message | exit code |", "|---|---|---|"]
    with tempfile.TemporaryDirectory() as name:
        ready = Path(name, "ready")
        ready.mkdir()
        prepare(ready, KINDS[0])
        for i, (title, case) in enumerate(CASES.items()):
            message, code = case(shutil.copytree(ready, Path(name, str(i))))
            lines.append(f"| {title} | {message} | {code} |")
            print(lines[-1], flush=True)
    (RESULTS / "run-edges.md").write_text("\n".join(lines) + "\n", "utf-8")


if __name__ == "__main__":
    main()
