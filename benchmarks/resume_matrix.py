"""The matrix of `benchmarks/resume.py`: kinds of runs, killed at file-system events and at random.

A kill at an event is placed by an audit hook in the killed process: it ends by SIGKILL just before it opens,
renames or deletes the n-th file in a part of the run folder. All processes are forks of one that has imported
everything, so a run of a tiny random model takes about a second.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import re
import shutil
import signal
import socket
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

RESULTS = Path(__file__).parent / "results"
STEPS = 6
EVENTS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree"}
PLACES = ("cache", "checkpoints", "adapter", "samples", "report", "export", "random")
"""Where a process is killed: a part of the run folder, or at a random time."""

PARTS = {
    "cache": r"/cache/",
    "checkpoints": r"/checkpoints/",
    "adapter": r"(^|/)run/(\.tmp-[^/]*-)?adapter",
    "samples": r"/samples/",
    "report": r"(^|/)run/(\.tmp-[^/]*-)?report",
    "export": r"/export",
}
MEMOS = ("config.yaml", "environment.json", "cache/probes", "cache/hashes", "cache/alphas")
"""Files with paths and times, which differ between equal runs."""
VOLATILE = {"seconds_per_step", "created", "seconds", "environment", "versions"}
"""Values that differ between equal runs."""


@dataclass
class Kind:
    """One kind of run: checkpoint, changes to the recipe, number of processes, target of the export."""

    name: str
    case: tuple[str, str]
    changes: dict[str, Any] = field(default_factory=dict)
    processes: int = 1
    export: str = "diffusers"


KINDS = [
    Kind("LoRA", ("wan", "t2v"), export="comfyui"),
    Kind(
        "DoRA, EMA", ("wan", "t2v"), {"tuner": {"kind": "dora", "rank": 4}, "optim": {"lr": 1e-3, "ema": 0.9}}
    ),
    Kind("full", ("wan", "t2v"), {"tuner": {"kind": "full"}}, export="merged"),
    Kind(
        "8-bit",
        ("wan", "t2v"),
        {"optim": {"lr": 1e-3, "name": "adamw8bit"}, "tuner": {"kind": "lora", "rank": 64}},
    ),
    Kind("merged alpha", ("wan", "t2v"), {"alpha": {"kind": "merged", "vae": "rgba_vae", "colors": 2}}),
    Kind("joint alpha", ("wan", "t2v"), {"alpha": {"kind": "joint"}}),
    Kind("CogVideoX", ("cogvideox", ""), export="diffusers"),
    Kind("Mochi", ("mochi", "")),
    Kind("MIDI", ("midi", "")),
    Kind("two ranks", ("wan", "t2v"), processes=2),
]


def fork(
    arguments: list[str], *, kill: tuple[str, int] | None = None, env: dict[str, str] | None = None
) -> int:
    """Start `inlaid ARGUMENTS` in a fork, which kills itself before event `kill[1]` in the part `kill[0]`."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.setpgid(0, 0)
        os.environ.update(env or {})
        log = os.open("log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for number in (1, 2):
            os.dup2(log, number)
        if kill:
            place_kill(*kill)
        sys.argv = ["inlaid", *arguments]
        from inlaid.cli.main import main

        main()
    except SystemExit as stop:
        code = int(stop.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def place_kill(part: str, count: int) -> None:
    """Kill this process before the n-th file-system event whose path belongs to a part of the run folder."""
    pattern, left = re.compile(PARTS[part]), [count]

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in EVENTS and any(
            isinstance(a, (str, Path)) and pattern.search(str(a)) for a in arguments[:2]
        ):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def run(arguments: list[str], processes: int = 1, **how: Any) -> list[int]:
    """Run a command to its end and return the exit codes; a process that is killed ends the others."""
    shared = {}
    if processes > 1 and arguments[0] == "train":
        with socket.socket() as free:
            free.bind(("localhost", 0))
            shared = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1])}
        shared["WORLD_SIZE"] = str(processes)
    ranks = [
        fork(arguments, kill=how.get("kill") if k == 0 else None,
             env={**shared, **({"RANK": str(k), "LOCAL_RANK": str(k)} if shared else {})})
        for k in range(processes if shared else 1)
    ]  # fmt: skip
    if "after" in how:
        time.sleep(how["after"])
        with contextlib.suppress(ProcessLookupError):
            os.kill(ranks[-1], signal.SIGKILL)
    return wait(ranks)


def wait(ranks: list[int]) -> list[int]:
    """Return the exit codes; after one rank is killed the others have time to end, as with `torchrun`."""
    codes: dict[int, int] = {}
    until = float("inf")
    while len(codes) < len(ranks):
        for pid in ranks:
            if pid not in codes and (ended := os.waitpid(pid, os.WNOHANG))[0]:
                codes[pid] = os.waitstatus_to_exitcode(ended[1])
                until = min(until, time.monotonic() + 15) if codes[pid] else until
        if time.monotonic() > until:
            for pid in set(ranks) - set(codes):
                os.kill(pid, signal.SIGKILL)
            until = float("inf")
        time.sleep(0.005)
    return [codes[pid] for pid in ranks]


def content(folder: Path) -> dict[str, str]:
    """Return a hash of every file of a run folder, without the values that differ between equal runs."""
    out = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if not path.is_file() or name.startswith(MEMOS):
            continue
        data = path.read_bytes()
        if path.suffix == ".jsonl":
            lines = [json.loads(x) for x in data.decode().splitlines()]
            data = json.dumps([{k: v for k, v in x.items() if k not in VOLATILE} for x in lines]).encode()
        elif path.suffix == ".json" and "state" not in name:
            data = json.dumps(stripped(json.loads(data))).encode()
        elif path.suffix == ".html":
            data = b"a page"
        out[name] = hashlib.sha256(data).hexdigest()
    return out


def where(wanted: Any, got: Any, at: str = "") -> list[str]:
    """Return the places in JSON values that differ, with both values."""
    if isinstance(wanted, dict) and isinstance(got, dict):
        return [x for k in {**wanted, **got} for x in where(wanted.get(k), got.get(k), f"{at}/{k}")]
    if isinstance(wanted, list) and isinstance(got, list) and len(wanted) == len(got):
        return [x for i, pair in enumerate(zip(wanted, got, strict=True)) for x in where(*pair, f"{at}/{i}")]
    return [] if wanted == got else [f"{at}: {wanted!r:.60} -> {got!r:.60}"]


def differences(wanted: Path, got: Path) -> list[str]:
    """Return the files of two run folders that differ; in JSON files the places."""
    one, two = content(wanted), content(got)
    names = sorted(n for n in {*one, *two} if one.get(n) != two.get(n))
    out = []
    for name in names:
        places: list[str] = []
        if name.endswith(".json") and name in one and name in two:
            both = [stripped(json.loads((folder / name).read_bytes())) for folder in (wanted, got)]
            places = where(both[0], both[1]) or [": order of keys"]
        out += [f"{name}{place}" for place in places] or [name]
    return out


def stripped(value: Any) -> Any:
    """Return JSON values without those that differ between equal runs."""
    if isinstance(value, dict):
        return {k: stripped(v) for k, v in value.items() if k not in VOLATILE}
    return [stripped(v) for v in value] if isinstance(value, list) else value


def prepare(folder: Path, kind: Kind) -> list[list[str]]:
    """Write data, checkpoint and recipe of a kind into a folder, and return its commands."""
    import torch

    from inlaid import config, families
    from inlaid.media import video
    from inlaid.networks import rgba_vae_checkpoint
    from inlaid.tiny import random as tiny

    case = next(c for c in tiny.cases() if c[0] == kind.case[0] and kind.case[1] in (c[1], ""))
    model = tiny.build(case[0], folder / "model", case[1])
    family = families.get(case[0])(config.Model(checkpoint=str(model), **tiny.model(*case)))
    raw: dict[str, Any] = {
        "run": "run",
        "model": {**tiny.model(*case), "checkpoint": "model"},
        "data": {"sources": "clips", "validation": 1},
        "tuner": {"kind": "lora", "rank": 4},
        "optim": {"lr": 1e-3},
        "train": {"steps": STEPS, "save_every": 2, "log_every": 1, "validate_every": 3, "trackers": []},
        "sample": {"steps": 2, "every": 3},
    }
    if family.modality == "scene":
        scenes(folder / "clips")
        raw["sample"] = {"steps": 2, "grid": 16}
    else:
        grid = family.grid
        size = [grid.spatial * 2, grid.spatial * 2]
        frames = grid.offset + grid.temporal * (1 if grid.offset > 1 else 2)
        raw["data"] |= {"size": size, "frames": frames}
        (folder / "clips").mkdir()
        for i in range(4):
            channels = 4 if "alpha" in kind.changes else 3
            pixels = np.random.default_rng(i).integers(0, 255, (frames, *size, channels), dtype=np.uint8)
            if channels == 4:
                np.savez(folder / f"clips/{i}.npz", frames=pixels, fps=family.fps)
            else:
                video.write_video(folder / f"clips/{i}.mp4", pixels, family.fps)
            (folder / f"clips/{i}.txt").write_text(f"clip number {i}", "utf-8")
        raw["sample"]["prompts"] = ["clip number 1"]
    for key, value in kind.changes.items():
        raw[key] = value
    if raw.get("alpha", {}).get("kind") == "merged":
        from support.rgba_vaes import made

        rgba_vae_checkpoint.save(made(family.load("vae", torch.float32)), folder / "rgba_vae", alpha_eps=0.01)
    (folder / "r.yaml").write_text(json.dumps(raw), "utf-8")
    return [["train", "r.yaml"], ["evaluate", "run"], ["export", "run", "--to", kind.export]]


def scenes(folder: Path) -> None:
    """Write four small scenes of two balls."""
    from PIL import Image

    for i in range(4):
        place = folder / f"scene_{i}"
        place.mkdir(parents=True)
        rng = np.random.default_rng(i)
        picture, ids = np.full((24, 24, 3), 255, np.uint8), np.zeros((24, 24), np.uint8)
        for k in (1, 2):
            rows = slice(8 * (k - 1), 8 * k - 1)
            picture[rows, 4 + i : 16 + i], ids[rows, 4 + i : 16 + i] = rng.integers(0, 200, 3), k
            normal = rng.standard_normal((300, 3))
            normal /= np.linalg.norm(normal, axis=-1, keepdims=True)
            surface = np.concatenate([0.2 * normal + [0.5 * k - 1, 0, 0.1 * i], normal], -1)
            np.save(place / f"surface_{k}.npy", surface.astype(np.float32))
        Image.fromarray(picture).save(place / "scene_rgb.png")
        Image.fromarray(ids).save(place / "seg.png")


@contextlib.contextmanager
def inside(folder: Path) -> Iterator[None]:
    """Work in a folder."""
    old = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(old)


def trial(command: list[str], kind: Kind, place: str, count: int, seconds: float) -> str:
    """Kill a command once in the current folder and repeat it; return how that went."""
    how: dict[str, Any] = {"after": seconds} if place == "random" else {"kill": (place, count)}
    if not any(run(command, kind.processes, **how)):
        return "not killed: it had ended"
    codes, text = run(command, kind.processes), Path("log").read_text("utf-8")
    whole = codes == [2] and "already exists" in text[-400:]  # the export was complete
    return "killed" if whole or not any(codes) else f"FAILED {codes}: {text[-300:]}"


@dataclass
class Ready:
    """A kind of run with its uninterrupted result: after each command a copy of the folder, and seconds."""

    kind: Kind
    commands: list[list[str]]
    stages: list[Path]
    seconds: list[float]

    @classmethod
    def of(cls, kind: Kind, folder: Path) -> Ready:
        """Write data, checkpoint and recipe of a kind."""
        stage = folder / "stage0"
        stage.mkdir(parents=True)
        return cls(kind, prepare(stage, kind), [stage], [])

    def complete(self, count: int) -> None:
        """Run the first commands without interruption, unless that is done."""
        for i in range(len(self.seconds), count):
            following = shutil.copytree(self.stages[i], self.stages[0].with_name(f"stage{i + 1}"))
            start, command = time.monotonic(), self.commands[i]
            with inside(following):
                codes = run(command, self.kind.processes)
                assert not any(codes), f"{self.kind.name}: {Path('log').read_text('utf-8')[-1500:]}"
            self.stages.append(following)
            self.seconds.append(time.monotonic() - start)


def matrix(folder: Path, kills: int, seed: int, seconds: float) -> dict[str, Any]:
    """Kill commands of runs of every kind, repeat them, and compare every file with the uninterrupted run.

    Args:
        folder: empty folder to work in.
        kills: number of kills over all kinds.
        seed: seed of the places and times.
        seconds: time after which no further kill is started.
    """
    rng, began, rows = random.Random(seed), time.monotonic(), []
    ready: dict[str, Ready] = {}
    for i in range(kills):
        kind, place = KINDS[i % len(KINDS)], PLACES[(i // len(KINDS) + i) % len(PLACES)]
        if time.monotonic() - began > seconds:
            break
        if kind.name not in ready:
            ready[kind.name] = Ready.of(kind, folder / re.sub(r"\W+", "-", kind.name))
        whole = ready[kind.name]
        stage = {"report": 1, "export": 2, "random": rng.choice([0, 0, 1, 2])}.get(place, 0)
        whole.complete(stage + 1)
        for most in (8, 3, 1):  # a place may have fewer events: smaller numbers until it is killed
            count, after = rng.randint(1, most), rng.random() * whole.seconds[stage]
            mine = shutil.copytree(whole.stages[stage], folder / "trial")
            with inside(mine):
                how = trial(whole.commands[stage], kind, place, count, after)
            differ = differences(whole.stages[stage + 1] / "run", mine / "run")
            left = [p.name for p in mine.rglob(".tmp-*")]
            shutil.rmtree(mine)
            if not how.startswith("not killed"):
                break
        differ += left
        at = f"{after:.2f} s" if place == "random" else f"event {count} in {place}"
        row = {"kind": kind.name, "command": whole.commands[stage][0], "place": place, "at": at}
        rows.append({**row, "outcome": how, "differ": differ[:5]})
        print(f"{i + 1}: {kind.name}, {row['command']}, {at}, {how}: {differ[:3] or 'identical'}", flush=True)
    return {"kills": len(rows), "identical": sum(not r["differ"] for r in rows), "seed": seed, "rows": rows}


def table(found: dict[str, Any]) -> str:
    """Return the result as a Markdown table of kinds and places: identical of killed."""
    head = ["kind", *PLACES]
    count = f"{found['identical']} of {found['kills']} kills"
    lines = [f"{count}: everything present and bit-identical after the same command again.", ""]
    lines += [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for kind in KINDS:
        cells = []
        for place in PLACES:
            rows = [r for r in found["rows"] if (r["kind"], r["place"]) == (kind.name, place)]
            cells.append(f"{sum(not r['differ'] for r in rows)} of {len(rows)}" if rows else "")
        lines.append(f"| {kind.name} | {' | '.join(cells)} |")
    missed = sum(r["outcome"].startswith("not killed") for r in found["rows"])
    lines += ["", f"{missed} of the commands had ended before the kill, or had no such event."]
    return "\n".join(lines) + "\n"
