"""Activation offload: tensors that the backward pass needs are kept in host memory until then.

With gradient checkpointing, these tensors are the inputs of the blocks, and the results of attention if they
are stored. A copy to the host starts when the tensor is saved. The backward pass takes the tensors of the
blocks in reverse order, so the copies back start before the tensors are needed.
"""

from __future__ import annotations

import weakref
from collections import deque
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from inlaid.training.transport import Event, Form, Transport, flat

LEAST = 8 << 20
"""Size in bytes below which a saved tensor stays on the device."""


def versioned(tensor: Tensor) -> tuple[Tensor, int]:
    """Return a detached tensor and its version, which is the number of in-place changes so far."""
    key = torch._C.DispatchKey.ADInplaceOrView
    with torch._C._SetExcludeDispatchKeyGuard(key, False):  # counts changes in place; excluded in modes
        alone = tensor.detach()
    return alone, alone._version


class Ticket:
    """Reference to a tensor in a `Store`; the tensor is freed when its ticket is deleted."""

    def __init__(self, store: Store, number: int, tensor: Tensor) -> None:
        self.store, self.number = store, number
        self.form, self.device = Form.of(tensor), tensor.device
        self.uses = 1
        """Number of times that the tensor was put and not yet taken."""
        self.saved: tuple[Tensor, int] | None = versioned(tensor)
        """The tensor and its version when it was put, until it leaves the device."""
        self.here: Tensor | None = None
        """Memory of the tensor on the device, uint8 (n,), if it is still or again there."""
        self.arriving: list[Event] = []
        """Event of the copy to the device, if it has not been waited for."""

    def take(self) -> Tensor:
        """Return the tensor on its device, with the shape and strides that it had; see `Store.put`."""
        return self.store._take(self)

    def check(self) -> None:
        """Check that the tensor has not changed since it was put.

        Raises:
            ValueError: if it was changed in place.
        """
        if self.saved is not None and self.saved[0]._version != self.saved[1]:
            raise ValueError(
                "memory.offload: this network changes an activation in place after it was saved, so "
                "`activations` cannot be offloaded: remove it"
            )


class Buffer:
    """Host memory of a `Store`, with the events of the last copies that read or write it."""

    def __init__(self, size: int, memory: Tensor) -> None:
        self.size, self.memory = size, memory
        self.events: list[Event] = []


class Store:
    """Store of activations in host memory.

    Host memory is reused from step to step, so its size does not grow once every shape has occurred.

    Args:
        transport: copies the tensors.
        least: size in bytes below which a tensor that autograd saves stays on the device. Default: `LEAST`.
        behind: number of tensors that stay on the device after they were put, while their copies are made.
        ahead: number of tensors whose copies to the device start before they are taken.
    """

    def __init__(
        self, transport: Transport, least: int | None = None, *, behind: int = 2, ahead: int = 2
    ) -> None:
        self.transport, self.least = transport, LEAST if least is None else least
        self.behind, self.ahead = behind, ahead
        self.free: list[Buffer] = []
        self.buffers: dict[int, Buffer] = {}
        """Buffers in use, by number of the ticket."""
        self.tickets: weakref.WeakValueDictionary[int, Ticket] = weakref.WeakValueDictionary()
        self.leaving: deque[int] = deque()
        """Numbers of the tickets whose tensors are still on the device after they were put."""
        self.known: dict[tuple, weakref.ref[Ticket]] = {}
        self.count = 0

    @property
    def host_bytes(self) -> int:
        """Bytes of host memory that the store holds, in use or free."""
        return sum(buffer.size for buffer in (*self.free, *self.buffers.values()))

    def accepts(self, tensor: Tensor) -> bool:
        """Return True if a tensor is large enough for the host, and occupies its memory alone."""
        form = Form.of(tensor)
        return type(tensor) is Tensor and form.size >= self.least and form.dense

    def put(self, tensor: Tensor) -> Ticket:
        """Start to copy a tensor to the host, and return a ticket for it.

        If the tensor was put before, its ticket is returned again.

        Raises:
            ValueError: here or later, if a tensor was changed in place before its copy was complete.
        """
        storage = tensor.untyped_storage()
        key = (storage._cdata, tensor.storage_offset(), tensor._version, Form.of(tensor))
        found = self.known[key]() if key in self.known else None
        if found is not None:
            found.uses += 1
            return found
        buffer = self._buffer(Form.of(tensor).size)
        self.count += 1
        ticket = Ticket(self, self.count, tensor)
        self.tickets[ticket.number] = ticket
        self.known[key] = weakref.ref(ticket)
        weakref.finalize(storage, self.known.pop, key, None).atexit = False
        weakref.finalize(ticket, self._release, ticket.number).atexit = False
        self.buffers[ticket.number] = buffer
        ticket.here = flat(tensor)
        done = self.transport.copy(buffer.memory, ticket.here, [self.transport.record()])
        buffer.events = [done]
        self.leaving.append(ticket.number)
        while len(self.leaving) > self.behind:
            self._leave(self.leaving.popleft())
        return ticket

    def _leave(self, number: int) -> None:
        """Free the memory of a tensor on the device, for computations after its copy to the host."""
        ticket = self.tickets.get(number)
        if ticket is not None:
            self.transport.wait(self.buffers[number].events[-1])
            ticket.check()
            ticket.here = ticket.saved = None

    def _take(self, ticket: Ticket) -> Tensor:
        ticket.check()
        memory = self._fetch(ticket)
        if ticket.arriving:
            self.transport.wait(ticket.arriving.pop())
        ticket.uses -= 1
        if ticket.uses <= 0 and ticket.number not in self.leaving:
            ticket.here = None
        earlier = [
            self.tickets.get(n) for n in sorted(self.tickets.keys(), reverse=True) if n < ticket.number
        ]
        for other in [x for x in earlier if x is not None and x.uses > 0][: self.ahead]:
            self._fetch(other)
        return ticket.form.view(memory)

    def _fetch(self, ticket: Ticket) -> Tensor:
        """Start to copy a tensor to the device unless it is there, and return its memory on the device."""
        if ticket.here is None:
            buffer = self.buffers[ticket.number]
            ticket.here = torch.empty(ticket.form.size, dtype=torch.uint8, device=ticket.device)
            # Queued computations may still use the new memory; they also wait for the copy to the host.
            free = self.transport.record()
            ticket.arriving = [self.transport.copy(ticket.here, buffer.memory, [free])]
            buffer.events += ticket.arriving
        return ticket.here

    def _buffer(self, size: int) -> Buffer:
        """Return the smallest free buffer of at least `size` bytes, or replace a smaller one by a new one."""
        fitting = [buffer for buffer in self.free if buffer.size >= size]
        if fitting:
            found = min(fitting, key=lambda buffer: buffer.size)
            self.free.remove(found)
            return found
        if self.free:
            self.free.pop()
        return Buffer(size, self.transport.host(size))

    def _release(self, number: int) -> None:
        """Make the host memory of a deleted ticket available again."""
        buffer = self.buffers.pop(number)
        if number in self.leaving:
            self.leaving.remove(number)
        for event in buffer.events:  # memory on the device is freed now, and reused by later computations
            self.transport.wait(event)
        self.free.append(buffer)

    # --- autograd -----------------------------------------------------------------------------------------

    def pack(self, tensor: Tensor) -> Tensor | Ticket:
        """Return what autograd saves instead of a tensor: a ticket, or the tensor if it stays on the device.

        Weights and inputs of the network stay, and so do tensors smaller than `least`.
        """
        if tensor.grad_fn is None:
            return tensor
        if not self.accepts(tensor):
            return tensor.detach()  # a node that saved its own output would never be freed
        return self.put(tensor)

    @staticmethod
    def unpack(saved: Tensor | Ticket) -> Tensor:
        """Return the tensor that autograd saved."""
        return saved.take() if isinstance(saved, Ticket) else saved

    def attach(self, network: nn.Module) -> None:
        """Keep the activations of a network in this store, from now on, in every pass with gradients."""
        entered: list[Any] = []

        def enter(*_: Any) -> None:
            hooks = saved_tensors_hooks(self.pack, self.unpack) if torch.is_grad_enabled() else None
            if hooks is not None:
                hooks.__enter__()
            entered.append(hooks)

        def leave(*_: Any) -> None:
            hooks = entered.pop()
            if hooks is not None:
                hooks.__exit__()

        network.register_forward_pre_hook(enter)
        network.register_forward_hook(leave, always_call=True)
