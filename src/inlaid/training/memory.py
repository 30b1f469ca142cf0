"""Memory and speed options of training: gradient checkpointing, optimizer state offload, compilation."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

from inlaid import config as recipe
from inlaid.networks.quantize import blocks
from inlaid.training.store import Store, Ticket, versioned

COMPILED_SHAPES = 64
"""Maximum number of compiled graphs per block.

torch's default limit of 8 would stop a run with many different clip sizes.
"""


def trim() -> None:
    """Return freed memory of this process to the system, if the C library can (glibc).

    Otherwise, glibc may keep the memory that generation needed until the end of the run.
    """
    give_back = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if give_back is not None:
        give_back(0)


def problems(config: recipe.Config, device: torch.device, precision: torch.dtype) -> list[str]:
    """Return an error message for each setting that this device does not support."""
    memory, out = config.memory, []
    if memory.offload_optimizer and device.type != "cuda":
        out.append(
            f"memory.offload_optimizer: has no effect on {device.type}, it needs a CUDA device; remove it"
        )
    if (memory.offload or memory.blocks_to_swap) and device.type not in ("cpu", "cuda"):
        out.append(
            f"memory.offload: has no effect on {device.type}, where host and device share their memory; "
            "remove it"
        )
    if memory.quantize in ("int8", "float8", "nf4") and device.type not in ("cpu", "cuda"):
        out.append(f"memory.quantize: {memory.quantize} has no kernels for {device.type}; use int4")
    if memory.layerwise_casting == "float8" and device.type not in ("cpu", "cuda"):
        out.append(f"memory.layerwise_casting: {device.type} has no float8; use bfloat16")
    if memory.layerwise_casting == "bfloat16" and precision is torch.bfloat16:
        out.append("memory.layerwise_casting: the base model is already bfloat16; use float8, or remove it")
    if config.runtime.compile and device.type not in ("cpu", "cuda"):
        out.append(f"runtime.compile: torch cannot compile a training step for {device.type}; remove it")
    return out


def enable_checkpointing(
    denoiser: nn.Module, which: bool | int | Literal["attention"], store: Store | None = None
) -> None:
    """Enable gradient checkpointing. The gradients stay bit-identical.

    Args:
        denoiser: network; changed in place.
        which: True to checkpoint every block, n to checkpoint every n-th block. A checkpointed block stores
            only its input, and repeats its forward pass in the backward pass. Other blocks store all
            activations. "attention" checkpoints every block, but stores the outputs of attention layers
            with at least `KEPT_TOKENS` keys, so that these are not computed again.
        store: store for these outputs, if activations are offloaded.
    """
    index = {id(block): i for i, block in enumerate(blocks(denoiser).values())}
    every = 1 if which == "attention" else int(which)
    how: dict[str, Any] = {"context_fn": partial(keep_attention, store)} if which == "attention" else {}

    def run(block: nn.Module, *args: Any) -> Any:
        if index.get(id(block), 0) % every:
            return block(*args)
        return checkpoint(block, *args, use_reentrant=False, **how)

    denoiser.enable_gradient_checkpointing(run)  # type: ignore[operator]


# --- attention that is not computed again -----------------------------------------------------------------

ATTENTION = tuple(
    getattr(torch.ops.aten, f"_scaled_dot_product_{name}")
    for name in (
        "flash_attention",
        "flash_attention_for_cpu",
        "efficient_attention",
        "cudnn_attention",
        "fused_attention_overrideable",
    )
    if hasattr(torch.ops.aten, f"_scaled_dot_product_{name}")
)
"""Fused attention operators of torch."""

KEPT_TOKENS = 1024
"""Minimum number of keys for which the result of attention is stored. Cross-attention has at most 512 text
tokens as keys, so it is only 1 % of the work, but its result would take as much memory."""


def _is_kept(func: Any, args: Sequence[Any]) -> bool:
    return func.overloadpacket in ATTENTION and args[1].shape[-2] >= KEPT_TOKENS


class _Recording(TorchDispatchMode):
    """Torch dispatch mode that stores the results of attention over video tokens in a list.

    If activations are offloaded, large results are in a store, and the list contains their tickets.
    """

    def __init__(self, box: list[Any], store: Store | None) -> None:
        super().__init__()
        self.box, self.store = box, store

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if _is_kept(func, args):
            self.box.append(tree_map_only(Tensor, self._stored, out))
        return out

    def _stored(self, tensor: Tensor) -> Ticket | tuple[Tensor, int]:
        return self.store.put(tensor) if self.store and self.store.accepts(tensor) else versioned(tensor)


class _Replaying(TorchDispatchMode):
    """Torch dispatch mode that returns stored results of attention instead of computing them.

    Raises:
        ValueError: if a stored result was changed in place, or if a second backward pass needs the results.
    """

    def __init__(self, box: list[Any]) -> None:
        super().__init__()
        self.box = box

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.box.clear()  # also if the recomputation stopped early

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if not _is_kept(func, args):
            return func(*args, **(kwargs or {}))
        if not self.box:
            raise ValueError(
                "memory.gradient_checkpointing: `attention` allows one backward pass for each forward pass; "
                "set it to true"
            )
        return tuple(self._unchanged(each) for each in self.box.pop(0))

    @staticmethod
    def _unchanged(stored: Any) -> Any:
        if isinstance(stored, Ticket):
            return stored.take()
        if not isinstance(stored, tuple):
            return stored
        tensor, version = stored
        if tensor._version != version:
            raise ValueError(
                "memory.gradient_checkpointing: this network changes the result of attention in place, so "
                "`attention` cannot store it; set it to true"
            )
        return tensor


def keep_attention(store: Store | None = None) -> tuple[AbstractContextManager, AbstractContextManager]:
    """Return two context managers for `torch.utils.checkpoint`, so that attention is not computed again.

    The first stores the results of attention in the forward pass of a block. The second takes the stored
    results when the block is recomputed. Attention over fewer than `KEPT_TOKENS` keys is computed again.

    Args:
        store: store for large results, if activations are offloaded.
    """
    box: list[Any] = []
    return _Recording(box, store), _Replaying(box)


class Offloaded(torch.optim.Optimizer):
    """Optimizer state offload: a wrapper that runs any optimizer on CPU copies of the parameters.

    torchao's `CPUOffloadOptimizer` is not used: it runs on CUDA only, and copies gradients in the backward
    pass, before they are averaged over processes and clipped. This class does all work in `step`. Its state
    dict is the state dict of the wrapped optimizer.
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], make: Callable[[list[nn.Parameter]], torch.optim.Optimizer]
    ) -> None:
        self.there = list(parameters)
        pin = torch.cuda.is_available()
        self.here = [nn.Parameter(torch.empty_like(p, device="cpu", pin_memory=pin)) for p in self.there]
        self.inner = make(self.here)
        self._fetch()

    @torch.no_grad()
    def _fetch(self) -> None:
        for here, there in zip(self.here, self.there, strict=True):
            here.copy_(there)

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """Parameter groups of the wrapped optimizer; their learning rates can be changed."""
        return self.inner.param_groups

    @property
    def state(self) -> Mapping[Any, Any]:  # type: ignore[override]
        """State of the wrapped optimizer."""
        return self.inner.state

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Copy the gradients to the CPU, run the optimizer step, and copy the weights back."""
        for here, there in zip(self.here, self.there, strict=True):
            if there.grad is None:
                here.grad = None
                continue
            here.grad = (
                torch.empty_like(here, pin_memory=here.is_pinned()) if here.grad is None else here.grad
            )
            here.grad.copy_(there.grad, non_blocking=True)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.inner.step()
        for here, there in zip(self.here, self.there, strict=True):
            there.copy_(here, non_blocking=True)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Free the gradients on the device. The CPU copies are kept until the next step overwrites them."""
        for there in self.there:
            there.grad = None

    def state_dict(self) -> dict[str, Any]:
        """Return the state dict of the wrapped optimizer."""
        return self.inner.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state of the wrapped optimizer, and update the CPU copies of the parameters.

        The parameters on the device must be restored before this call.
        """
        self.inner.load_state_dict(state_dict)
        self._fetch()


def compile_blocks(denoiser: nn.Module, backend: str = "inductor") -> None:
    """Compile each repeated block of the network as one full graph; a graph break is an error.

    The first input shape is compiled with static sizes. The second shape is compiled with dynamic sizes, and
    all later shapes reuse this graph. Validation and sampling run without gradients, so each of them compiles
    once more.
    """
    import torch._dynamo.config as dynamo

    dynamo.capture_dynamic_output_shape_ops = True  # Mochi selects unpadded tokens with `nonzero`
    dynamo.recompile_limit = max(dynamo.recompile_limit, COMPILED_SHAPES)
    dynamo.accumulated_recompile_limit = max(dynamo.accumulated_recompile_limit, 4 * COMPILED_SHAPES)
    for block in blocks(denoiser).values():
        block.compile(fullgraph=True, backend=backend)
