"""Recipe sections for memory, device, precision and processes."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from inlaid.config.section import Section


class Memory(Section):
    """Options that reduce memory at the price of speed or precision."""

    gradient_checkpointing: bool | Annotated[int, Field(ge=1)] | Literal["attention"] = True
    """Gradient checkpointing: recompute activations in the backward pass. This needs far less memory and
    about a third more time. `attention` stores the results of attention instead of recomputing them, which
    needs less time and more memory than `true`. A number n checkpoints only every n-th block."""
    quantize: Literal["int8", "int4", "float8", "nf4"] | None = None
    """Format to which the linear layers of the frozen blocks are quantized (`int8`, `float8`: torchao; `nf4`:
    bitsandbytes; `int4`: built in). Adapters only."""
    layerwise_casting: Literal["float8", "bfloat16"] | None = None
    """Type in which the frozen base model is stored. Each layer is cast to the run's precision while it
    computes. Adapters only."""
    offload: list[Literal["blocks", "activations"]] = []
    """Keep tensors in host memory, and copy them to the GPU before they are needed: `blocks` (frozen weights
    of the transformer blocks; adapters only), `activations` (inputs of the blocks and stored results of
    attention, for the backward pass), or `all` for both. Needs gradient checkpointing."""
    blocks_to_swap: int | None = Field(default=None, ge=1)
    """Number of blocks whose frozen weights are offloaded; implies `offload: blocks`. Default with
    `offload: blocks`: all."""
    offload_optimizer: bool = False
    """Keep the optimizer state in CPU memory and run the optimizer step there (`adamw` on CUDA only)."""

    @field_validator("offload", mode="before")
    @classmethod
    def _several(cls, value: Any) -> Any:
        if value == "all":
            return ["blocks", "activations"]
        return [value] if isinstance(value, str) else value

    @property
    def offloads_blocks(self) -> bool:
        """True if frozen weights of blocks are kept in host memory."""
        return "blocks" in self.offload or self.blocks_to_swap is not None


class Runtime(Section):
    """Device, precision and processes. These settings change the result only by rounding."""

    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    """Device to train on. `auto`: CUDA if available, else Apple MPS, else CPU."""
    precision: Literal["auto", "bfloat16", "float32"] = "auto"
    """Precision of the frozen base model and its activations; adapters, losses and optimizer state are
    float32. `auto`: bfloat16 on CUDA, else float32."""
    world_size: int | None = Field(default=None, ge=1)
    """Number of processes that this recipe requires; a launch with another number is an error. Default: any
    number."""
    rank_timeout: float = Field(default=300, gt=0)
    """Seconds after which a process that does not respond counts as stopped, and the other processes end. At
    the start, processes wait for each other this long, but at least 60 s."""
    workers: int = Field(default=2, ge=0)
    """Number of threads that decode clips while the cache is filled."""
    compile: bool = False
    """Compile the repeated blocks with torch.compile: faster steps, but minutes of compilation at the start
    and again at the second clip shape."""
    parallel: Literal["ddp", "fsdp", "zero2", "zero3"] = "ddp"
    """Parallelism over several processes. `ddp`: each process holds all weights. `fsdp` (FSDP2): weights,
    gradients and optimizer state are sharded. `zero3` (DeepSpeed): the same as `fsdp`. `zero2` (DeepSpeed):
    only gradients and optimizer state are sharded."""
    shard_size: int | None = Field(default=None, ge=2)
    """Number of processes over which `fsdp` shards; it must divide the number of processes. Each group of
    this size holds a complete copy (HSDP), so that weights are gathered within a machine. Default: all
    processes."""
    sequence: int = Field(default=1, ge=1)
    """Number of processes that share the tokens of each sample (Ulysses sequence parallelism), for clips
    whose activations do not fit on one GPU. It must divide the number of processes and the model's attention
    heads."""
