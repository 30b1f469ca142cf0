"""A transport whose copies are late, and a watch that sees every race a real device might lose."""

from __future__ import annotations

import random
import sys
import weakref
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _disable_current_modes,
    is_traceable_wrapper_subclass,
)

from inlaid.networks import quantize
from inlaid.training.transport import Event


class _Copy:
    """Its bytes arrive at any time after the events before it, at the latest when it is waited for."""

    def __init__(self, late: LateTransport, target: Tensor, source: Tensor, up: bool) -> None:
        size = min(len(target), len(source))
        self.up, self.target, self.values = up, target[:size], source[:size].clone()
        self.memory = (key(target), key(source))
        self.before: list[_Copy] = []
        self.performed, self.waited = False, None
        device = target if up else source
        self.freed = weakref.finalize(device.untyped_storage(), late.freed, weakref.ref(self))
        self.freed.atexit = False


def key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


class LateTransport(TorchDispatchMode):
    """Performs copies at random times in any legal order; until then their targets are NaN.

    As a dispatch mode, it sees which memory the operations on the `device` read and write. Operations run at
    once here, but on a device they may run as late as the next event that somebody waits for: a copy that no
    event keeps from overtaking them is a race, whether or not it was performed too early in this schedule.

    Args:
        seed: of the delays.
        ignored: mistakes to make: `(what, caller)`, where `what` is `wait`, or `compute` for the computations
            that a copy of this caller comes after; `@forward` and `@backward` limit it to a pass.
    """

    def __init__(self, seed: int, ignored: Collection[tuple[str, str]] = ()) -> None:
        super().__init__()
        self.random, self.ignored = random.Random(seed), ignored
        self.patience = self.random.choice((0.0, 0.02, 0.2, 0.9))
        self.clock = 0
        self.reads: dict[int, int] = {}
        self.writes: dict[int, int] = {}
        self.queues: dict[bool, list[_Copy]] = {True: [], False: []}
        self.started: list[_Copy] = []
        self.races: list[str] = []
        self.moved = {"up": 0, "down": 0}

    # --- the device ---------------------------------------------------------------------------------------

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        self.clock += 1
        if self.random.random() < self.patience:
            self.perform_some()
        out = func(*args, **(kwargs or {}))
        inputs, outputs = ({key(t) for t in plain(values)} for values in ((args, kwargs), (out,)))
        if func._schema.is_mutable or not outputs <= inputs:  # a view reads and writes nothing
            self.reads |= dict.fromkeys(inputs, self.clock)
            self.writes |= dict.fromkeys(outputs, self.clock)
        return out

    def freed(self, reference: weakref.ref[_Copy]) -> None:
        copy = reference()
        if copy is not None and copy.waited is None:
            self.races.append("memory was freed while it was copied")

    def perform_some(self) -> None:
        for copies in self.random.sample(list(self.queues.values()), 2):
            if copies and all(c.performed for c in copies[0].before) and self.random.random() < 0.5:
                self.perform(copies[0])

    def perform(self, copy: _Copy) -> None:
        while not copy.performed:
            first = self.queues[copy.up][0]
            for other in first.before:
                self.perform(other)
            self.queues[copy.up].pop(0)
            first.target.copy_(first.values)
            first.performed = True

    # --- Transport ----------------------------------------------------------------------------------------

    def makes(self, what: str) -> bool:
        """Whether the caller's caller is to make a mistake."""
        phase = "backward" if torch._C._current_graph_task_id() != -1 else "forward"
        caller = sys._getframe(2).f_code.co_name
        return (what, caller) in self.ignored or (f"{what}@{phase}", caller) in self.ignored

    def copy(self, target: Tensor, source: Tensor, after: Sequence[Event]) -> Event:
        if self.makes("compute"):
            after = []
        with torch.no_grad(), _disable_current_modes():
            return self._copy(target, source, after)

    def _copy(self, target: Tensor, source: Tensor, after: Sequence[Event]) -> Event:
        up = getattr(target, "is_host", False) is False
        made = _Copy(self, target, source, up)
        made.before = [e for e in after if isinstance(e, _Copy)]
        clocks = [e for e in after if not isinstance(e, _Copy)]
        clocks += [e.waited for e in made.before if e.waited is not None]
        earliest = max(clocks, default=-1)
        if max(self.reads.get(key(target), -1), self.writes.get(key(target), -1)) > earliest:
            self.races.append("a copy may overwrite memory that is in use")
        if self.writes.get(key(source), -1) > earliest:
            self.races.append("a copy may read memory that is not computed yet")
        for other in self.started:
            shared = other.memory[0] in made.memory or other.memory[1] == made.memory[0]
            ordered = other.up == up or other in made.before
            ordered |= other.waited is not None and other.waited <= earliest
            if shared and not ordered:
                self.races.append("two copies of the same memory have no order")
        self.started = [*[c for c in self.started if c.waited is None or not c.performed][-64:], made]
        self.queues[up].append(made)
        made.target.fill_(255)  # not a number, in every format
        self.moved["up" if up else "down"] += len(made.target)
        return made

    def wait(self, event: Event) -> None:
        if not self.makes("wait"):
            with torch.no_grad(), _disable_current_modes():
                self.perform(event)
            event.waited = self.clock if event.waited is None else event.waited

    def record(self) -> Event:
        return self.clock

    def host(self, size: int) -> Tensor:
        memory = torch.empty(size, dtype=torch.uint8)
        memory.is_host = True  # type: ignore[attr-defined]
        return memory


def plain(values: Any) -> list[Tensor]:
    """Tensors with memory of their own, also those inside quantised weights."""
    found = []
    for value in values.values() if isinstance(values, dict) else values:
        if isinstance(value, Tensor):
            found += quantize.parts(value)[0] if is_traceable_wrapper_subclass(value) else [value]
        elif isinstance(value, (tuple, list, dict)):
            found += plain(value)
    return found
