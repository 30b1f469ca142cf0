"""Block offload: frozen weights of transformer blocks stay in host memory until the blocks need them.

The device holds memory for the weights of `SLOTS` blocks only. While a block computes, the weights of the
next block are copied to the device, in the forward pass and in the backward pass. Gradient checkpointing is
required: the backward pass of a block starts with its recomputation, which is a second call of the block.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from inlaid import config as recipe
from inlaid.console import say
from inlaid.networks import quantize
from inlaid.runs.launch import Context
from inlaid.training.store import Store
from inlaid.training.transport import RESERVE, Event, Form, Transport, flat, free_host_memory, transport

SLOTS = 2
"""Number of offloaded blocks whose weights are on the device at the same time."""

ALIGNMENT = 256
"""Every weight gets a multiple of this many bytes, and starts at one, as in memory that CUDA allocates."""

LINE = 64
"""Bytes of the longest vector of a CPU.

Matrix-vector products of the CPU round differently at other addresses modulo this number, for example in a
memory-mapped file.
"""


def offloaded(section: recipe.Memory, denoiser: nn.Module) -> list[str]:
    """Return the names of the blocks whose frozen weights a recipe keeps in host memory, in order.

    The blocks are spread evenly over the network, so that the blocks between them give the copies more time.
    """
    names = list(quantize.blocks(denoiser))
    if not section.offloads_blocks:
        return []
    count = len(names) if section.blocks_to_swap is None else min(section.blocks_to_swap, len(names))
    return [names[i * len(names) // count] for i in range(count)]


def problems(section: recipe.Memory, denoiser: nn.Module) -> list[str]:
    """Return an error message if a network has too few blocks for the number of blocks to offload."""
    total, count = len(quantize.blocks(denoiser)), section.blocks_to_swap
    if not section.offloads_blocks:
        return []
    if total <= SLOTS:
        text = f"memory.offload: the network has {total} blocks, and {SLOTS} are on the device at all times, "
        return [f"{text}so `blocks` saves nothing: remove it"]
    if count is not None and not SLOTS < count <= total:
        text = f"memory.blocks_to_swap: {count} is not from {SLOTS + 1} to {total}: the network has {total} "
        return [f"{text}blocks, and {SLOTS} offloaded blocks are on the device at all times"]
    return []


def check_host(
    section: recipe.Memory, denoiser: nn.Module, precision: torch.dtype, ctx: Context
) -> list[str]:
    """Return an error message if the processes on a machine offload more than its free host memory allows.

    All processes must call this function.

    Args:
        section: `memory` section of the recipe.
        denoiser: network without adapters; may be on the meta device.
        precision: dtype of the weights that are not quantized.
        ctx: ranks of the launch.
    """
    names = offloaded(section, denoiser)
    if not names:
        return []
    sizes = quantize.stored_bytes(section, denoiser, precision)
    own = sum(size for name, size in sizes.items() if name.startswith(tuple(f"{n}." for n in names)))
    machines: dict[str, list[int | None]] = {}
    for name, free in ctx.gather((socket.gethostname(), free_host_memory())):
        machines.setdefault(name, []).append(free)
    out = []
    for name, found in machines.items():
        known = [free for free in found if free is not None]
        if known and len(found) * own > RESERVE * min(known):
            each = f"{len(found)} processes x {own / 1e9:.2f} GB" if len(found) > 1 else f"{own / 1e9:.2f} GB"
            out.append(
                f"memory.offload: {each} of frozen weights do not fit into the host memory of {name}: "
                f"{min(known) / 1e9:.2f} GB are free, of which {RESERVE:.0%} may be used; set "
                "memory.quantize=int8, a lower memory.blocks_to_swap, or start fewer processes"
            )
    return out


class Master:
    """Frozen weights of one block in a single buffer in host memory.

    All other tensors of the block, such as adapters, are moved to the device.

    Args:
        block: block whose weights are in host memory; changed in place.
        device: device on which the block computes.
        transport: allocates the buffer.
    """

    def __init__(self, block: nn.Module, device: torch.device, transport: Transport) -> None:
        self.places: list[tuple[dict[str, Any], str, int]] = []
        """Parameters by module and name, each with the index of its weight in `weights`."""
        self.weights: list[tuple[Any, list[tuple[int, Form]]]] = []
        """For each weight, the function that assembles it, and offset and form of each of its tensors."""
        self.size = 0
        tensors, known = [], {}
        for module in block.modules():
            for name, weight in module._parameters.items():
                if weight is None:
                    continue
                if weight.requires_grad:
                    weight.data = weight.data.to(device)
                    continue
                if id(weight) not in known:
                    known[id(weight)] = len(self.weights)
                    whole, build = quantize.parts(weight)
                    dense = [t if Form.of(t).dense else t.contiguous() for t in whole]
                    self.weights.append((build, [self._reserve(t, device) for t in dense]))
                    tensors += dense
                self.places.append((module._parameters, name, known[id(weight)]))
            for name, tensor in module._buffers.items():
                module._buffers[name] = None if tensor is None else tensor.to(device)
        self.buffer = transport.host(self.size)
        for tensor, (start, form) in zip(tensors, (x for _, own in self.weights for x in own), strict=True):
            self.buffer[start : start + form.size].copy_(flat(tensor))
        self.unloaded = [build([_unloaded(form, device) for _, form in own]) for build, own in self.weights]
        """Weights of the right form that need no memory; every use of them gives NaN."""
        self.place(self.unloaded)

    def _reserve(self, tensor: Tensor, device: torch.device) -> tuple[int, Form]:
        """Return where a tensor starts in the buffer, and its form."""
        form, width, start = Form.of(tensor), tensor.dtype.itemsize, self.size
        if device.type == "cpu":
            start += tensor.data_ptr() % LINE // width * width
        self.size += -(-(form.size + LINE) // ALIGNMENT) * ALIGNMENT
        return start, form

    def views(self, memory: Tensor) -> list[Any]:
        """Return the weights as views of `memory`, uint8 (n,), to which the buffer is copied."""
        return [build([form.view(memory[start:]) for start, form in own]) for build, own in self.weights]

    def place(self, weights: Sequence[Any]) -> None:
        """Make `weights` the parameters of the block."""
        for parameters, name, index in self.places:
            parameters[name] = weights[index]


def _unloaded(form: Form, device: torch.device) -> Tensor:
    value = torch.zeros((), device=device)
    return (value / value if form.dtype.is_floating_point else value).to(form.dtype).expand(form.shape)


class Conductor:
    """Order of the copies between the masters of the offloaded blocks and the slots on the device.

    A call of a block, also its recomputation, waits for the weights of the block, and starts the copies of
    the blocks that follow. The order of the following blocks is predicted: ascending in the forward pass,
    descending in the backward pass, then the next forward pass. A wrong prediction costs time only, because a
    block whose weights are missing loads them when it is called.

    The weights of a block may be overwritten as soon as another block is called: in the forward pass because
    gradient checkpointing keeps nothing but the inputs of a block, in the backward pass because autograd runs
    the operations of a block before those of earlier blocks.

    With n offloaded blocks and k slots, a training step copies 2 (n - k) blocks.

    Args:
        blocks: all blocks of the network, in the order of the forward pass.
        indices: indices of the offloaded blocks in `blocks`, ascending; their weights are in host memory.
        device: device on which the blocks compute.
        transport: copies the weights.
        slots: number of slots on the device, k.
    """

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        indices: Sequence[int],
        device: torch.device,
        transport: Transport,
        slots: int = SLOTS,
    ) -> None:
        self.transport, self.indices = transport, list(indices)
        self.masters = {i: Master(blocks[i], device, transport) for i in indices}
        largest = max(master.size for master in self.masters.values())
        # Separate allocations, so that each slot has its own version counter.
        self.slots = [torch.zeros(largest, dtype=torch.uint8, device=device) for _ in range(slots)]
        self.held: list[int | None] = [None] * slots
        """Index of the block whose weights each slot contains or receives."""
        self.arriving: list[list[Event]] = [[] for _ in range(slots)]
        """Event of the copy to each slot, if it has not been waited for."""
        self.views = {
            (i, k): master.views(slot)
            for i, master in self.masters.items()
            for k, slot in enumerate(self.slots)
        }
        for i, block in enumerate(blocks):
            block.register_forward_pre_hook(lambda *_, i=i: self.before(i))

    def before(self, index: int) -> None:
        """Provide the weights of a block that is about to compute, and start the copies that follow."""
        free = self.transport.record()
        offloaded = index in self.masters
        following = list(islice(self._following(index), len(self.slots) - offloaded))
        if offloaded:
            slot = self._load(index, following, free)
            if self.arriving[slot]:
                self.transport.wait(self.arriving[slot].pop())
                self.masters[index].place(self.views[index, slot])
        for other in following:
            self._load(other, [index, *following], free)

    def _following(self, index: int) -> Iterator[int]:
        """Yield the offloaded blocks in the predicted order of their next calls, without block `index`."""
        earlier = [i for i in self.indices if i < index]
        later = [i for i in self.indices if i > index]
        if torch._C._current_graph_task_id() != -1:  # in a backward pass
            yield from [*earlier[::-1], *later]
        elif torch.is_grad_enabled():
            yield from [*later, *earlier[::-1]]
        else:
            yield from [*later, *earlier]

    def _load(self, index: int, keep: Sequence[int], free: Event) -> int:
        """Start the copy of a block's weights unless a slot has them, and return the slot.

        Args:
            index: index of the block.
            keep: blocks that stay in their slots.
            free: event after which all other slots may be overwritten.
        """
        if index in self.held:
            return self.held.index(index)
        slot = next(k for k, held in enumerate(self.held) if held not in keep)
        held = self.held[slot]
        if held is not None:
            self.masters[held].place(self.masters[held].unloaded)
        self.held[slot] = index
        self.arriving[slot] = [self.transport.copy(self.slots[slot], self.masters[index].buffer, [free])]
        return slot


def offload(
    section: recipe.Memory, denoiser: nn.Module, device: torch.device, *, show: bool = True
) -> tuple[Conductor | None, Store | None]:
    """Set up the offload of blocks and activations that a recipe specifies.

    Before the call, the weights of the offloaded blocks are in host memory, and the rest of the network is on
    the device. The call moves the trained weights of these blocks to the device.

    Args:
        section: `memory` section of the recipe.
        denoiser: network with adapters; changed in place. Gradient checkpointing may be enabled afterwards,
            with the returned store.
        device: device on which the network computes.
        show: print a note if offloading saves no memory on this device.

    Raises:
        ValueError: if too little host memory is free.
    """
    names, blocks, way = offloaded(section, denoiser), quantize.blocks(denoiser), transport(device)
    if (section.offload or names) and device.type == "cpu":
        say("note: memory.offload saves no memory on the CPU, where it is useful for tests only", show=show)
    conductor = store = None
    if names:
        chosen = [list(blocks).index(name) for name in names]
        conductor = Conductor(list(blocks.values()), chosen, device, way)
    if "activations" in section.offload:
        store = Store(way)
        store.attach(denoiser)
    return conductor, store
