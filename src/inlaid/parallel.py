"""What several processes hold and exchange: all in each (`ddp`), or shares (`fsdp`, `zero2`, `zero3`).

The loop, the tuners and the optimizer do not know which. A checkpoint holds whole tensors under the same
names in every mode, so that a run may go on in another one, or alone.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from inlaid import config as recipe
from inlaid import runtime
from inlaid.runtime import Context


class Replicated:
    """`ddp`, and a single process: every process holds the whole network, and gradients are averaged."""

    sharded = False
    """Whether one process alone cannot run the network."""

    def __init__(self, ctx: Context, config: recipe.Config) -> None:
        self.ctx, self.config = ctx, config

    @property
    def device(self) -> torch.device:
        """Where the network is put before `shard`."""
        return self.ctx.device

    def shard(self, denoiser: nn.Module) -> dict[str, nn.Parameter]:
        """Leaves this process its share of the network; returns what trains by name."""
        return {n: p for n, p in denoiser.named_parameters() if p.requires_grad}

    def own(
        self, denoiser: nn.Module, optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter]
    ) -> tuple[nn.Module, Mapping[str, Tensor]]:
        """What the step is given as the network, and the trained weights as this process holds them."""
        return denoiser, parameters

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Adds to the gradients; `last` says whether they are complete, over processes too, afterwards."""
        loss.backward()

    def step(
        self, optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor], clip: float | None
    ) -> Tensor:
        """Clips and applies the gradients; returns the norm they had, on the device."""
        self._average(parameters)
        norm = torch.nn.utils.clip_grad_norm_(parameters, clip if clip is not None else float("inf"))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return norm

    def _average(self, parameters: Sequence[Tensor]) -> None:
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

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> tuple[Any, dict[str, Tensor]]:
        """Its state as JSON and, on the first process, the whole tensors of it; all call it together."""
        moments: dict[str, Tensor] = {}
        return runtime.pack(optimizer.state_dict(), "optimizer", moments), self.gather(moments)

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

        from inlaid import memory

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
        self, optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor], clip: float | None
    ) -> Tensor:
        """See `Replicated.step`; the norm is over all shares."""
        return whole(super().step(optimizer, parameters, clip))

    def _average(self, parameters: Sequence[Tensor]) -> None:
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


class Zero(Replicated):
    """DeepSpeed: gradients and moments are shared out (ZeRO-2), or the weights too (ZeRO-3).

    Its optimizer keeps flat copies of the weights that train, which `scatter` has to renew; gradients are
    reduced after each micro-batch. Its own precision settings are not used: every weight keeps its type.
    """

    def __init__(self, ctx: Context, config: recipe.Config) -> None:
        super().__init__(ctx, config)
        self.stage = {"zero2": 2, "zero3": 3}[config.runtime.parallel]
        self.sharded = self.stage == 3
        if ctx.device.type == "cpu":
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        self.deepspeed = runtime.package("runtime.parallel", "deepspeed")
        # On a CPU it would compile an operation for minutes that only inference uses.
        self.deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = ctx.device.type != "cpu"

    def own(
        self, denoiser: nn.Module, optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter]
    ) -> tuple[nn.Module, Mapping[str, Tensor]]:
        """See `Replicated.own`; frozen weights are shared out by ZeRO-3 as well."""
        self.groups = optimizer.state_dict()["param_groups"]
        self.trained = [p for group in optimizer.param_groups for p in group["params"]]
        self.shapes = {n: p.shape for n, p in denoiser.named_parameters()}
        settings = {
            "train_micro_batch_size_per_gpu": self.config.train.batch,
            "gradient_accumulation_steps": self.config.train.accumulate,
            "gradient_clipping": self.config.optim.clip or 0.0,
            "zero_allow_untested_optimizer": True,
            "steps_per_print": 1 << 40,
            # Weights are let go after each use: nothing may outlive an average that was swapped in.
            "zero_optimization": {
                "stage": self.stage,
                "stage3_param_persistence_threshold": 0,
                "stage3_max_live_parameters": 0,
                "stage3_max_reuse_distance": 0,
            },
        }
        self.engine, *_ = self.deepspeed.initialize(model=denoiser, optimizer=optimizer, config=settings)
        if self.stage == 2:
            return self.engine, parameters
        return self.engine, {n: p.ds_tensor for n, p in parameters.items()}  # type: ignore[attr-defined]

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """See `Replicated.backward`."""
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss, scale_wrt_gas=False)

    def step(
        self, optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor], clip: float | None
    ) -> Tensor:
        """See `Replicated.step`."""
        self.engine.step()
        return torch.as_tensor(self.engine.get_global_grad_norm(), device=self.ctx.device)

    def gather(self, held: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See `Replicated.gather`."""
        if self.stage == 2:  # weights are slices of one tensor here; a file of them needs each alone
            return {n: t.clone() for n, t in super().gather(held).items()}
        out = {}
        for name, tensor in held.items():
            value = getattr(tensor, "ds_tensor", tensor).detach()
            if name in self.shapes:  # buffers are whole
                parts = value.new_empty(self.ctx.world * value.numel())
                dist.all_gather_into_tensor(parts, value.flatten())
                value = parts[: self.shapes[name].numel()].view(self.shapes[name])
            if self.ctx.main:
                out[name] = value.cpu().clone()
        return out

    @torch.no_grad()
    def scatter(self, whole: Mapping[str, Tensor], held: Mapping[str, Tensor]) -> None:
        """See `Replicated.scatter`."""
        for name, tensor in held.items():
            value = whole[name]
            if self.stage == 3:
                padded = nn.functional.pad(
                    value.flatten(), (0, self.ctx.world * tensor.numel() - value.numel())
                )
                value = padded.chunk(self.ctx.world)[self.ctx.rank].view_as(tensor)
            tensor.copy_(value)
        self.engine.optimizer.refresh_fp32_params()

    def _share(self, parameter: Tensor) -> tuple[Tensor, int, int, int] | None:
        """The flat tensor with this process's part of a weight: where in it, how many, from which number."""
        zero: Any = self.engine.optimizer
        if self.stage == 3:
            group, at, n = zero.grad_position[zero.get_param_id(parameter)]
            return zero.fp32_partitioned_groups_flat[group], at, n, n * self.ctx.rank
        place = parameter._hp_mapping  # type: ignore[attr-defined]
        if place is None:
            return None
        flat = zero.single_partition_of_fp32_groups[place.param_group_index]
        here, there = place.hp_fragment_address, place.lp_fragment_address
        return flat, here.start, here.numel, there.start

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> tuple[Any, dict[str, Tensor]]:
        """See `Replicated.optimizer_state`; as AdamW alone would have it."""
        state: dict[int, dict[str, Tensor]] = {}
        for i, p in enumerate(self.trained):
            shape = getattr(p, "ds_shape", p.shape)
            share, state[i] = self._share(p), {}
            steps = [s["step"] for s in optimizer.state.values()]
            state[i]["step"] = steps[0].clone() if steps else torch.tensor(0.0)
            for key in MOMENTS:
                size = shape.numel() if share is None or self.stage == 2 else self.ctx.world * share[2]
                value = torch.zeros(size, device=self.ctx.device)
                if share is not None:
                    flat, at, n, first = share
                    value[first : first + n] = optimizer.state[flat][key][at : at + n]
                dist.reduce(value, 0)
                state[i][key] = (
                    value[: shape.numel()].view(shape).cpu().clone() if self.ctx.main else value[:0]
                )
        groups = [
            {**kept, "lr": now["lr"]} for kept, now in zip(self.groups, optimizer.param_groups, strict=True)
        ]
        moments: dict[str, Tensor] = {}
        packed = runtime.pack({"state": state, "param_groups": groups}, "optimizer", moments)
        return packed, moments if self.ctx.main else {}

    @torch.no_grad()
    def load_optimizer(self, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        """See `Replicated.load_optimizer`."""
        for i, p in enumerate(self.trained):
            share = self._share(p)
            if share is None or i not in state["state"]:
                continue
            flat, at, n, first = share
            mine = optimizer.state[flat]
            if not mine:
                mine["step"] = state["state"][i]["step"].clone()
                mine |= {key: torch.zeros_like(flat) for key in MOMENTS}
            for key in MOMENTS:
                part = state["state"][i][key].flatten()[first : first + n]
                mine[key][at : at + len(part)] = part


MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's, by the names of its state."""


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


def parts(parameters: Sequence[Tensor], most: int = 1 << 26) -> Iterator[list[Tensor]]:
    """Neighbours of together at most so many numbers, so that reducing needs little memory of its own."""
    part: list[Tensor] = []
    for p in parameters:
        if part and sum(q.numel() for q in part) + p.numel() > most:
            yield part
            part = []
        part.append(p)
    if part:
        yield part


def problems(config: recipe.Config, world: int, precision: torch.dtype) -> list[str]:
    """Sentences about what a recipe asks that sharding does not do; empty when all is well."""
    mode, out = config.runtime.parallel, []
    if mode == "ddp":
        return out
    if world == 1:
        out.append(
            f"runtime.parallel: {mode} shards over several processes, this launch has one: start it with "
            "`torchrun --nproc-per-node N -m inlaid train RECIPE`, or use ddp"
        )
    if config.optim.name != "adamw":
        out.append(
            f"optim.name: {config.optim.name} does not step on shares of weights; use adamw with {mode}"
        )
    if mode != "fsdp" and config.tuner.kind == "full" and precision is not torch.float32:
        out.append(
            f"runtime.precision: full fine-tuning with {mode} only in float32 (DeepSpeed switches autocast "
            "off); for bfloat16 use fsdp"
        )
    if config.runtime.compile:
        out.append(f"runtime.compile: not with runtime.parallel={mode}; use ddp, or leave it out")
    return out


def strategy(config: recipe.Config, ctx: Context) -> Replicated:
    """The one that a recipe names.

    Raises:
        ValueError: with everything that it cannot do.
    """
    wrong = problems(config, ctx.world, ctx.precision)
    if wrong:
        raise ValueError("\n".join(wrong))
    kinds = {"ddp": Replicated, "fsdp": FSDP, "zero2": Zero, "zero3": Zero}
    return kinds[config.runtime.parallel](ctx, config)
