"""A training job: the state of a run, and its preparation from a recipe."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from inlaid import config as recipe
from inlaid import families
from inlaid.alpha.opening import open_family
from inlaid.console import say
from inlaid.data.batch import Batch, stable_hash
from inlaid.data.prepare import build_cache
from inlaid.data.prompts import Prompts
from inlaid.data.sampler import make_sampler
from inlaid.files import atomic
from inlaid.generation.generate import generate_samples
from inlaid.networks import quantize
from inlaid.runs.folder import Run, open_run
from inlaid.runs.launch import Context
from inlaid.runs.packages import PACKAGES, require_package
from inlaid.training import memory, parallel
from inlaid.training.cautions import cautions
from inlaid.training.checkpoints import load_state, save_state, unpack_state
from inlaid.training.loader import Loader
from inlaid.training.meters import Meters
from inlaid.training.optim import EMA, learning_rate, make_optimizer, swapped
from inlaid.training.parallel import Replicated
from inlaid.training.steps import Step
from inlaid.training.trained import Trained, trained_by


@dataclass
class Job:
    """State of a run between two steps, with the operations of the training loop."""

    config: recipe.Config
    ctx: Context
    run: Run
    family: families.Family
    trained: Trained
    loader: Loader
    strategy: Replicated
    denoiser: nn.Module
    network: nn.Module
    parameters: Mapping[str, Tensor]
    optimizer: torch.optim.Optimizer
    step: Step
    validation: list[Batch]
    prompts: Prompts
    meters: Meters
    ema: EMA | None = None
    start: int = 0
    _pipeline: object = field(default=None, init=False)

    def rate(self, step: int) -> float:
        """Return the learning rate of a step, counted from 1."""
        return learning_rate(self.config.optim, step - 1, self.config.train.steps)

    def averaged(self) -> AbstractContextManager[None]:
        """Return a context in which the EMA replaces the weights, if there is an EMA."""
        return swapped(self.parameters, self.ema.weights if self.ema else None)

    def update(self, step: int) -> Tensor:
        """Run one optimizer step and update the EMA.

        Gradients are averaged over processes and clipped.

        Returns:
            Gradient norm before clipping, on the device.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate(step)
        norm = self.strategy.step(self.optimizer, list(self.parameters.values()), self.config.optim.clip)
        if self.ema:
            self.ema.update(self.parameters, step)
        return norm

    def validate(self, step: int) -> None:
        """Compute and write the validation metrics, with the EMA weights if there is an EMA."""
        if not self.validation:
            return
        n, world = len(self.validation), self.ctx.world
        mine = range(
            self.ctx.rank, -(-n // world) * world, world
        )  # sharded weights need the same number of passes in each process
        with self.averaged():
            rows = self.step.validation(
                self.denoiser, [self.validation[i % n] for i in mine], self.ctx.device
            )
        rows = rows[: len(range(self.ctx.rank, n, world))]
        self.meters.write({"step": step, **self.step.summary(self.ctx.total(rows.sum(0)) / n)})
        self.meters.pause()

    def sample(self, step: int) -> None:
        """Generate from the sample prompts, with the EMA weights if there is an EMA.

        Only the main process generates, except with sharded weights, which need all processes.
        """
        if self.ctx.main or self.strategy.sharded:
            if self._pipeline is None:
                self._pipeline = self.family.pipeline(
                    denoiser=self.denoiser, device=self.ctx.device, dtype=self.ctx.precision
                )
            self.denoiser.eval()
            with self.averaged():
                about = {"checkpoint": f"step-{step:06d}", "strength": 1.0}
                generate_samples(
                    self.family,
                    self._pipeline,
                    self.prompts,
                    self.run.folder / "samples" / f"step-{step:06d}" if self.ctx.main else None,
                    about,
                    show=False,
                )
            self.denoiser.train()
        self.ctx.barrier()
        self.meters.pause()

    def save(self, step: int, *, final: bool) -> None:
        """Write a checkpoint of whole (unsharded) tensors; if `final`, also the folder of trained weights."""
        gather, trained, name = self.strategy.gather, self.trained, self.trained.folder
        about = {"inlaid_step": str(step), **self.family.about()}
        with self.run.writing(step) if self.ctx.main else nullcontext() as folder:
            with self.averaged():
                weights = gather(trained.weights(self.denoiser))
                if folder is not None:
                    trained.save(self.denoiser, weights, folder / name, metadata=about)
            tensors = {f"weights.{n}": w for n, w in gather(self.parameters).items()}
            tensors |= {f"ema.{n}": w for n, w in gather(self.ema.weights if self.ema else {}).items()}
            state, moments = self.strategy.optimizer_state(self.optimizer)
            tensors |= moments
            if folder is not None:
                values = {"step": step, "per_step": self.loader.per_step, "optimizer": state}
                save_state(folder, tensors, values)
        if self.ctx.main:
            self.run.keep(self.config.train.keep)
        if final and self.ctx.main:
            with atomic(self.run.folder / name) as folder:
                shutil.copytree(self.run.checkpoint(str(step)) / name, folder)
                (folder / "README.md").write_text(trained.card(step, self.prompts.texts), "utf-8")
        self.ctx.barrier()
        self.meters.pause()

    def resume(self) -> None:
        """Load the newest checkpoint, if there is one.

        Raises:
            ValueError: if the checkpoint is damaged, or has another number of micro-batches per step.
        """
        found = self.run.checkpoints()
        if not found:
            return
        tensors, values = load_state(found[-1])
        if values["per_step"] != self.loader.per_step:
            raise ValueError(
                f"{self.run.folder}: was trained with {values['per_step']} micro-batches per step over all "
                f"processes, this launch has {self.loader.per_step}: set train.accumulate so that processes "
                f"x accumulate = {values['per_step']}"
            )
        for key, held in (("weights", self.parameters), ("ema", self.ema.weights if self.ema else {})):
            self.strategy.scatter({n: tensors[f"{key}.{n}"] for n in held}, held)
        self.strategy.load_optimizer(self.optimizer, unpack_state(values["optimizer"], tensors))
        self.start = values["step"]
        if self.ctx.main:
            self.run.truncate_metrics(self.start)
        say(f"resuming after step {self.start} ({found[-1]})", show=self.ctx.main)


def prepare(config: recipe.Config, ctx: Context) -> Job:
    """Prepare the job of a recipe: run folder, cache, network with trainable weights, and optimizer.

    Raises:
        ValueError: for any problem the user can fix.
    """
    for note in ctx.notes:
        say(f"note: {note}", show=ctx.main)
    strategy, family = parallel.strategy(config, ctx), open_family(config)
    wrong = memory.problems(config, ctx.device, ctx.precision)
    if wrong:
        raise ValueError("this device does not support this recipe:\n" + "\n".join(f"  {w}" for w in wrong))
    named = [("optim.name", ctx.optimizer), *(("train.trackers", name) for name in config.train.trackers)]
    named.append(("memory.quantize", config.memory.quantize or ""))
    for key, name in named:  # fail before the cache is filled, not after
        if name in PACKAGES:
            require_package(key, name)
    trained = trained_by(config, family)
    meta = family.load_denoiser(torch.float32, meta=True)
    for caution in cautions(config, meta, trained.select(meta)):
        say(f"warning: {caution}", show=ctx.main)
    run = open_run(config, ctx)
    clips = build_cache(config, family, run, ctx)
    per_step = config.train.accumulate * ctx.world
    sampler = make_sampler(clips.plan.train, config.data.sources, config.train.batch, config.seed)
    loader = Loader(
        family,
        clips.store,
        clips.plan.train,
        clips.media,
        clips.text,
        clips.empty,
        sampler,
        config.data.caption_dropout,
        config.seed,
        per_step,
        [source.prior_preservation for source in config.data.sources],
    )
    validation = clips.validation_batches(family)
    say(f"loading {config.model.checkpoint}", show=ctx.main)
    denoiser = family.load_denoiser(torch.float32 if trained.autocast else ctx.precision).train()
    quantize.shrink_weights(config.memory, denoiser, strategy.device, ctx.precision)
    if config.memory.gradient_checkpointing:
        memory.enable_checkpointing(denoiser, config.memory.gradient_checkpointing)
    trained.attach(denoiser, seed=stable_hash(config.seed, "tuner"))
    if config.runtime.compile:
        memory.compile_blocks(denoiser)
    parameters = strategy.shard(denoiser)
    count = sum(p.numel() for p in parameters.values())
    say(f"training {len(parameters)} tensors, {count:,} numbers ({trained.name})", show=ctx.main)
    optimizer = make_optimizer(
        ctx.optimizer,
        config.optim,
        list(parameters.values()),
        offload=config.memory.offload_optimizer,
    )
    precision = torch.autocast(
        ctx.device.type, ctx.precision, enabled=trained.autocast and ctx.precision is not torch.float32
    )
    meters = Meters(run, ctx, config.train.trackers, json.loads(config.model_dump_json()))
    network, held = strategy.own(denoiser, optimizer, parameters)
    ema = EMA(config.optim.ema, held) if config.optim.ema else None
    job = Job(
        config,
        ctx,
        run,
        family,
        trained,
        loader,
        strategy,
        denoiser,
        network,
        held,
        optimizer,
        trained.step(precision),
        validation,
        clips.prompts,
        meters,
        ema,
    )
    job.resume()
    meters.pause()
    return job
