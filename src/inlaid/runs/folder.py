"""The run folder: paths of its recipe, checkpoints, metrics, cache and adapter."""

from __future__ import annotations

import errno
import json
import os
import platform
import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from inlaid import config as recipe
from inlaid.files import atomic, read_metadata, remove, sweep
from inlaid.runs.launch import Context
from inlaid.runs.lock import owned, unwritable

CHANGEABLE = ("run", "sample", "runtime", "memory", "data.cache", "data.bad_clips")
"""Keys of a recipe that may change when a run is resumed; other changes raise an error."""

CHANGEABLE_TRAIN = (
    "steps",
    "epochs",
    "save_every",
    "keep",
    "log_every",
    "validate_every",
    "trackers",
    "accumulate",
    "accept_changed_data",
)
"""Keys of the `train` section that may also change when a run is resumed; `steps` and
`epochs` only with a constant learning rate."""


FOLDERS = ("adapter", "rgba_vae", "checkpoints", "cache", "samples", "report", "check", "tensorboard")
"""Folders that commands create in a run folder."""

FILES = ("config.yaml", "environment.json", "metrics.jsonl", "quarantine.json")
"""Files that commands write in a run folder."""


def recipe_changes(old: recipe.Config, new: recipe.Config) -> list[str]:
    """Return messages about changes to the recipe that prevent resuming a run; empty if there are none."""

    def flat(config: recipe.Config) -> dict[str, Any]:
        out = {}
        for key, value in json.loads(config.model_dump_json()).items():
            out |= {f"{key}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {key: value}
        return out

    a, b = flat(old), flat(new)
    changeable = {*CHANGEABLE, *(f"train.{k}" for k in CHANGEABLE_TRAIN)}
    if new.optim.schedule != "constant":
        changeable -= {"train.steps", "train.epochs"}
    differ = [
        k
        for k in {**a, **b}
        if a.get(k) != b.get(k) and k not in changeable and k.split(".")[0] not in changeable
    ]
    return [f"{k} was {a.get(k)!r}, is {b.get(k)!r}" for k in differ]


def environment() -> dict[str, Any]:
    """Return the package versions and machine properties for `environment.json`."""
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


@dataclass(frozen=True)
class Run:
    """Run folder, and the paths of the files in it."""

    folder: Path

    @property
    def adapter(self) -> Path:
        """Folder of the trained weights: an adapter, or a diffusers transformer after full fine-tuning."""
        return self.folder / "adapter"

    @property
    def metrics(self) -> Path:
        """Metrics file, one JSON object per line."""
        return self.folder / "metrics.jsonl"

    def config(self) -> recipe.Config:
        """Return the recipe that the run was started with.

        Raises:
            ValueError: if the folder is not a run folder.
        """
        if not (self.folder / "config.yaml").is_file():
            raise ValueError(
                f"{self.folder}: not a run folder (it has no config.yaml); `inlaid train` creates one"
            )
        return recipe.load(self.folder)

    def begin(self, config: recipe.Config, ctx: Context) -> None:
        """Write the recipe and the environment (`environment.json`); all processes must call this.

        `train.accept_changed_data` applies to one launch only, so it is saved as false.

        Raises:
            ValueError: if the folder cannot be written.
        """
        if ctx.main:
            train = config.train.model_copy(update={"accept_changed_data": False})
            try:
                recipe.save(config.model_copy(update={"train": train}), self.folder / "config.yaml")
                with atomic(self.folder / "environment.json") as part:
                    part.write_text(json.dumps(environment(), indent=2), "utf-8")
            except OSError as error:
                raise unwritable(self.folder, error) from None
        ctx.barrier()

    def cache(self, config: recipe.Config) -> Path:
        """Return the cache folder: `data.cache`, or `cache` in the run folder."""
        return Path(config.data.cache) if config.data.cache else self.folder / "cache"

    def checkpoints(self) -> list[Path]:
        """Return the complete checkpoints, oldest first."""
        found = [p for p in (self.folder / "checkpoints").glob("step-*") if re.fullmatch(r"step-\d+", p.name)]
        return sorted(found, key=lambda p: int(p.name[5:]))

    def checkpoint(self, name: str) -> Path:
        """Return the folder of a checkpoint, given its name or step, such as `step-000500` or `500`.

        Raises:
            ValueError: if there is no such checkpoint.
        """
        wanted = [p for p in self.checkpoints() if name in (p.name, p.name[5:], p.name[5:].lstrip("0"))]
        if not wanted:
            have = ", ".join(p.name for p in self.checkpoints()) or "none"
            raise ValueError(f"{self.folder}: no checkpoint `{name}`; available: {have}")
        return wanted[0]

    def keep(self, n: int) -> None:
        """Delete all partial checkpoints, and all complete checkpoints except the newest `n`."""
        for old in self.checkpoints()[:-n]:
            remove(old)
        sweep(self.folder / "checkpoints")

    @contextmanager
    def writing(self, step: int) -> Iterator[Path]:
        """Yield a temporary folder that becomes the checkpoint of `step` when the context exits.

        Raises:
            OSError: if the checkpoint cannot be written, or the run folder has been deleted.
        """
        if not self.folder.is_dir():
            raise FileNotFoundError(errno.ENOENT, "the run folder has been deleted", str(self.folder))
        with atomic(self.folder / "checkpoints" / f"step-{step:06d}") as folder:
            folder.mkdir(parents=True)
            yield folder

    def check_layout(self) -> None:
        """Check the types of the paths that commands write in the run folder.

        Raises:
            ValueError: if the path of a subfolder exists but is not a folder, or if the path of a file exists
                but is not a regular file. The message lists all wrong paths.
        """
        wrong = [
            f"{path} is not a folder"
            for path in (self.folder / name for name in FOLDERS)
            if path.exists() and not path.is_dir()
        ]
        wrong += [
            f"{path} is not a regular file"
            for path in (self.folder / name for name in FILES)
            if path.exists() and not path.is_file()
        ]
        if wrong:
            raise ValueError("; ".join(wrong) + ": delete or move it, or choose another folder (run=...)")

    def truncate_metrics(self, step: int) -> None:
        """Delete the metrics after `step`, because a resumed run writes them again.

        A run that was killed before its first checkpoint starts again at step 0, without metrics.
        """
        if not self.metrics.exists():
            return
        kept = []
        for line in self.metrics.read_text("utf-8", "replace").splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line)
            except (ValueError, LookupError, TypeError, RecursionError):
                continue  # partial line of a killed run
        with atomic(self.metrics) as temporary:
            temporary.write_text("".join(f"{line}\n" for line in kept), "utf-8")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the records of a `metrics.jsonl` file.

    An incomplete last line is ignored; a killed run may leave one. A missing file has no records.
    """
    lines = path.read_text("utf-8").splitlines(keepends=True) if path.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def read_header(path: Path) -> dict[str, str]:
    """Return the metadata of a safetensors file."""
    with safe_open(path, "pt") as file:
        return read_metadata(file)


@contextmanager
def open_run(config: recipe.Config, ctx: Context) -> Iterator[Run]:
    """Context manager that holds the lock of a run folder.

    On entry, it checks that the recipe can resume the run. It also deletes temporary files of killed
    processes from the run folder and the cache. It writes only the lock file. `Run.begin` writes the recipe
    after all checks of a command have passed.

    Raises:
        ValueError: if another process uses the run, if the recipe cannot resume it, or if the folder cannot
            be written or is deleted during the run.
    """
    run = Run(Path(config.run))
    with owned(run.folder) if ctx.main else nullcontext():
        run.check_layout()
        differ = recipe_changes(run.config(), config) if run.checkpoints() else []
        if differ:
            raise ValueError(
                f"{run.folder}: this run was started with another recipe:\n"
                + "\n".join(f"  {d}" for d in differ)
                + "\nrestore these values to resume, or choose another folder (run=...)"
            )
        if ctx.main:
            for folder in {run.folder, run.cache(config)}:
                sweep(folder)
        try:
            yield run
        except OSError as error:
            if run.folder.exists() or error.errno is None:
                raise
            raise ValueError(
                f"{run.folder}: the run folder has been deleted or moved during the run; put it "
                "back and run the same command again, or start again"
            ) from error
