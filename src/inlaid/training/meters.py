"""Metrics of a training run: mean losses, time per step and memory, written to files and trackers."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from inlaid.files import append, sync
from inlaid.runs.folder import Run
from inlaid.runs.launch import Context
from inlaid.runs.packages import require_package


@dataclass
class Meters:
    """Losses and gradient norms of a run, kept on the device until `check` or `flush` reads them.

    A training step therefore does not synchronize the device with the host.
    """

    run: Run
    ctx: Context
    trackers: Sequence[str] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    start: int = 0
    """Last step that was completed before this launch; 0 for a new run. TensorBoard entries of later steps
    are deleted."""
    _losses: list[tuple[int, Mapping[str, Tensor], Sequence[str]]] = field(default_factory=list, init=False)
    _norms: list[tuple[int, Tensor]] = field(default_factory=list, init=False)
    _writers: list[Any] = field(default_factory=list, init=False)
    _since: float = field(default_factory=time.perf_counter, init=False)

    def __post_init__(self) -> None:
        for name in self.trackers if self.ctx.main else ():
            self._writers.append(_tracker(name, self.run, dict(self.settings), self.start))

    def add(self, step: int, out: Mapping[str, Tensor], names: Sequence[str]) -> None:
        """Record the losses of a micro-batch.

        Args:
            step: number of the optimizer step.
            out: output of the training step. Its values `losses` and `loss_NAME` of shape (n,) are recorded.
            names: names of the n clips.
        """
        kept = {k.replace("losses", "loss"): v for k, v in out.items() if k.startswith(("losses", "loss_"))}
        self._losses.append((step, kept, names))

    def norm(self, step: int, value: Tensor) -> None:
        """Record the gradient norm of a step."""
        self._norms.append((step, value))

    def check(self) -> None:
        """Check that all sample losses and gradient norms since the last `flush` are finite.

        Raises:
            ValueError: if a value is not finite. The message contains the first step with such a value, and
                the names of the clips whose loss is not finite.
        """
        bad = [(s, "") for s, n in self._norms if not bool(torch.isfinite(n))]
        for step, losses, names in self._losses:
            finite = torch.isfinite(losses["loss"]).tolist()
            bad += [(step, n) for n, ok in zip(names, finite, strict=True) if not ok]
        if bad:
            first = min(s for s, _ in bad)
            clips = sorted({n for s, n in bad if s == first and n})
            what = f"the loss stopped being finite at step {first} (clips: {', '.join(clips)})"
            if not clips:
                what = f"the gradient stopped being finite at step {first}, the loss did not"
            raise ValueError(
                f"{what}; earlier "
                "checkpoints are valid. Inspect the clips of this step, lower optim.lr or set "
                "runtime.precision=float32, and run again"
            )

    def flush(self, step: int, **more: float) -> dict[str, float]:
        """Write the metrics since the last call, and return the written values by name.

        The metrics are the mean losses, the mean gradient norm and the seconds per step. The values in `more`
        are added unchanged. Losses are averaged over all processes, so all processes must call this method.
        """
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
        """Append one line to `metrics.jsonl`, and send its values to the trackers (main process only)."""
        if not self.ctx.main:
            return
        append(self.run.metrics, json.dumps(line) + "\n")
        values = {k: v for k, v in line.items() if k != "step"}
        for writer in self._writers:
            writer(values, int(line["step"]))

    def sync(self) -> None:
        """Flush `metrics.jsonl` to the disk with fsync."""
        if self.ctx.main and self.run.metrics.is_file():
            sync(self.run.metrics)

    def pause(self) -> None:
        """Restart the step timer, so that the time per step excludes saving and sampling."""
        self._since = time.perf_counter()


def _tracker(name: str, run: Run, settings: dict[str, Any], start: int) -> Any:
    """Return a function that sends metrics to an experiment tracker. Its arguments are (values, step).

    Raises:
        ValueError: if the package of the tracker is not installed, or the tracker does not start.
    """
    module = require_package("train.trackers", name)
    if name == "tensorboard":
        writer = module.SummaryWriter(str(run.folder / "tensorboard"), purge_step=start + 1)

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
    """Return the peak memory in bytes: allocated GPU memory on CUDA, else resident memory of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
