"""Runtime of a run: devices, processes, optimizer, run folder, checkpoints and metrics."""

from __future__ import annotations

import json
import math
import os
import platform
import re
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from inlaid import config as recipe
from inlaid import memory
from inlaid.files import atomic, sha256

# --- device and processes ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Devices:
    """Devices of a machine, as a value so that tests can describe any machine."""

    cuda: int = 0
    cuda_bfloat16: bool = False
    mps: bool = False

    @classmethod
    def here(cls) -> Devices:
        """Detect the devices of this machine."""
        cuda = torch.cuda.device_count() if torch.cuda.is_available() else 0
        return cls(
            cuda,
            bool(cuda) and torch.cuda.is_bf16_supported(including_emulation=False),
            torch.backends.mps.is_available(),
        )


@dataclass(frozen=True)
class Plan:
    """Resolved device, precision and optimizer of a recipe, with a note for every replaced setting."""

    device: str
    precision: torch.dtype
    optimizer: str
    notes: tuple[str, ...] = ()


def resolve(config: recipe.Config, devices: Devices) -> Plan:
    """Choose device, precision and optimizer.

    Raises:
        ValueError: when the recipe names a device that this machine does not have.
    """
    wanted, notes = config.runtime.device, []
    there = {"cuda": devices.cuda > 0, "mps": devices.mps, "cpu": True}
    if wanted != "auto" and not there[wanted]:
        have = ", ".join(k for k, v in there.items() if v)
        raise ValueError(
            f"runtime.device: no `{wanted}` on this machine (available: {have}); use `auto` or one of these"
        )
    device = next(k for k, v in there.items() if v) if wanted == "auto" else wanted
    precision = {"bfloat16": torch.bfloat16, "float32": torch.float32}.get(config.runtime.precision)
    if precision is None:
        precision = torch.bfloat16 if device == "cuda" else torch.float32
    if precision is torch.bfloat16 and device == "cuda" and not devices.cuda_bfloat16:
        precision = torch.float32
        notes.append("this GPU has no bfloat16: using float32 (twice the memory for the base model)")
    optimizer = config.optim.name
    if optimizer in ("adamw8bit", "adamw4bit") and device == "mps":
        notes.append(
            f"{optimizer} does not run on Apple MPS: using adamw (same result up to rounding, "
            f"{'four' if optimizer == 'adamw8bit' else 'eight'} times the optimizer state)"
        )
        optimizer = "adamw"
    return Plan(device, precision, optimizer, tuple(notes))


@dataclass
class Context:
    """Device, precision and rank of this process."""

    device: torch.device
    precision: torch.dtype
    optimizer: str
    rank: int = 0
    world: int = 1
    notes: tuple[str, ...] = ()

    @property
    def main(self) -> bool:
        """True for the process that writes files and prints."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.world > 1:
            dist.barrier()

    def total(self, value: Tensor) -> Tensor:
        """Return the sum of a tensor over all processes; changes it in place."""
        if self.world > 1:
            dist.all_reduce(value)
        return value

    def gather(self, value: Any) -> list[Any]:
        """Return one picklable value per process, ordered by rank."""
        if self.world == 1:
            return [value]
        out: list[Any] = [None] * self.world
        dist.all_gather_object(out, value)
        return out


PATIENCE = timedelta(hours=4)
"""Timeout of collective operations; the default of 10 minutes is too short while one process encodes, samples
or saves."""


@contextmanager
def start(config: recipe.Config) -> Iterator[Context]:
    """Join the processes started by `torchrun` or `accelerate launch`, and leave the group at the end.

    Raises:
        ValueError: when the recipe requires another number of processes or a missing device.
    """
    world, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    plan = resolve(config, Devices.here())
    if config.runtime.world_size not in (None, world):
        raise ValueError(
            f"runtime.world_size: the recipe requires {config.runtime.world_size} process(es), "
            f"this launch has {world}; start it with "
            f"`torchrun --nproc-per-node {config.runtime.world_size} -m inlaid train RECIPE`"
        )
    local = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device(plan.device, local) if plan.device == "cuda" else torch.device(plan.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
    try:
        yield Context(device, plan.precision, plan.optimizer, rank, world, plan.notes)
    finally:
        if world > 1:
            dist.destroy_process_group()


class Interrupt:
    """Handle the first Ctrl-C or SIGTERM as a request to stop after this step; the second stops at once."""

    def __init__(self) -> None:
        self.wanted = False
        self._old: dict[int, Any] = {}

    def __enter__(self) -> Interrupt:
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self._old[number] = signal.signal(number, self._handle)
            except ValueError:  # not in the main thread: the caller handles signals
                break
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: Any) -> None:
        if self.wanted:
            raise KeyboardInterrupt
        self.wanted = True
        print("\nstopping after this step; interrupt again to stop at once", file=sys.stderr, flush=True)


# --- optimizer --------------------------------------------------------------------------------------------


PACKAGES = {
    "adamw8bit": ("bitsandbytes.optim", "inlaid[bnb]"),
    "adamw4bit": ("torchao.optim", "inlaid[torchao]"),
    "int8": ("torchao.quantization", "inlaid[torchao]"),
    "float8": ("torchao.quantization", "inlaid[torchao]"),
    "nf4": ("bitsandbytes.nn", "inlaid[bnb]"),
    "prodigy": ("prodigyopt", "inlaid[prodigy]"),
    "deepspeed": ("deepspeed", "inlaid[deepspeed]"),
    "tensorboard": ("torch.utils.tensorboard", "tensorboard"),
    "trackio": ("trackio", "inlaid[trackio]"),
    "wandb": ("wandb", "inlaid[wandb]"),
}
"""Module and installation name of optimizers, quantization methods and trackers, by their name in recipes."""


def package(key: str, name: str) -> Any:
    """Import the module in `PACKAGES` that `key` of a recipe names.

    Raises:
        ValueError: when it is not installed.
    """
    module, install = PACKAGES[name]
    try:
        return import_module(module)
    except ImportError as error:
        raise ValueError(
            f"{key}: `{name}` needs a package that is not installed ({error}): pip install '{install}'"
        ) from None


def optimizer(
    name: str, section: recipe.Optim, parameters: Sequence[nn.Parameter], *, offload: bool = False
) -> torch.optim.Optimizer:
    """Create an optimizer by name; one-dimensional weights (norms, biases, DoRA magnitudes) do not decay.

    Args:
        name: one of `optim.name`.
        section: the `optim` section of the recipe.
        parameters: parameters to train.
        offload: keep the optimizer state in CPU memory and step there.

    Raises:
        ValueError: when its package is not installed.
    """
    if offload:
        return memory.Offloaded(parameters, lambda here: optimizer(name, section, here))
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": section.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    groups = [g for g in groups if g["params"]]
    common: dict[str, Any] = {"lr": section.lr, "betas": section.betas, "eps": section.eps}
    if name == "adamw8bit":
        return package("optim.name", name).AdamW8bit(groups, **common)
    if name == "adamw4bit":
        made = package("optim.name", name).AdamW4bit(groups, **common)
        made.register_step_pre_hook(_tensor_rates)
        return made
    if name == "prodigy":
        return package("optim.name", name).Prodigy(
            groups, **common, decouple=True, use_bias_correction=True, safeguard_warmup=section.warmup > 0
        )
    return torch.optim.AdamW(
        groups, **common, fused=all(p.device.type in ("cuda", "cpu") for p in parameters)
    )


def _tensor_rates(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Convert learning rates to tensors: torchao's compiled step would recompile for every new number."""
    for group in optimizer.param_groups:
        group["lr"] = torch.as_tensor(group["lr"], dtype=torch.float32)


def rate(section: recipe.Optim, step: int, steps: int) -> float:
    """Return the learning rate of a step (counted from 0); a pure function."""
    if step < section.warmup:
        return section.lr * (step + 1) / section.warmup
    done = (step - section.warmup) / max(1, steps - section.warmup)
    if section.schedule == "cosine":
        return section.lr * 0.5 * (1 + math.cos(math.pi * done))
    return section.lr * (1 - done) if section.schedule == "linear" else section.lr


class EMA:
    """Exponential moving average of the trained weights.

    The decay warms up as (1 + step) / (10 + step).
    """

    def __init__(self, decay: float, weights: Mapping[str, Tensor]) -> None:
        self.decay = decay
        self.weights = {n: w.detach().clone() for n, w in weights.items()}

    @torch.no_grad()
    def update(self, weights: Mapping[str, Tensor], step: int) -> None:
        """Update the EMA after a step."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, average in self.weights.items():
            average.lerp_(weights[name].detach(), 1 - decay)


@contextmanager
def swapped(held: Mapping[str, Tensor], weights: Mapping[str, Tensor] | None) -> Iterator[None]:
    """Swap the contents of two sets of tensors inside the context, in place.

    In place, because other objects hold references to the tensors.
    """

    @torch.no_grad()
    def exchange(weights: Mapping[str, Tensor]) -> None:
        for name, tensor in held.items():
            kept = tensor.detach().clone()
            tensor.copy_(weights[name])
            weights[name].copy_(kept)

    if weights is None:
        yield
        return
    exchange(weights)
    try:
        yield
    finally:
        exchange(weights)


# --- run folder and checkpoints ---------------------------------------------------------------------------


FREE = ("run", "sample", "runtime", "memory", "data.cache", "data.bad_clips")
FREE_TRAIN = ("steps", "save_every", "keep", "log_every", "validate_every", "trackers", "accumulate")
"""Parts of a recipe that may change when a run is resumed; any other change makes it a different run."""


def changes(old: recipe.Config, new: recipe.Config) -> list[str]:
    """Return messages about differences between a run and the recipe to resume it that are not allowed."""

    def flat(config: recipe.Config) -> dict[str, Any]:
        out = {}
        for key, value in json.loads(config.model_dump_json()).items():
            out |= {f"{key}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {key: value}
        return out

    a, b = flat(old), flat(new)
    free = {*FREE, *(f"train.{k}" for k in FREE_TRAIN)}
    if new.optim.schedule != "constant":
        free.discard("train.steps")
    differ = [k for k in {**a, **b} if a.get(k) != b.get(k) and k not in free and k.split(".")[0] not in free]
    return [f"{k} was {a.get(k)!r}, is {b.get(k)!r}" for k in differ]


def environment() -> dict[str, Any]:
    """Return package versions and machine for `environment.json`."""
    packages = {}
    for name in (
        "inlaid",
        "torch",
        "diffusers",
        "transformers",
        "peft",
        "accelerate",
        "safetensors",
        "av",
        "numpy",
    ):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = "not installed"
    gpus = (
        [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        if torch.cuda.is_available()
        else []
    )
    return {
        "packages": packages,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "gpus": gpus,
    }


SUBCLASSES = ("OptimState4bit",)
"""Tensor subclasses of torchao that consist of several plain tensors."""


def pack(state: Any, prefix: str, tensors: dict[str, Tensor]) -> Any:
    """Move the tensors of a nested optimizer state to `tensors`, keyed by path; the result is JSON."""
    if type(state).__name__ in SUBCLASSES:
        parts, rest = state.__tensor_flatten__()
        kept = {n: pack(getattr(state, n), f"{prefix}.{n}", tensors) for n in parts}
        signed, shape, dtype = rest
        kept |= {"signed": signed, "shape": list(shape), "dtype": str(dtype).removeprefix("torch.")}
        return {"__subclass__": type(state).__name__, "parts": kept}
    if isinstance(state, Tensor):
        tensors[prefix] = state.detach()
        return {"__tensor__": prefix}
    if isinstance(state, Mapping):
        return {"__map__": [[k, pack(v, f"{prefix}.{k}", tensors)] for k, v in state.items()]}
    if isinstance(state, (list, tuple)):
        values = [pack(v, f"{prefix}.{i}", tensors) for i, v in enumerate(state)]
        return {"__tuple__": values} if isinstance(state, tuple) else values
    assert state is None or isinstance(state, (bool, int, float, str)), (
        f"{prefix}: {type(state).__name__} in optimizer state"
    )
    return state


def unpack(state: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Restore a state that `pack` returned."""
    if isinstance(state, dict) and "__tensor__" in state:
        return tensors[state["__tensor__"]]
    if isinstance(state, dict) and "__subclass__" in state:
        kept = {n: unpack(v, tensors) for n, v in state["parts"].items()}
        signed, shape, dtype = (kept.pop(k) for k in ("signed", "shape", "dtype"))
        kind = getattr(package("optim.name", "adamw4bit").subclass_4bit, state["__subclass__"])
        return kind.__tensor_unflatten__(kept, [signed, torch.Size(shape), getattr(torch, dtype)])
    if isinstance(state, dict) and "__map__" in state:
        return {k: unpack(v, tensors) for k, v in state["__map__"]}
    if isinstance(state, dict):
        return tuple(unpack(v, tensors) for v in state["__tuple__"])
    return [unpack(v, tensors) for v in state] if isinstance(state, list) else state


def save_state(folder: Path, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
    """Write `trainer.safetensors`, and `state.json` with the hash of every file of the folder."""
    save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, folder / "trainer.safetensors")
    files = {str(f.relative_to(folder)): sha256(f) for f in sorted(folder.rglob("*")) if f.is_file()}
    (folder / "state.json").write_text(json.dumps({**values, "files": files}), "utf-8")


def load_state(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read and verify a checkpoint.

    Raises:
        ValueError: when a file is missing, truncated or changed.
    """
    out = f"{folder}: this checkpoint is damaged (%s); delete the folder to resume from the previous one"
    try:
        values = json.loads((folder / "state.json").read_text("utf-8"))
        bad = [
            n
            for n, digest in values["files"].items()
            if not (folder / n).is_file() or sha256(folder / n) != digest
        ]
        bad += [f"{key} in state.json" for key in ("step", "per_step", "optimizer") if key not in values]
    except (OSError, ValueError, KeyError, TypeError) as error:
        cause = error.strerror if isinstance(error, OSError) else error
        raise ValueError(out % f"state.json: {cause}") from None
    if bad:
        raise ValueError(out % f"missing, truncated or changed: {', '.join(bad)}")
    try:
        return load_file(folder / "trainer.safetensors"), values
    except (SafetensorError, OSError) as error:
        raise ValueError(out % error) from None


@dataclass(frozen=True)
class Run:
    """Run folder and the paths in it."""

    folder: Path

    @property
    def adapter(self) -> Path:
        """Trained weights for other programs: an adapter, or a diffusers transformer (full fine-tuning)."""
        return self.folder / "adapter"

    @property
    def metrics(self) -> Path:
        """Metrics file, one JSON object per line."""
        return self.folder / "metrics.jsonl"

    def config(self) -> recipe.Config:
        """Return the recipe that the run was started with.

        Raises:
            ValueError: when the folder is not a run folder.
        """
        if not (self.folder / "config.yaml").is_file():
            raise ValueError(
                f"{self.folder}: not a run folder (it has no config.yaml); `inlaid train` creates one"
            )
        return recipe.load(self.folder)

    def cache(self, config: recipe.Config) -> Path:
        """Return the folder of cached items."""
        return Path(config.data.cache) if config.data.cache else self.folder / "cache"

    def checkpoints(self) -> list[Path]:
        """Return the complete checkpoints, oldest first."""
        found = [p for p in (self.folder / "checkpoints").glob("step-*") if re.fullmatch(r"step-\d+", p.name)]
        return sorted(found, key=lambda p: int(p.name[5:]))

    def checkpoint(self, name: str) -> Path:
        """Return a checkpoint by name or step.

        Raises:
            ValueError: when it does not exist.
        """
        wanted = [p for p in self.checkpoints() if name in (p.name, p.name[5:], p.name[5:].lstrip("0"))]
        if not wanted:
            have = ", ".join(p.name for p in self.checkpoints()) or "none"
            raise ValueError(f"{self.folder}: no checkpoint `{name}`; available: {have}")
        return wanted[0]

    def keep(self, n: int) -> None:
        """Delete all but the newest n checkpoints, and partial files of a killed run."""
        for old in self.checkpoints()[:-n]:
            shutil.rmtree(old)
        for left in (self.folder / "checkpoints").glob(".tmp-*"):
            shutil.rmtree(left, ignore_errors=True)

    @contextmanager
    def writing(self, step: int) -> Iterator[Path]:
        """Yield a temporary folder that becomes checkpoint `step`."""
        with atomic(self.folder / "checkpoints" / f"step-{step:06d}") as folder:
            folder.mkdir(parents=True)
            yield folder

    def truncate_metrics(self, step: int) -> None:
        """Delete the lines after a step, which a resumed run writes again."""
        if not self.metrics.is_file():
            return
        kept = []
        for line in self.metrics.read_text("utf-8").splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line)
            except (ValueError, KeyError):
                continue  # partial line of a killed run
        with atomic(self.metrics) as temporary:
            temporary.write_text("".join(f"{line}\n" for line in kept), "utf-8")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the lines of `metrics.jsonl`, without a partial last line of a killed run."""
    lines = path.read_text("utf-8").splitlines(keepends=True) if path.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


# --- meters -----------------------------------------------------------------------------------------------


@dataclass
class Meters:
    """Collect losses on the device and read them only on `flush`, so that no step waits for the host."""

    run: Run
    ctx: Context
    trackers: Sequence[str] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    _losses: list[tuple[int, Mapping[str, Tensor], Sequence[str]]] = field(default_factory=list, init=False)
    _norms: list[tuple[int, Tensor]] = field(default_factory=list, init=False)
    _writers: list[Any] = field(default_factory=list, init=False)
    _since: float = field(default_factory=time.perf_counter, init=False)

    def __post_init__(self) -> None:
        for name in self.trackers if self.ctx.main else ():
            self._writers.append(_tracker(name, self.run, dict(self.settings)))

    def add(self, step: int, out: Mapping[str, Tensor], names: Sequence[str]) -> None:
        """Record the losses (n,) of a micro-batch from a step's output, keys `losses` and `loss_NAME`."""
        kept = {k.replace("losses", "loss"): v for k, v in out.items() if k.startswith(("losses", "loss_"))}
        self._losses.append((step, kept, names))

    def norm(self, step: int, value: Tensor) -> None:
        """Record the gradient norm of a step."""
        self._norms.append((step, value))

    def check(self) -> None:
        """Check that all losses and gradients since the last `flush` are finite.

        Raises:
            ValueError: naming the step and the clips.
        """
        bad = []
        for step, losses, names in self._losses:
            finite = torch.isfinite(losses["loss"]).tolist()
            bad += [(step, n) for n, ok in zip(names, finite, strict=True) if not ok]
        if not bad:
            bad = [(s, "gradient") for s, n in self._norms if not bool(torch.isfinite(n))]
        if bad:
            first = min(s for s, _ in bad)
            clips = sorted({n for s, n in bad if s == first})
            raise ValueError(
                f"the loss stopped being finite at step {first} (clips: {', '.join(clips)}); earlier "
                "checkpoints are valid. Inspect these clips, lower optim.lr or set "
                "runtime.precision=float32, and run again"
            )

    def flush(self, step: int, **more: float) -> dict[str, float]:
        """Write the mean losses since the last call and `more` to `metrics.jsonl` and the trackers."""
        names = list(self._losses[0][1]) if self._losses else ["loss"]
        sums = torch.zeros(len(names) + 1, device=self.ctx.device)
        if self._losses:
            each = [torch.cat([x[name] for _, x, _ in self._losses]) for name in names]
            sums = torch.stack([*(x.sum() for x in each), torch.ones_like(each[0]).sum()])
        *totals, count = self.ctx.total(sums).tolist()
        now = time.perf_counter()
        line: dict[str, float] = {"step": step}
        if count:
            line |= {name: total / count for name, total in zip(names, totals, strict=True)}
            line["seconds_per_step"] = (now - self._since) / max(1, len({s for s, _, _ in self._losses}))
        if self._norms:
            line["gradient_norm"] = float(torch.stack([n for _, n in self._norms]).mean())
        line |= more
        self._losses, self._norms, self._since = [], [], now
        self.write(line)
        return line

    def write(self, line: Mapping[str, float]) -> None:
        """Write one line to `metrics.jsonl` and the trackers."""
        if not self.ctx.main:
            return
        with self.run.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        values = {k: v for k, v in line.items() if k != "step"}
        for writer in self._writers:
            writer(values, int(line["step"]))

    def pause(self) -> None:
        """Exclude the time since the last step (saving, sampling) from the time per step."""
        self._since = time.perf_counter()


def _tracker(name: str, run: Run, settings: dict[str, Any]) -> Any:
    """Return a function (values, step) that sends metrics to a tracker.

    Raises:
        ValueError: when its package is not installed.
    """
    module = package("train.trackers", name)
    if name == "tensorboard":
        writer = module.SummaryWriter(str(run.folder / "tensorboard"))

        def tensorboard(values: Mapping[str, float], step: int) -> None:
            for key, value in values.items():
                writer.add_scalar(key, value, step)
            writer.flush()

        return tensorboard
    options = {"dir": str(run.folder), "resume": "allow", "id": run.folder.name} if name == "wandb" else {}
    try:
        module.init(project="inlaid", name=run.folder.name, config=settings, **options)
    except Exception as error:  # no login, no network: every tracker has its own exceptions
        raise ValueError(
            f"train.trackers: `{name}` does not start ({error}); log in to it, or remove it"
        ) from error
    return lambda values, step: module.log(values, step=step)


def peak_memory(device: torch.device) -> int:
    """Return the peak memory in bytes: allocated on CUDA, else the resident size of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def header(path: Path) -> dict[str, str]:
    """Return the metadata of a safetensors file."""
    with safe_open(path, "pt") as file:
        return file.metadata() or {}
