"""Mutation fuzzer of users' files: recipe, manifest, adapter, state, clip and array.

`python tests/fuzz/fuzz.py 5000` changes valid files at random and reads them. A reader may accept a file or
refuse it with a ValueError or OSError, whose message the command line prints; everything else is a traceback.
It prints the number of tracebacks, of hangs (over 10 s), the peak memory, and the accepted files by class,
with the reason of each class.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import resource
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HANG = 10.0
"""Seconds after which a case counts as a hang and its process is killed."""

KINDS = ("recipe", "manifest", "adapter", "state", "clip", "array")

NUMBERS = (
    b"0",
    b"-1",
    b"NaN",
    b"Infinity",
    b"1e308",
    b"99999999999999999999",
    b"null",
    b"true",
    b"010",
    b"1e3",
)

REASONS = {
    "recipe": "another valid value, name, prompt or path: valid YAML of known keys in their ranges",
    "manifest": "another text: captions and groups are free text, and unknown columns are ignored",
    "adapter": "other weights: the formats have no checksum, and all values are finite and shapes fit",
    "clip": "other pixels, or fewer frames: the formats have no checksum and decode without an error",
    "array": "other pixels or points: values are in range, and the archive's CRC fits or is absent (.npy)",
}
"""Why a changed file is accepted whose content differs; a changed checkpoint never is."""

TOKENS = (
    *(
        b"\0",
        b"\xff\xfe",
        b"\xef\xbb\xbf",
        b"\x1b[2J",
        b"../",
        b"/etc/passwd",
        b"\\",
        b"%s",
        b"{{",
        b"\xf0\x9f\x90\x95",
    ),
    *(
        b"[" * 400,
        b"{" * 400,
        b'{"a":' * 400,
        b"&a [*a]",
        b"!!python/object:os.system",
        b"x" * 70_000,
        b"\n",
        b"\t",
        b";",
    ),
)


@dataclass
class Totals:
    """Results of many cases."""

    cases: int = 0
    refused: int = 0
    tracebacks: list[str] = field(default_factory=list)
    hangs: list[str] = field(default_factory=list)
    accepted: Counter[str] = field(default_factory=Counter)
    slowest: float = 0.0
    peak: int = 0
    """Peak resident memory of a worker in kB."""


# --- mutations ----------------------------------------------------------------------------------------------


def mutate(raw: bytes, rng: random.Random, other: bytes) -> bytes:
    """Return changed bytes."""
    kind = rng.choice(
        ("flip", "cut", "grow", "token", "number", "swap", "length", "splice", "repeat", "clear")
    )
    at, to = sorted(rng.randrange(len(raw) + 1) for _ in range(2))
    if kind == "flip":
        out = bytearray(raw)
        for _ in range(rng.choice((1, 1, 2, 8, 64))):
            out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)
        return bytes(out)
    if kind == "cut":
        return raw[:at] if rng.random() < 0.5 else raw[:at] + raw[to:]
    if kind == "grow":
        return raw[:at] + rng.randbytes(rng.choice((1, 7, 300, 5000))) + raw[at:]
    if kind == "token":
        return raw[:at] + rng.choice(TOKENS) + raw[at:]
    if kind == "number":
        digits = [i for i, c in enumerate(raw[:4000]) if 48 <= c <= 57]
        at = rng.choice(digits) if digits else at
        return raw[:at] + rng.choice(NUMBERS) + raw[at + 1 :]
    if kind == "swap":
        return raw[:at][::-1] + raw[at:] if rng.random() < 0.2 else raw[to:] + raw[at:to] + raw[:at]
    if kind == "length":  # where headers store sizes
        out, place = bytearray(raw), rng.randrange(min(len(raw), rng.choice((16, 200, 2000, len(raw)))))
        out[place : place + 4] = rng.choice(
            (b"\xff\xff\xff\xff", b"\xff\xff\xff\x7f", b"\0\0\0\0", b"\0\0\0\x80")
        )
        return bytes(out)
    if kind == "splice":
        return raw[:at] + other[rng.randrange(len(other) + 1) :]
    if kind == "repeat":
        return raw[:at] + raw[at : at + 50] * rng.choice((2, 10, 500)) + raw[at + 50 :]
    return raw[:at] + b"\0" * (to - at) + raw[to:]


# --- targets ------------------------------------------------------------------------------------------------


class Targets:
    """Valid files of every kind, and how each is read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.seeds: dict[str, list[tuple[str, bytes]]] = {k: [] for k in KINDS}
        self._known: dict[str, Any] = {}
        self._recipes()
        self._clips()
        self._adapters()
        self._states()

    def _recipes(self) -> None:
        source = Path(__file__).parents[2] / "recipes"
        for file in sorted(source.rglob("*.yaml"))[:6]:
            self.seeds["recipe"].append(("r.yaml", file.read_bytes()))

    def _clips(self) -> None:
        import numpy as np
        from PIL import Image

        from inlaid.media.video import write_video

        self.clips = self.folder / "clips"
        self.clips.mkdir()
        frames = (np.random.default_rng(0).random((9, 32, 64, 3)) * 255).astype(np.uint8)
        for name in "ab":
            write_video(self.clips / f"{name}.mp4", frames, 16)
        manifests: dict[str, str] = {
            "m.csv": 'video,caption,group\na.mp4,"a fox, red",x\nb.mp4,two,y\n',
            "m2.csv": "Video;Caption\na.mp4;one\nb.mp4;two\n",
            "m.jsonl": '{"video": "a.mp4", "caption": "one"}\n{"video": "b.mp4", "caption": "two"}\n',
            "m.json": '[{"file_name": "a.mp4", "prompt": "one"}, {"file_name": "b.mp4", "prompt": "two"}]',
            "m3.json": '{"a.mp4": "one", "b": "two"}',
        }
        self.seeds["manifest"] = [(n, t.encode()) for n, t in manifests.items()]
        self.seeds["manifest"].append(("m4.csv", manifests["m.csv"].encode("utf-16")))
        files: dict[str, Callable[[Path], Any]] = {
            "x.mp4": lambda p: write_video(p, frames, 16),
            "x.png": lambda p: Image.fromarray(frames[0]).save(p),
            "x.jpg": lambda p: Image.fromarray(frames[0]).save(p),
            "x.webp": lambda p: Image.fromarray(frames[0]).save(p),
            "x.bmp": lambda p: Image.fromarray(frames[0]).save(p),
            "x.gif": lambda p: Image.fromarray(frames[0]).save(
                p, save_all=True, append_images=[Image.fromarray(f) for f in frames[1:]], duration=60
            ),
        }
        for name, write in files.items():
            write(self.folder / name)
            self.seeds["clip"].append((name, (self.folder / name).read_bytes()))
        for suffix, codec in (
            (".mkv", "libx264"),
            (".avi", "mpeg4"),
            (".webm", "libvpx-vp9"),
            (".ts", "libx264"),
        ):
            self.seeds["clip"].append((f"x{suffix}", _encoded(self.folder / f"y{suffix}", codec, frames)))
        surface = np.random.default_rng(1).standard_normal((40, 6)).astype(np.float32) / 5
        arrays: dict[str, Callable[[Path], Any]] = {
            "x.npz": lambda p: np.savez(p, frames=frames, fps=16.0),
            "y.npz": lambda p: np.savez_compressed(p, frames=np.moveaxis(frames, -1, 0)),
            "surface_1.npy": lambda p: np.save(p, surface),
            "surface_2.npz": lambda p: np.savez(
                p, surface_points=surface[:, :3], surface_normals=surface[:, 3:]
            ),
        }
        for name, write in arrays.items():
            write(self.folder / name)
            self.seeds["array"].append((name, (self.folder / name).read_bytes()))

    def _adapters(self) -> None:
        import torch
        from safetensors.torch import save_file

        layers = {f"blocks.{i}.attn1.{k}": (8, 8) for i in range(2) for k in ("to_q", "to_k", "to_v")}
        own = {}
        for name, (n_out, n_in) in layers.items():
            own[f"transformer.{name}.lora_A.weight"] = torch.randn(4, n_in)
            own[f"transformer.{name}.lora_B.weight"] = torch.randn(n_out, 4)
        config = {
            "r": 4,
            "lora_alpha": 4,
            "alpha_pattern": {"to_q": 8},
            "peft_type": "LORA",
            "use_dora": False,
        }
        header = {"lora_adapter_metadata": json.dumps({f"transformer.{k}": v for k, v in config.items()})}
        kohya = {}
        for name, (n_out, n_in) in layers.items():
            flat = "lora_unet_" + name.replace("attn1.to_", "self_attn.").replace(".", "_")
            kohya |= {
                f"{flat}.lora_down.weight": torch.randn(4, n_in),
                f"{flat}.lora_up.weight": torch.randn(n_out, 4),
            }
            kohya[f"{flat}.alpha"] = torch.tensor(2.0)
        lokr = {}
        for name in layers:
            flat = "lycoris_" + name.replace(".", "_")
            lokr |= {f"{flat}.lokr_w1": torch.randn(2, 2), f"{flat}.alpha": torch.tensor(1.0)}
            lokr |= {f"{flat}.lokr_w2_a": torch.randn(4, 1), f"{flat}.lokr_w2_b": torch.randn(1, 4)}
        save_file(lokr, self.folder / "e.safetensors", metadata={"ss_network_alpha": "1"})
        save_file(own, self.folder / "a.safetensors", metadata=header)
        save_file(kohya, self.folder / "b.safetensors")
        torch.save(own, self.folder / "c.pt")
        torch.save(own, self.folder / "d.bin", _use_new_zipfile_serialization=False)
        for name in ("a.safetensors", "b.safetensors", "c.pt", "d.bin", "e.safetensors"):
            self.seeds["adapter"].append((name, (self.folder / name).read_bytes()))

    def _states(self) -> None:
        import torch

        from inlaid.training.checkpoints import save_state

        run = self.folder / "run"
        place = run / "checkpoints" / "step-000002"
        place.mkdir(parents=True)
        (run / "config.yaml").write_bytes(self.seeds["recipe"][0][1])
        save_state(place, {"x": torch.zeros(2)}, {"step": 2, "per_step": 1, "optimizer": "adamw"})
        for name in ("state.json", "trainer.safetensors"):
            self.seeds["state"].append((name, (place / name).read_bytes()))
        memo = {"2|/x|9|8|7|6": {"frames": 9, "fps": "16", "height": 32, "width": 64, "duration": 0.5}}
        self.seeds["state"].append(("probes.json", json.dumps(memo).encode()))

    def why(self, kind: str, name: str, raw: bytes, content: Any) -> str:
        """Return why changed bytes were accepted: the reason of their class.

        Raises:
            AssertionError: if a checkpoint with other content was accepted, which has hashes.
        """
        if name not in self._known:
            original = next(seed for known, seed in self.seeds[kind] if known == name)
            self._known[name] = self.read(kind, name, original)
        if repr(content) == repr(self._known[name]):
            return "read as the same content: the change is in a part that is not used"
        assert kind != "state", f"{name}: another content was accepted"
        return REASONS[kind]

    def read(self, kind: str, name: str, raw: bytes) -> Any:
        """Write changed bytes to a file, read it as the commands do, and return the content or its digest."""
        from inlaid import config
        from inlaid.adapters.inspect import describe, inspect_path
        from inlaid.adapters.read import read_adapter
        from inlaid.data.clips import VideoWindow
        from inlaid.data.layouts import find_clips
        from inlaid.data.plan import plan_dataset, require_usable
        from inlaid.data.probes import CachedProbes
        from inlaid.families.grid import Grid
        from inlaid.families.wan import Wan
        from inlaid.media import meshes
        from inlaid.training.checkpoints import load_tensors, verify

        if kind == "recipe":
            (self.folder / name).write_bytes(raw)
            return config.load(self.folder / name).model_dump()
        if kind == "manifest":
            (self.clips / name).write_bytes(raw)
            found = find_clips(config.Source(path=str(self.clips / name)), 0, None, 3)
            _require(found.problems)
            return [repr(clip) for clip in found.clips]
        if kind == "adapter":
            (self.folder / name).write_bytes(raw)
            describe(inspect_path(self.folder / name))
            return _digest(read_adapter(self.folder / name, Wan).tensors)
        if kind == "state":
            place = self.folder / "run" / "checkpoints" / "step-000002"
            for other, content in self.seeds["state"]:
                (place / other).write_bytes(raw if other == name else content)
            if name == "probes.json":
                return CachedProbes(place).probe(self.clips / "a.mp4")
            verify(place)
            describe(inspect_path(place))
            return _digest(load_tensors(place)), json.loads((place / "state.json").read_text("utf-8"))
        if name.startswith("surface"):
            (self.folder / name).write_bytes(raw)
            return repr([vars(s) for s in meshes.read_surface(self.folder / name)])
        folder = self.folder / "one"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        (folder / name).write_bytes(raw)
        (folder / name).with_suffix(".txt").write_text("x")
        data = config.Data(sources=[str(folder)], size=(32, 64), frames=[1, 9], validation=0)
        plan = plan_dataset(data, Grid(spatial=16, temporal=4), 16, 0)
        require_usable(plan, "stop")
        out = []
        for window in plan.train:
            assert isinstance(window, VideoWindow)
            out.append(window.read().tobytes())
        return out


def _encoded(path: Path, codec: str, frames: Any) -> bytes:
    import av

    with av.open(str(path), "w", format="mpegts" if path.suffix == ".ts" else None) as out:
        stream: Any = out.add_stream(codec, rate=16)
        stream.width, stream.height, stream.pix_fmt = 64, 32, "yuv420p"
        for frame in frames:
            out.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        out.mux(stream.encode())
    return path.read_bytes()


def _digest(tensors: Mapping[str, Any]) -> dict[str, bytes]:
    return {k: tensors[k].contiguous().numpy().tobytes() for k in sorted(tensors)}


def _require(problems: Any) -> None:
    errors = [p for p in problems if p.severity == "error"]
    if errors:
        raise ValueError(str(errors[0]))


# --- running ------------------------------------------------------------------------------------------------


def case(targets: Targets, kind: str, seed: int) -> tuple[str, str, float]:
    """Run one case: result (`accepted`, `refused` or `traceback`), its class or text, and seconds."""
    rng = random.Random(f"{kind} {seed}")
    name, raw = rng.choice(targets.seeds[kind])
    other = rng.choice(targets.seeds[kind])[1]
    changed = mutate(raw, rng, other)
    for _ in range(rng.choice((0, 0, 1, 3))):
        changed = mutate(changed or b"\0", rng, other)
    start = time.monotonic()
    try:
        content = targets.read(kind, name, changed)
        reason = targets.why(kind, name, changed, content) if changed != raw else "unchanged"
        result = "accepted", f"{kind}: {reason}"
    except (ValueError, OSError) as error:
        control = [c for c in str(error) if ord(c) < 32 and c != "\n"]
        result = (
            ("traceback", f"control characters in the message: {error!r}") if control else ("refused", "")
        )
    except BaseException:
        result = "traceback", f"{kind} {seed} ({name}):\n{traceback.format_exc()[-1500:]}"
    return *result, time.monotonic() - start


def _worker(jobs: Any, results: Any, folder: str) -> None:
    warnings.simplefilter("ignore")
    sys.stderr = open("/dev/null", "w")  # noqa: SIM115, PTH123 - libraries print to it
    random.seed(0)
    targets = Targets(Path(tempfile.mkdtemp(dir=folder)))
    for kind, files in targets.seeds.items():  # imports everything
        for name, raw in files:
            targets.read(kind, name, raw)
    results.put(("ready", "", 0, "", "", 0.0, 0))
    while (job := jobs.get()) is not None:
        done = case(targets, *job)
        results.put(("done", *job, *done, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss))


def run(count: int, seconds: float, kinds: tuple[str, ...] = KINDS, first: int = 0) -> Totals:
    """Run cases of all kinds in turn until `count` are done or the time is over."""
    totals, end = Totals(), time.monotonic() + seconds
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        worker, jobs, results = None, context.Queue(), context.Queue()
        for i in range(count):
            if time.monotonic() > end:
                break
            if worker is None:
                jobs, results = context.Queue(), context.Queue()
                worker = context.Process(target=_worker, args=(jobs, results, folder), daemon=True)
                worker.start()
                results.get(timeout=300)
            job = (kinds[i % len(kinds)], first + i)
            jobs.put(job)
            totals.cases += 1
            try:
                _, _, _, result, text, spent, peak = _wait(results, worker)
            except TimeoutError as error:
                (totals.hangs if str(error) == "hang" else totals.tracebacks).append(f"{job}: {error}")
                worker.kill()
                worker = None
                continue
            totals.slowest, totals.peak = max(totals.slowest, spent), max(totals.peak, peak)
            totals.refused += result == "refused"
            if result == "accepted":
                totals.accepted[text] += 1
            elif result == "traceback":
                totals.tracebacks.append(text)
        if worker is not None:
            jobs.put(None)
            worker.join(10)
    return totals


def _wait(results: Any, worker: Any) -> Any:
    """Return the next result.

    Raises:
        TimeoutError: `hang`, or that the process died.
    """
    import queue

    start = time.monotonic()
    while time.monotonic() - start < HANG:
        try:
            return results.get(timeout=0.5)
        except queue.Empty:
            if not worker.is_alive():
                raise TimeoutError(f"the process died with code {worker.exitcode}") from None
    raise TimeoutError("hang")


def main() -> None:
    """Run the number of cases given on the command line and print the totals."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("count", type=int, nargs="?", default=5000)
    parser.add_argument("--seconds", type=float, default=3600)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--kinds", nargs="*", default=list(KINDS))
    given = parser.parse_args()
    totals = run(given.count, given.seconds, tuple(given.kinds), given.first)
    for text in totals.tracebacks[:20]:
        print(text, "\n")
    print(f"{totals.cases} cases, {totals.refused} refused, tracebacks {len(totals.tracebacks)}, ", end="")
    print(
        f"hangs over {HANG:g} s {len(totals.hangs)} {totals.hangs[:5]}, slowest {totals.slowest:.1f} s, ",
        end="",
    )
    print(f"peak memory {totals.peak / 1e3:,.0f} MB")
    print(f"accepted {sum(totals.accepted.values())}:", _table(totals.accepted))
    sys.exit(bool(totals.tracebacks or totals.hangs))


def _table(accepted: Mapping[str, int]) -> str:
    return "".join(f"\n  {n:5}  {name}" for name, n in sorted(accepted.items()))


if __name__ == "__main__":
    main()
