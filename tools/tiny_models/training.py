"""Shared training code of the tiny models: optimizer, resumable state, progress output."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

T = TypeVar("T")


class MuonAdamW:
    """Muon on matrices and flattened convolution kernels, AdamW on everything else.

    With AdamW alone, a small video VAE stays for minutes on a loss plateau, where it reconstructs only the
    background; with Muon, for seconds. `torch.optim.Muon` accepts only 2-D parameters, so it is given
    reshaped views that share memory.

    Args:
        named: Parameters with their names.
        muon: Learning rate of Muon.
        adamw: Learning rate of AdamW.
        by_adamw: Function that returns True for names of matrices to train with AdamW (embeddings, output
            layers).
    """

    def __init__(
        self,
        named: Iterable[tuple[str, nn.Parameter]],
        muon: float,
        adamw: float,
        by_adamw: Callable[[str], bool] = lambda name: False,
    ) -> None:
        self.flat: list[tuple[nn.Parameter, nn.Parameter]] = []
        rest: list[nn.Parameter] = []
        for name, parameter in named:
            if parameter.ndim >= 2 and not by_adamw(name):
                self.flat.append((parameter, nn.Parameter(parameter.data.reshape(parameter.shape[0], -1))))
            else:
                rest.append(parameter)
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.Muon([view for _, view in self.flat], lr=muon, weight_decay=0.0)
        ]
        if rest:
            self.optimizers.append(torch.optim.AdamW(rest, lr=adamw, weight_decay=0.0, betas=(0.9, 0.99)))
        self.rates = (muon, adamw)[: len(self.optimizers)]
        self.parameters = [parameter for parameter, _ in self.flat] + rest

    def step(self, scale: float) -> None:
        """Apply and clear the gradients, with both learning rates multiplied by `scale`."""
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for parameter, view in self.flat:
            grad = parameter.grad
            view.grad = None if grad is None else grad.reshape(grad.shape[0], -1)
        for optimizer, rate in zip(self.optimizers, self.rates, strict=True):
            optimizer.param_groups[0]["lr"] = rate * scale
            optimizer.step()
        for parameter in self.parameters:
            parameter.grad = None

    def tensors(self) -> dict[str, Tensor]:
        """Return the optimizer state as a flat dictionary."""
        return {
            f"{k}.{index}.{name}": torch.as_tensor(value)
            for k, optimizer in enumerate(self.optimizers)
            for index, state in optimizer.state_dict()["state"].items()
            for name, value in state.items()
        }

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Restore the state returned by `tensors`."""
        for k, optimizer in enumerate(self.optimizers):
            state: dict[int, dict[str, Tensor]] = {}
            for key, value in tensors.items():
                which, index, name = key.split(".", 2)
                if int(which) == k:
                    state.setdefault(int(index), {})[name] = value
            optimizer.load_state_dict(
                {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}
            )


def save_state(path: Path, facts: dict[str, object], **groups: dict[str, Tensor]) -> None:
    """Write groups of tensors and metadata to one safetensors file, atomically."""
    flat = {
        f"{group}/{name}": t.detach().contiguous().clone()
        for group, ts in groups.items()
        for name, t in ts.items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".tmp")
    save_file(flat, partial, metadata={"facts": json.dumps(facts)})
    partial.replace(path)


def load_state(path: Path) -> tuple[dict, dict[str, dict[str, Tensor]]]:
    """Read a file written by `save_state`; return metadata and groups of tensors."""
    groups: dict[str, dict[str, Tensor]] = {}
    with safe_open(path, "pt") as file:
        facts = json.loads(file.metadata()["facts"])
        for key in file.keys():  # noqa: SIM118 (not a dictionary)
            group, name = key.split("/", 1)
            groups.setdefault(group, {})[name] = file.get_tensor(key)
    return facts, groups


class Progress:
    """Progress line with mean values and remaining time, printed every `every` seconds."""

    def __init__(self, what: str, total: int, done: int = 0, every: float = 20.0) -> None:
        self.what, self.total, self.every, self.first = what, total, every, done
        self.began = self.printed = time.monotonic()
        self.sums: dict[str, float] = {}
        self.count = 0

    def __call__(self, step: int, **values: Tensor | float) -> bool:
        """Count a finished step. Return True if a line was printed."""
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + float(value)
        self.count += 1
        now = time.monotonic()
        if now - self.printed < self.every and step < self.total:
            return False
        pace = (now - self.began) / max(step - self.first, 1)
        values_text = " ".join(f"{name} {total / self.count:.4f}" for name, total in self.sums.items())
        left = pace * (self.total - step) / 60
        print(
            f"{self.what} {step}/{self.total}  {values_text}  {pace:.2f} s/step, {left:.1f} min left",
            flush=True,
        )
        self.sums, self.count, self.printed = {}, 0, now
        return True


class _Made(Dataset):
    def __init__(self, make: Callable[[int], Any]) -> None:
        self.make = make

    def __getitem__(self, step: int) -> Any:
        return self.make(step)


def ahead(make: Callable[[int], T], first: int, last: int, workers: int) -> Iterator[T]:
    """Iterate over `make(step)` for steps in [first, last); `workers` processes prefetch, 0 for none."""
    sampler: Any = range(first, last)
    return iter(DataLoader(_Made(make), batch_size=None, sampler=sampler, num_workers=workers))


SAVE_EVERY = 60.0
"""Seconds between checkpoints of `run`."""


def run(
    what: str,
    state: Path,
    model: nn.Module,
    optimizer: MuonAdamW,
    steps: int,
    make: Callable[[int], T],
    losses: Callable[[T], dict[str, Tensor]],
    *,
    decay: float = 0.5,
    ema: float = 0.99,
    workers: int = 0,
) -> Path:
    """Train `model` for `steps` steps, resuming from `state`.

    Args:
        what: Name for the progress line.
        state: Checkpoint with `model`, `optimizer` and `average`, the EMA of the parameters, to be exported.
        model: Initialized model on the training device.
        optimizer: Optimizer of the model's parameters.
        steps: Total number of steps.
        make: Function that returns the batch of step k, depending only on k.
        losses: Function that returns the losses of a batch: `loss` is minimized, others are only printed.
        decay: Share of the steps, at the end, over which the learning rates decay to zero.
        ema: Decay of the EMA.
        workers: Processes that prefetch batches.

    Returns:
        `state`.
    """
    facts: dict[str, Any] = {"done": 0, "seconds": 0.0}
    average = {name: p.detach().clone() for name, p in model.named_parameters()}
    if state.exists():
        facts, groups = load_state(state)
        model.load_state_dict(groups["model"])
        optimizer.load(groups["optimizer"])
        average = {name: groups["average"][name].to(p.device) for name, p in average.items()}
    progress, saved = Progress(what, steps, facts["done"]), time.monotonic()
    for step, batch in enumerate(ahead(make, facts["done"], steps, workers), facts["done"]):
        terms = losses(batch)
        terms["loss"].backward()
        optimizer.step(min(1.0, (step + 1) / 50, (steps - step) / (decay * steps)))
        keep = min(ema, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(average.values()), [p.detach() for p in model.parameters()], 1 - keep)
        progress(step + 1, **{name: value.detach() for name, value in terms.items()})
        if time.monotonic() - saved > SAVE_EVERY or step + 1 == steps:
            facts |= {"done": step + 1, "seconds": facts["seconds"] + time.monotonic() - saved}
            saved = time.monotonic()
            save_state(state, facts, model=model.state_dict(), optimizer=optimizer.tensors(), average=average)
    return state
