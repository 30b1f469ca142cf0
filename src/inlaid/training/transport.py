"""Copies between host and device memory that overlap with computation, and the host memory for them."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

Event = Any
"""Point in a queue of work on the device; it has passed when all earlier work in the queue is complete."""

RESERVE = 0.8
"""Largest fraction of the free host memory that is allocated for offloading.

Host memory for copies is page-locked, so the operating system cannot move it to a swap file.
"""


class Transport(Protocol):
    """Interface to copies between host and device.

    Copies to the device run in one queue, copies to the host in another, each in the order of the calls. Both
    queues run at the same time as the queue of computations.
    """

    def copy(self, target: Tensor, source: Tensor, after: Sequence[Event]) -> Event:
        """Start a copy that runs once all events in `after` have passed, and return the event of its end.

        Args:
            target: uint8 (n,), on the device or from `host`.
            source: uint8 (m,), on the other side; the first min(n, m) bytes are copied.
            after: events that must pass before the copy starts.
        """
        ...

    def wait(self, event: Event) -> None:
        """Make all computations that are queued from now on wait until `event` has passed."""
        ...

    def record(self) -> Event:
        """Return an event that passes when all computations queued so far are complete."""
        ...

    def host(self, size: int) -> Tensor:
        """Allocate `size` bytes of host memory, uint8 (size,).

        Raises:
            ValueError: if too little host memory is free.
        """
        ...


class HereTransport:
    """Transport for the CPU, where each copy is complete when `copy` returns."""

    def copy(self, target: Tensor, source: Tensor, after: Sequence[Event]) -> Event:
        """Copy at once; see `Transport.copy`."""
        size = min(len(target), len(source))
        target[:size].copy_(source[:size])

    def wait(self, event: Event) -> None:
        """Do nothing: every event has passed."""

    def record(self) -> Event:
        """Return None: every computation is complete."""

    def host(self, size: int) -> Tensor:
        """Allocate host memory; see `Transport.host`."""
        check_free(size)
        return torch.empty(size, dtype=torch.uint8)


class CudaTransport:
    """Transport for a CUDA device, with one stream for copies in each direction."""

    def __init__(self, device: torch.device) -> None:
        self.up, self.down = torch.cuda.Stream(device), torch.cuda.Stream(device)

    @torch.no_grad()
    def copy(self, target: Tensor, source: Tensor, after: Sequence[Event]) -> Event:
        """Start a copy in the stream of its direction; see `Transport.copy`."""
        stream, size = self.up if target.is_cuda else self.down, min(len(target), len(source))
        for event in after:
            stream.wait_event(event)
        with torch.cuda.stream(stream):
            target[:size].copy_(source[:size], non_blocking=True)
        return stream.record_event()

    def wait(self, event: Event) -> None:
        """Make the current stream wait for an event; see `Transport.wait`."""
        torch.cuda.current_stream(self.up.device).wait_event(event)

    def record(self) -> Event:
        """Record an event in the current stream; see `Transport.record`."""
        return torch.cuda.current_stream(self.up.device).record_event()

    def host(self, size: int) -> Tensor:
        """Allocate page-locked host memory; see `Transport.host`.

        torch's own allocator of page-locked memory is not used, because it rounds sizes up to a power of two.
        """
        check_free(size)
        buffer, runtime = torch.empty(size, dtype=torch.uint8), _runtime()
        code = int(runtime.cudaHostRegister(buffer.data_ptr(), size, 1))
        if code:
            raise ValueError(
                f"memory.offload: the system does not lock {size / 1e9:.2f} GB of host memory (CUDA error "
                f"{code}): raise the limit (`ulimit -l unlimited`), or set memory.quantize or a lower "
                "memory.blocks_to_swap"
            )
        weakref.finalize(buffer, _unlock, buffer.data_ptr(), self.up.device).atexit = False
        return buffer


def _unlock(address: int, device: torch.device) -> None:
    """End the page lock of host memory that is about to be freed, once no copy uses it."""
    torch.cuda.synchronize(device)
    _runtime().cudaHostUnregister(address)


def _runtime() -> Any:
    """Return torch's binding of the CUDA runtime, which has no types."""
    return torch.cuda.cudart()


def transport(device: torch.device) -> Transport:
    """Return the transport between the host and a device."""
    return CudaTransport(device) if device.type == "cuda" else HereTransport()


def check_free(size: int) -> None:
    """Check that `size` bytes are at most the fraction `RESERVE` of the free host memory.

    Raises:
        ValueError: if they are more.
    """
    free = free_host_memory()
    if free is not None and size > RESERVE * free:
        raise ValueError(
            f"memory.offload: needs {size / 1e9:.2f} GB more of host memory, but only "
            f"{free / 1e9:.2f} GB are free, of which {RESERVE:.0%} may be used: close other programs, start "
            "fewer processes on this machine, or set memory.quantize or a lower memory.blocks_to_swap"
        )


def free_host_memory() -> int | None:
    """Return the bytes of host memory that this process may still allocate; None if unknown.

    The value is that of the machine or of the process's control group (container, batch job), whichever is
    smaller. File caches, which the system frees on demand, count as free.
    """
    found = []
    lines = _read(Path("/proc/meminfo")).splitlines()
    found += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    own = next((x[3:] for x in _read(Path("/proc/self/cgroup")).splitlines() if x.startswith("0::")), "/")
    group = Path("/sys/fs/cgroup") / own.strip("/")
    for folder in (group, *group.parents[:-2]):
        most, used = (_read(folder / f"memory.{name}").strip() for name in ("max", "current"))
        if most.isdecimal() and used.isdecimal():
            counts = dict(x.split(maxsplit=1) for x in _read(folder / "memory.stat").splitlines())
            found.append(int(most) - int(used) + int(counts.get("inactive_file", 0)))
    return max(0, min(found)) if found else None


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except OSError:
        return ""


class Form(NamedTuple):
    """Arrangement of a tensor in memory, without its values."""

    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> Form:
        """Return the form of a tensor."""
        return cls(tensor.dtype, tensor.shape, tensor.stride())

    @property
    def elements(self) -> int:
        """Number of elements from the first to the last one in memory."""
        if 0 in self.shape:
            return 0
        return 1 + sum((n - 1) * s for n, s in zip(self.shape, self.stride, strict=True))

    @property
    def size(self) -> int:
        """Bytes from the first to the last element in memory."""
        return self.elements * self.dtype.itemsize

    @property
    def dense(self) -> bool:
        """True if at least half of these elements belong to the tensor, and none belongs to it twice."""
        return self.elements <= 2 * self.shape.numel() <= 2 * self.elements

    def view(self, memory: Tensor) -> Tensor:
        """Return a tensor of this form whose memory is `memory`, uint8 (n,).

        The bytes are those that `flat` returned for a tensor of this form. The address of `memory` must be a
        multiple of the size of an element.
        """
        start = memory.storage_offset() // self.dtype.itemsize
        return memory[: self.size].view(self.dtype).as_strided(self.shape, self.stride, start)


def flat(tensor: Tensor) -> Tensor:
    """Return the memory of a dense tensor, from the first to the last element, as a view: uint8 (n,)."""
    inner = tensor.detach()
    whole = inner.as_strided((Form.of(inner).elements,), (1,), inner.storage_offset())
    return whole.view(torch.uint8)
