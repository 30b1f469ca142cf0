"""Counts the operations, memory traffic and peak memory of a training step, on shapes only."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry

from inlaid.families import Family
from inlaid.families.grid import Extent
from inlaid.networks.sequence_parallel import SimulatedSequence
from inlaid.training.memory import enable_checkpointing
from inlaid.training.store import Store

TEXT_WIDTHS = ("text_dim", "text_embed_dim", "cross_attention_dim", "joint_attention_dim")
"""Keys in a network's configuration that may contain the width of its text input."""


@dataclass(frozen=True)
class Counts:
    """Peak memory and number of operations of one micro-batch, forward and backward."""

    activations: int
    """Bytes allocated at the peak, excluding weights, weight gradients and optimizer state."""
    gradients: int
    """Bytes of the float32 weight gradients at the peak."""
    linear: float
    """Floating-point operations outside attention, proportional to the number of tokens."""
    attention: float
    """Floating-point operations of self-attention, quadratic in the number of tokens."""
    across: float
    """Floating-point operations of cross-attention to text, proportional to the number of video tokens."""
    small_heads: float = 0.0
    """The part of `attention` in heads of at most 64 channels, for which GPUs are slower."""
    moved: float = 0.0
    """Bytes that operations other than attention and bfloat16 matrix products read and write."""
    launches: int = 0
    """Operations that start a kernel."""
    host: int = 0
    """Bytes of activations in host memory."""


class _Nowhere:
    """Transport for the meta device, which copies nothing and holds no host memory."""

    def copy(self, target: Any, source: Any, after: Any) -> None:
        """Do nothing."""

    def wait(self, event: None) -> None:
        """Do nothing."""

    def record(self) -> None:
        """Return None."""

    def host(self, size: int) -> Any:
        """Return None."""


_ATEN = torch.ops.aten
_PRODUCTS = {
    _ATEN.mm,
    _ATEN.addmm,
    _ATEN.bmm,
    _ATEN.baddbmm,
    _ATEN.convolution,
    _ATEN.convolution_backward,
}
_FLASH = torch.ops.aten._scaled_dot_product_flash_attention
_FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_backward


class _Fused:
    """Context manager that computes attention with the flash attention operator of PyTorch.

    On the meta device, `F.scaled_dot_product_attention` would otherwise allocate full attention matrices,
    which no GPU needs. `counts` contains the floating-point operations of attention. A `TorchFunctionMode`
    is not used, because it does not apply where gradient checkpointing repeats a forward pass.
    """

    def __init__(self, video: int, text: int) -> None:
        self.video, self.text = video, text
        self.counts = {"attention": 0.0, "across": 0.0, "small_heads": 0.0}

    def __enter__(self) -> None:
        self._real = F.scaled_dot_product_attention
        F.scaled_dot_product_attention = lambda query, key, value, *_, **__: _FLASH(query, key, value)[0]

    def __exit__(self, *_: object) -> None:
        F.scaled_dot_product_attention = self._real

    def count(self, query: Tensor, key: Tensor, times: float) -> None:
        """Add the floating-point operations of an attention call to `counts`.

        Args:
            query: (..., queries, d).
            key: (..., keys, d).
            times: 1 for a forward pass, 2 for a backward pass.
        """
        queries, keys = query.shape[-2], key.shape[-2]
        all_pairs = min(queries, keys) >= self.video and keys != self.text
        name = "attention" if queries == keys or all_pairs else "across"
        self.counts[name] += times * 4.0 * query.numel() * keys
        if name == "attention" and query.shape[-1] <= 64:
            self.counts["small_heads"] += times * 4.0 * query.numel() * keys


class _Ledger(TorchDispatchMode):
    """Torch dispatch mode that measures the peak memory of all new tensors and counts operations.

    torch's `FlopCounterMode` is not used, because its module hooks keep tensors in memory.
    """

    def __init__(self, known: Sequence[Tensor], fused: _Fused | None = None) -> None:
        super().__init__()
        self.fused = fused
        self.live = {t.untyped_storage()._cdata for t in known}
        self.now = self.gradients = self.launches = 0
        self.flops = self.moved = 0.0
        self.worst = (0, 0)
        """Memory at the peak: total bytes, and bytes of gradients."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func.overloadpacket)
        if self.fused and func.overloadpacket is _FLASH:
            self.fused.count(args[0], args[1], 1)
        elif self.fused and func.overloadpacket is _FLASH_BACKWARD:
            self.fused.count(args[1], args[2], 2)
        elif formula:
            self.flops += formula(*args, **(kwargs or {}), out_val=out)
        if not func.is_view and "empty" not in func.overloadpacket.__name__:
            self.traffic(func.overloadpacket, (args, kwargs, out))
        for tensor in tree_iter(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                if key not in self.live:
                    self.live.add(key)
                    weakref.finalize(storage, self.free, key, size)
                    self.add(size)
        return out

    def traffic(self, packet: Any, involved: Any) -> None:
        """Count a kernel, and the bytes of its inputs and outputs unless arithmetic limits its speed."""
        self.launches += 1
        tensors = [t for t in tree_iter(involved) if isinstance(t, Tensor)]
        fast = packet in (_FLASH, _FLASH_BACKWARD) or (
            packet in _PRODUCTS and tensors and tensors[0].dtype is not torch.float32
        )
        if not fast:
            self.moved += sum(t.nbytes for t in tensors)

    def add(self, size: int) -> None:
        """Record an allocation of `size` bytes and update the peak."""
        self.now += size
        if self.now > self.worst[0]:
            self.worst = (self.now, self.gradients)

    def free(self, key: int, size: int) -> None:
        """Record that the storage `key` of `size` bytes was freed."""
        self.live.discard(key)
        self.now -= size

    def gradient(self, parameter: Tensor) -> None:
        """Count the gradient of a parameter as float32; in the simulation, it may have another dtype."""
        assert parameter.grad is not None
        self.gradients += parameter.numel() * 4
        self.add(parameter.numel() * 4 - parameter.grad.nbytes)


def _drop(parameter: Tensor) -> None:
    """Delete the new gradient of a parameter, as if it were added to the gradient of an earlier micro-batch.

    The memory of the earlier gradient is already counted.
    """
    parameter.grad = None


def count_operations(
    family: Family,
    denoiser: nn.Module,
    extent: Extent,
    batch: int,
    *,
    checkpointing: bool | int | Literal["attention"],
    accumulating: bool = False,
    offloaded: bool = False,
    sequence: int = 1,
) -> Counts:
    """Run one forward and backward pass of a network on the meta device; count memory and operations.

    Args:
        family: family of the network.
        denoiser: network on the meta device, with its adapter if it has one.
        extent: size of each sample: number of frames (of objects for scenes), height and width in pixels.
        batch: number of samples.
        checkpointing: value of `memory.gradient_checkpointing`.
        accumulating: True if the gradients of an earlier micro-batch already exist.
        offloaded: True if activations are offloaded to host memory.
        sequence: number of processes that share the tokens of each sample; the result is for one process.
    """
    store = Store(_Nowhere()) if offloaded else None
    if store:
        store.attach(denoiser)
    if sequence > 1:
        family.split_sequence(denoiser, SimulatedSequence(sequence))
    if checkpointing:
        enable_checkpointing(denoiser, checkpointing, store)
    denoiser.train()
    trained = [p for p in denoiser.parameters() if p.requires_grad]
    fused = _Fused(family.tokens(*extent) - family.text_before, family.text_length)
    ledger = _Ledger([*denoiser.parameters(), *denoiser.buffers()], fused)
    if accumulating:
        ledger.gradients = ledger.now = 4 * sum(p.numel() for p in trained)
    note = _drop if accumulating else ledger.gradient
    hooks = [p.register_post_accumulate_grad_hook(note) for p in trained]
    with ledger, fused:
        with torch.device("meta"):
            clip = {name: torch.empty(batch, *each) for name, each in family.shapes(*extent).items()}
            words = torch.empty(family.text_length, text_width(denoiser))
            text = family.collate([{"text": words}] * batch) if family.text_length else {}
            noise, times = torch.empty_like(clip["latents"]), torch.empty(batch)
        x_0 = clip.pop("latents")
        prediction = family.predict(denoiser, x_0 + noise, times, {**text, **clip})
        (prediction.float() - (noise - x_0)).square().mean().backward()
    for hook in hooks:
        hook.remove()
    for parameter in trained:
        parameter.grad = None
    peak, gradients = ledger.worst
    return Counts(
        peak - gradients,
        gradients,
        ledger.flops,
        **fused.counts,
        moved=ledger.moved,
        launches=ledger.launches,
        host=store.host_bytes if store else 0,
    )


def text_width(denoiser: nn.Module) -> int:
    """Return the width of the text embeddings that a network takes.

    The width is read from the network's configuration. Default: 4096 (T5-XXL).
    """
    config: Any = getattr(denoiser, "config", {})
    return next((int(config[k]) for k in TEXT_WIDTHS if config.get(k)), 4096)
