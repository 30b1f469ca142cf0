"""What several processes hold and exchange: everything in each (`ddp`), or a share of every weight (`fsdp`).

The loop, the tuners and the optimizer do not know which. A checkpoint holds whole tensors under the same
names in every mode, so that a run may go on in another one, or alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from inlay import config as recipe
from inlay.runtime import Context


class Replicated:
    """`ddp`, and a single process: every process holds the whole network, and gradients are averaged."""

    sharded = False
    """Whether one process alone cannot run the network."""

    def __init__(self, ctx: Context) -> None:
        self.ctx = ctx

    @property
    def device(self) -> torch.device:
        """Where the network is put before `shard`."""
        return self.ctx.device

    def shard(self, denoiser: nn.Module) -> dict[str, nn.Parameter]:
        """Leaves this process its share of the network; returns what trains by name."""
        return {n: p for n, p in denoiser.named_parameters() if p.requires_grad}

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Adds to the gradients; `last` says whether they are complete, over processes too, afterwards."""
        loss.backward()

    def step(
        self, optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter], clip: float | None
    ) -> Tensor:
        """Clips and applies the gradients; returns the norm they had, on the device."""
        self._average(parameters)
        norm = torch.nn.utils.clip_grad_norm_(parameters, clip if clip is not None else float("inf"))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return norm

    def _average(self, parameters: Sequence[nn.Parameter]) -> None:
        """Once, after the last micro-batch of a step.

        Adapters are small, so nothing is gained by overlapping it with the backward pass, and without a
        wrapper around the network, its names, checkpointing and compilation stay as they are.
        """
        if self.ctx.world == 1:
            return
        for p in parameters:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        for part in parts(parameters):
            flat = torch.cat([p.grad.flatten() for p in part if p.grad is not None])
            dist.all_reduce(flat)
            flat /= self.ctx.world
            for p, g in zip(part, flat.split([p.numel() for p in part]), strict=True):
                p.grad = g.view_as(p)

    def gather(self, held: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Whole tensors for the first process to write, empty for the others; all must call it together."""
        return {n: t.detach() for n, t in held.items()} if self.ctx.main else {}

    @torch.no_grad()
    def scatter(self, whole: Mapping[str, Tensor], held: Mapping[str, Tensor]) -> None:
        """The reverse, in place: every process has `whole` and takes its share."""
        for name, tensor in held.items():
            tensor.copy_(whole[name])

    def load_optimizer(self, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        """Restores the state of an optimizer from whole tensors."""
        optimizer.load_state_dict(state)


class FSDP(Replicated):
    """FSDP2: a process holds a share of every weight, gradient and moment; blocks are whole while they run.

    Frozen weights are sharded as well. They may be bfloat16 beside trained ones in float32: only what is
    reduced must have one type, and everything that trains is float32.
    """

    sharded = True
    device = torch.device("cpu")  # type: ignore[assignment]  # moved block by block: the whole may not fit

    def shard(self, denoiser: nn.Module) -> dict[str, nn.Parameter]:
        """Each repeated block is a group, and what is left is one."""
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        from inlay import memory

        mesh = init_device_mesh(self.ctx.device.type, (self.ctx.world,))
        for block in memory.blocks(denoiser).values():
            fully_shard(block, mesh=mesh, reshard_after_forward=True)
        # The root too: else its weights stay gathered after a pass without gradients, and an average that was
        # swapped in for the held-out loss would be trained on.
        self.root = fully_shard(denoiser, mesh=mesh, reshard_after_forward=True)
        return super().shard(denoiser)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Gradients stay whole until the last micro-batch, and are then reduced once."""
        self.root.set_requires_gradient_sync(last)
        loss.backward()

    def step(
        self, optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter], clip: float | None
    ) -> Tensor:
        """See `Replicated.step`; the norm is over all shares."""
        return whole(super().step(optimizer, parameters, clip))

    def _average(self, parameters: Sequence[nn.Parameter]) -> None:
        """The backward pass did."""

    def gather(self, held: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See `Replicated.gather`; one tensor is whole at a time, except on the first process's host."""
        out = {}
        for name, tensor in held.items():
            value = whole(tensor.detach())
            if self.ctx.main:
                out[name] = value.cpu()
        return out

    @torch.no_grad()
    def scatter(self, whole: Mapping[str, Tensor], held: Mapping[str, Tensor]) -> None:
        """See `Replicated.scatter`."""
        for name, tensor in held.items():
            tensor.copy_(_share(whole[name], tensor))

    def load_optimizer(self, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        """Moments are sharded as their weights are; the rest, such as the number of steps, is everyone's."""
        own = [p for group in optimizer.param_groups for p in group["params"]]
        numbers = [i for group in state["param_groups"] for i in group["params"]]
        shares = {
            i: {
                k: _share(v, p) if isinstance(v, Tensor) and v.shape == p.shape else v
                for k, v in state["state"][i].items()
            }
            for i, p in zip(numbers, own, strict=True)
            if i in state["state"]
        }
        optimizer.load_state_dict({**state, "state": shares})


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor as a plain one, on all processes, which must call it together."""
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _share(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, sharded and placed as another is; no process asks the others."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(like, DTensor):
        return tensor
    moved = tensor.to(like.device, like.dtype)
    return distribute_tensor(moved, like.device_mesh, like.placements, src_data_rank=None)


def parts(parameters: Sequence[nn.Parameter], most: int = 1 << 26) -> Iterator[list[nn.Parameter]]:
    """Neighbours of together at most so many numbers, so that reducing needs little memory of its own."""
    part: list[nn.Parameter] = []
    for p in parameters:
        if part and sum(q.numel() for q in part) + p.numel() > most:
            yield part
            part = []
        part.append(p)
    if part:
        yield part


def problems(config: recipe.Config, world: int) -> list[str]:
    """Sentences about what a recipe asks that sharding does not do; empty when all is well."""
    mode, out = config.runtime.parallel, []
    if mode == "ddp":
        return out
    if world == 1:
        out.append(
            f"runtime.parallel: {mode} shards over several processes, this launch has one: start it with "
            "`torchrun --nproc-per-node N -m inlay train RECIPE`, or use ddp"
        )
    if config.optim.name != "adamw":
        out.append(
            f"optim.name: {config.optim.name} does not step on shares of weights; use adamw with {mode}"
        )
    if config.runtime.compile:
        out.append(f"runtime.compile: not with runtime.parallel={mode}; use ddp, or leave it out")
    return out


def strategy(config: recipe.Config, ctx: Context) -> Replicated:
    """The one that a recipe names.

    Raises:
        ValueError: with everything that it cannot do.
    """
    wrong = problems(config, ctx.world)
    if wrong:
        raise ValueError("\n".join(wrong))
    return {"ddp": Replicated, "fsdp": FSDP}[config.runtime.parallel](ctx)
