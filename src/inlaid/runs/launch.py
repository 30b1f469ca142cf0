"""Devices, processes and signals of a run."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from inlaid import config as recipe
from inlaid.runs.ranks import RankLostError, join, watched


@dataclass(frozen=True)
class Devices:
    """Compute devices of a machine, as plain values, so that tests can describe any machine."""

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
class DevicePlan:
    """Device, precision and optimizer chosen for a recipe, with a note for each setting that was replaced."""

    device: str
    precision: torch.dtype
    optimizer: str
    notes: tuple[str, ...] = ()


def resolve_devices(config: recipe.Config, devices: Devices) -> DevicePlan:
    """Choose the device, precision and optimizer for a recipe.

    Raises:
        ValueError: if the recipe names a device that this machine does not have.
    """
    wanted, notes = config.runtime.device, []
    available = {"cuda": devices.cuda > 0, "mps": devices.mps, "cpu": True}
    if wanted != "auto" and not available[wanted]:
        have = ", ".join(k for k, v in available.items() if v)
        raise ValueError(
            f"runtime.device: no `{wanted}` on this machine (available: {have}); use `auto` or one of these"
        )
    device = next(k for k, v in available.items() if v) if wanted == "auto" else wanted
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
    return DevicePlan(device, precision, optimizer, tuple(notes))


@dataclass
class Context:
    """Device, precision, optimizer and rank of this process."""

    device: torch.device
    precision: torch.dtype
    optimizer: str
    rank: int = 0
    world: int = 1
    notes: tuple[str, ...] = ()
    sequence: int = 1
    """Number of consecutive processes that share each sample (`runtime.sequence`)."""

    @property
    def share(self) -> tuple[int, int]:
        """Index of this process's group, and number of groups.

        The processes of a group share each sample (`runtime.sequence`). Different groups get different
        samples.
        """
        return self.rank // self.sequence, self.world // self.sequence

    @property
    def main(self) -> bool:
        """True for the process that writes files and prints."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.world > 1:
            dist.barrier()

    def total(self, value: Tensor) -> Tensor:
        """Sum a tensor over all processes in place, and return it."""
        if self.world > 1:
            dist.all_reduce(value)
        return value

    def gather(self, value: Any) -> list[Any]:
        """Return the values of all processes, ordered by rank; `value` must be picklable."""
        if self.world == 1:
            return [value]
        out: list[Any] = [None] * self.world
        dist.all_gather_object(out, value)
        return out


COLLECTIVE_TIMEOUT = timedelta(hours=4)
"""Timeout of collective operations. The PyTorch default of 10 minutes is too short: all processes wait while
one process encodes, generates samples or saves."""


@contextmanager
def start_processes(config: recipe.Config) -> Iterator[Context]:
    """Context manager that sets up this process and yields its device, precision and rank.

    In a launch of several processes by `torchrun` or `accelerate`, it also joins their process group.

    Raises:
        ValueError: if the recipe requires a different number of processes, or if this machine lacks the
            device that the recipe requires.
        RankLostError: if another process has ended or does not respond.
    """
    world, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    plan = resolve_devices(config, Devices.here())
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
    ctx = Context(device, plan.precision, plan.optimizer, rank, world, plan.notes, config.runtime.sequence)
    if world == 1:
        yield ctx
        return
    backend, store = "nccl" if device.type == "cuda" else "gloo", join(config.runtime.rank_timeout)
    dist.init_process_group(backend, timeout=COLLECTIVE_TIMEOUT, store=store, rank=rank, world_size=world)
    try:
        with watched(rank, config.runtime.rank_timeout):
            yield ctx
    except RankLostError:
        raise  # without leaving the group, which would wait for the lost process
    except BaseException:
        dist.destroy_process_group()
        raise
    dist.destroy_process_group()


class Interrupt:
    """Context manager that handles Ctrl-C, SIGTERM and SIGHUP.

    The first signal stops the run after the current step. A second Ctrl-C, or a second SIGTERM, stops the run
    at once. Two different signals do not, because the end of a terminal session may send several kinds of
    signals.
    """

    def __init__(self) -> None:
        self.wanted = False
        self._old: dict[int, Any] = {}
        self._seen: set[int] = set()

    def __enter__(self) -> Interrupt:
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)  # Windows has no SIGHUP
            if number is None or (name == "SIGHUP" and signal.getsignal(number) is signal.SIG_IGN):
                continue  # `nohup` ignores it
            try:
                self._old[number] = signal.signal(number, self._handle)
            except ValueError:  # not in the main thread: the caller handles signals
                break
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: Any) -> None:
        if number in self._seen and number in (signal.SIGINT, signal.SIGTERM):
            raise KeyboardInterrupt
        self._seen.add(number)
        if not self.wanted:
            self.wanted = True
            with suppress(OSError, RuntimeError, ValueError):  # no terminal, or an interrupted write to it
                print(
                    "\nstopping after this step; interrupt again to stop at once", file=sys.stderr, flush=True
                )
