"""Parallel training: replication (`ddp`), sharding (`fsdp`, `zero2`, `zero3`) and split token sequences.

The training loop, the tuners and the optimizer are independent of the strategy. A checkpoint stores unsharded
tensors under the same names in every mode, so a run can resume in another mode or in a single process.

With `runtime.sequence: n`, groups of n consecutive processes share each sample. Every process of a group
computes the loss of the whole sample, and a part of the gradients. The parts add up to n times the gradients,
because the backward pass adds the losses of all n processes. Each strategy averages gradients over all
processes, so the result is the mean over groups.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from inlaid import config as recipe
from inlaid.families import Family
from inlaid.networks.sequence_parallel import SequenceParallel
from inlaid.runs.launch import COLLECTIVE_TIMEOUT, Context
from inlaid.runs.packages import require_package
from inlaid.training.checkpoints import pack_state


class Replicated:
    """Strategy for `ddp` and for a single process: each process holds the whole network.

    Gradients are averaged over processes.
    """

    sharded = False
    """True if a forward pass requires all processes."""

    def __init__(self, ctx: Context, config: recipe.Config) -> None:
        self.ctx, self.config = ctx, config
        self.sharded = self.sharded or ctx.sequence > 1

    def split_sequence(self, family: Family, denoiser: nn.Module) -> None:
        """Make the denoiser split the tokens of each sample over `runtime.sequence` processes.

        All processes must call this method. It must be called after adapters are attached, and before blocks
        are compiled.
        """
        if self.ctx.sequence > 1:
            group: Any = dist.new_subgroups(self.ctx.sequence, timeout=COLLECTIVE_TIMEOUT)[0]
            family.split_sequence(denoiser, SequenceParallel(group))

    @property
    def device(self) -> torch.device:
        """Device to which the network is moved before `shard` is called."""
        return self.ctx.device

    def shard(self, denoiser: nn.Module) -> dict[str, nn.Parameter]:
        """Return the trainable parameters by name; subclasses may first shard the network in place."""
        return {n: p for n, p in denoiser.named_parameters() if p.requires_grad}

    def own(
        self, denoiser: nn.Module, optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter]
    ) -> tuple[nn.Module, Mapping[str, Tensor]]:
        """Return the network for the training step, and the trained weights that this process stores.

        With FSDP and ZeRO-3, each process stores only a shard of every trained weight.
        """
        return denoiser, parameters

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Run the backward pass of a micro-batch, and accumulate its gradients.

        FSDP and ZeRO also reduce gradients over processes here. `last` is True for the last micro-batch of an
        optimizer step.
        """
        loss.backward()

    def step(
        self, optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor], clip: float | None
    ) -> Tensor:
        """Average and clip the gradients, run the optimizer step, and free the gradients.

        Returns:
            Gradient norm before clipping, as a tensor on the device.
        """
        self._average(parameters)
        norm = torch.nn.utils.clip_grad_norm_(parameters, clip if clip is not None else float("inf"))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return norm

    def _average(self, parameters: Sequence[Tensor]) -> None:
        """Average gradients over processes, once after the last micro-batch of a step.

        `DistributedDataParallel` is not used. Adapters are small, so there is no benefit from communication
        during the backward pass. The wrapper would change parameter names, and interfere with gradient
        checkpointing and compilation.
        """
        if self.ctx.world == 1:
            return
        for p in parameters:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        for part in group_tensors(parameters):
            flat = torch.cat([p.grad.flatten() for p in part if p.grad is not None])
            dist.all_reduce(flat)
            flat /= self.ctx.world
            for p, g in zip(part, flat.split([p.numel() for p in part]), strict=True):
                p.grad = g.view_as(p)

    def gather(self, held: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the unsharded tensors by name in the main process, and an empty mapping in the others.

        All processes must call this method.
        """
        return {n: t.detach() for n, t in held.items()} if self.ctx.main else {}

    @torch.no_grad()
    def scatter(self, whole: Mapping[str, Tensor], held: Mapping[str, Tensor]) -> None:
        """Copy the values of the unsharded tensors `whole` into this process's shards `held`.

        All processes must pass the same values in `whole`.
        """
        for name, tensor in held.items():
            tensor.copy_(whole[name])

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> tuple[Any, dict[str, Tensor]]:
        """Return the optimizer state as a pair: JSON values, and a mapping from names to tensors.

        The tensors are unsharded, and returned in the main process only. All processes must call this method.
        """
        moments: dict[str, Tensor] = {}
        return pack_state(optimizer.state_dict(), "optimizer", moments), self.gather(moments)

    def load_optimizer(self, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        """Restore an optimizer state that contains unsharded tensors."""
        optimizer.load_state_dict(state)


class FSDP(Replicated):
    """Strategy for `fsdp` (FSDP2): each process holds a shard of every weight, gradient and optimizer moment.

    The weights of a block are gathered while the block runs. Frozen weights are sharded too. Frozen weights
    may be bfloat16 although trained weights are float32: a common dtype is required only for gradients.
    """

    sharded = True
    device = torch.device("cpu")  # type: ignore[assignment]  # sharded by block: may not fit whole

    def shard(self, denoiser: nn.Module) -> dict[str, nn.Parameter]:
        """Shard each repeated block as one group, and all other weights as another group."""
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        from inlaid.networks import quantize

        size = self.config.runtime.shard_size
        shape = (self.ctx.world // size, size) if size else (self.ctx.world,)
        names = ("replicate", "shard")[-len(shape) :]
        mesh = init_device_mesh(self.ctx.device.type, shape, mesh_dim_names=names)
        for block in quantize.blocks(denoiser).values():
            fully_shard(block, mesh=mesh, reshard_after_forward=True)
        # Reshard the root too: otherwise its weights stay gathered after a pass without gradients, and
        # training would continue with the EMA weights that were swapped in for validation.
        self.root = fully_shard(denoiser, mesh=mesh, reshard_after_forward=True)
        return super().shard(denoiser)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Accumulate unsharded gradients until the last micro-batch, then reduce them once."""
        self.root.set_requires_gradient_sync(last)
        loss.backward()

    def step(
        self, optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor], clip: float | None
    ) -> Tensor:
        """Clip the gradients and run the optimizer step; see `Replicated.step`.

        The returned gradient norm includes all shards.
        """
        return gather_whole(super().step(optimizer, parameters, clip))

    def _average(self, parameters: Sequence[Tensor]) -> None:
        """Do nothing: the backward pass has already averaged the gradients."""

    def gather(self, held: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Gather the tensors one by one, and move them to CPU memory; see `Replicated.gather`."""
        out = {}
        for name, tensor in held.items():
            value = gather_whole(tensor.detach())
            if self.ctx.main:
                out[name] = value.cpu()
        return out

    @torch.no_grad()
    def scatter(self, whole: Mapping[str, Tensor], held: Mapping[str, Tensor]) -> None:
        """Copy the values of unsharded tensors into this process's shards; see `Replicated.scatter`."""
        for name, tensor in held.items():
            tensor.copy_(_share(whole[name], tensor))

    def load_optimizer(self, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        """Restore the optimizer state; see `Replicated.load_optimizer`.

        Moments are sharded like their weights; step counts are not sharded.
        """
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
    """Parallelism with DeepSpeed: `runtime.parallel` is `zero2` or `zero3`.

    Gradients and optimizer state are sharded; `zero3` also shards the weights. DeepSpeed's optimizer keeps
    flat copies of the trained weights, so `scatter` updates the weights and the copies. Gradients are reduced
    after each micro-batch. DeepSpeed's precision settings are not used: every weight keeps its dtype.
    """

    def __init__(self, ctx: Context, config: recipe.Config) -> None:
        super().__init__(ctx, config)
        self.stage = {"zero2": 2, "zero3": 3}[config.runtime.parallel]
        self.sharded = self.stage == 3
        if ctx.device.type == "cpu":
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        self.deepspeed = require_package("runtime.parallel", "deepspeed")
        # On a CPU, DeepSpeed would spend minutes compiling an operation that only inference uses.
        self.deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = ctx.device.type != "cpu"

    def own(
        self, denoiser: nn.Module, optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter]
    ) -> tuple[nn.Module, Mapping[str, Tensor]]:
        """Wrap the network in a DeepSpeed engine; see `Replicated.own`. ZeRO-3 also shards frozen weights."""
        self.groups = optimizer.state_dict()["param_groups"]
        self.trained = [p for group in optimizer.param_groups for p in group["params"]]
        self.shapes = {n: p.shape for n, p in denoiser.named_parameters()}
        settings = {
            "train_micro_batch_size_per_gpu": self.config.train.batch,
            "gradient_accumulation_steps": self.config.train.accumulate,
            "gradient_clipping": self.config.optim.clip or 0.0,
            "zero_allow_untested_optimizer": True,
            "steps_per_print": 1 << 40,
            # Release weights after each use: no gathered weight may outlive a swap with the EMA.
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
        """Accumulate the gradients of a micro-batch; see `Replicated.backward`."""
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss, scale_wrt_gas=False)

    def step(
        self, optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor], clip: float | None
    ) -> Tensor:
        """Clip the gradients and run the optimizer step; see `Replicated.step`."""
        self.engine.step()
        return torch.as_tensor(self.engine.get_global_grad_norm(), device=self.ctx.device)

    def gather(self, held: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the unsharded tensors in the main process; see `Replicated.gather`."""
        if self.stage == 2:  # weights are views of one tensor; safetensors needs separate tensors
            return {n: t.clone() for n, t in super().gather(held).items()}
        out = {}
        for name, tensor in held.items():
            value = getattr(tensor, "ds_tensor", tensor).detach()
            if name in self.shapes:  # buffers are not sharded
                parts = value.new_empty(self.ctx.world * value.numel())
                dist.all_gather_into_tensor(parts, value.flatten())
                value = parts[: self.shapes[name].numel()].view(self.shapes[name])
            if self.ctx.main:
                out[name] = value.cpu().clone()
        return out

    @torch.no_grad()
    def scatter(self, whole: Mapping[str, Tensor], held: Mapping[str, Tensor]) -> None:
        """Copy the values of unsharded tensors into this process's shards; see `Replicated.scatter`."""
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
        """Find this process's shard of a weight in the flat tensors of DeepSpeed's optimizer.

        Returns:
            Flat tensor with the shard, start of the shard in this tensor, length of the shard, and start of
            the shard in the flattened weight. None if this process holds no part of the weight.
        """
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
        """Return the optimizer state in the format of torch's AdamW; see `Replicated.optimizer_state`."""
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
        packed = pack_state({"state": state, "param_groups": groups}, "optimizer", moments)
        return packed, moments if self.ctx.main else {}

    @torch.no_grad()
    def load_optimizer(self, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        """Restore the optimizer state; see `Replicated.load_optimizer`."""
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
"""Names of the two moments in the optimizer state of AdamW."""


def gather_whole(tensor: Tensor) -> Tensor:
    """Return a sharded tensor as an unsharded tensor; all processes must call this function together."""
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _share(tensor: Tensor, like: Tensor) -> Tensor:
    """Shard a tensor in the same way as `like`, without communication between processes."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(like, DTensor):
        return tensor
    moved = tensor.to(like.device, like.dtype)
    return distribute_tensor(moved, like.device_mesh, like.placements, src_data_rank=None)


def group_tensors(parameters: Sequence[Tensor], most: int = 1 << 26) -> Iterator[list[Tensor]]:
    """Yield groups of consecutive tensors with at most `most` elements per group, to limit memory.

    A tensor with more elements forms a group of its own.
    """
    part: list[Tensor] = []
    for p in parameters:
        if part and sum(q.numel() for q in part) + p.numel() > most:
            yield part
            part = []
        part.append(p)
    if part:
        yield part


def problems(config: recipe.Config, world: int, precision: torch.dtype) -> list[str]:
    """Return an error message for each setting that does not fit `runtime.parallel` or the process count."""
    mode, out = config.runtime.parallel, []
    sequence, shard_size = config.runtime.sequence, config.runtime.shard_size
    if world % sequence:
        out.append(
            f"runtime.sequence: {sequence} processes share each sample, but this launch has {world} "
            f"process(es), no multiple of {sequence}: start it with `torchrun --nproc-per-node {sequence} -m "
            "inlaid train RECIPE`, or with a multiple"
        )
    if mode == "ddp":
        return out
    if shard_size is not None and world % shard_size:
        out.append(
            f"runtime.shard_size: {shard_size} does not divide the {world} process(es) of this launch: use a "
            "divisor, or remove it to shard over all processes"
        )
    if world == 1:
        out.append(
            f"runtime.parallel: {mode} needs several processes, this launch has one: start it with "
            "`torchrun --nproc-per-node N -m inlaid train RECIPE`, or use ddp"
        )
    if config.optim.name != "adamw":
        out.append(f"optim.name: {config.optim.name} does not support sharded weights; use adamw with {mode}")
    if mode != "fsdp" and config.tuner.kind == "full" and precision is not torch.float32:
        out.append(
            f"runtime.precision: full fine-tuning with {mode} needs float32 (DeepSpeed disables autocast); "
            "for bfloat16 use fsdp"
        )
    if config.runtime.compile:
        out.append(f"runtime.compile: not supported with runtime.parallel={mode}; use ddp, or remove it")
    return out


def strategy(config: recipe.Config, ctx: Context) -> Replicated:
    """Return the parallel strategy of a recipe.

    Raises:
        ValueError: if the recipe has settings that the strategy does not support; the message lists them.
    """
    wrong = problems(config, ctx.world, ctx.precision)
    if wrong:
        raise ValueError("\n".join(wrong))
    kinds = {"ddp": Replicated, "fsdp": FSDP, "zero2": Zero, "zero3": Zero}
    return kinds[config.runtime.parallel](ctx, config)
