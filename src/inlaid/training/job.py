"""Training job: the state of a run in memory, and functions that prepare it from a recipe."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from inlaid import config as recipe
from inlaid import families
from inlaid.alpha.opening import open_family
from inlaid.console import say
from inlaid.data.batch import Batch, stable_hash
from inlaid.data.cache import Cache
from inlaid.data.plan import Plan
from inlaid.data.prepare import build_cache
from inlaid.data.prompts import Prompts
from inlaid.data.sampler import make_sampler
from inlaid.files import atomic, sha256
from inlaid.generation.generate import generate_samples
from inlaid.networks import quantize
from inlaid.runs.folder import Run, read_metrics
from inlaid.runs.launch import Context
from inlaid.runs.packages import PACKAGES, require_package
from inlaid.training import memory, offload, parallel
from inlaid.training.cautions import cautions, length_cautions
from inlaid.training.checkpoints import load_fingerprint, load_tensors, save_state, unpack_state, verify
from inlaid.training.fingerprint import Fingerprint, differences, fingerprint
from inlaid.training.loader import Loader
from inlaid.training.meters import Meters
from inlaid.training.optim import EMA, learning_rate, make_optimizer, swapped
from inlaid.training.parallel import Replicated
from inlaid.training.schedule import Schedule, make_schedule
from inlaid.training.steps import Step
from inlaid.training.trained import Trained, trained_by


@dataclass
class Job:
    """State of a training run in memory, with the operations that the training loop calls."""

    config: recipe.Config
    ctx: Context
    run: Run
    family: families.Family
    trained: Trained
    loader: Loader
    schedule: Schedule
    strategy: Replicated
    denoiser: nn.Module
    network: nn.Module
    parameters: Mapping[str, Tensor]
    optimizer: torch.optim.Optimizer
    step: Step
    validation: list[Batch]
    prompts: Prompts
    meters: Meters
    data: Fingerprint
    ema: EMA | None = None
    start: int = 0
    _pipeline: object = field(default=None, init=False)

    def rate(self, step: int) -> float:
        """Return the learning rate of an optimizer step; the first step is 1."""
        return learning_rate(self.config.optim, step - 1, self.schedule.steps)

    def averaged(self) -> AbstractContextManager[None]:
        """Return a context manager that swaps in the EMA weights; without an EMA, it does nothing."""
        return swapped(self.parameters, self.ema.weights if self.ema else None)

    def update(self, step: int) -> Tensor:
        """Run one optimizer step and update the EMA.

        Gradients are averaged over processes and clipped.

        Returns:
            Gradient norm before clipping, as a tensor on the device.
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
        n, (group, groups) = len(self.validation), self.ctx.share
        mine = range(
            group, -(-n // groups) * groups, groups
        )  # sharded weights need the same number of passes in each process
        with self.averaged():
            rows = self.step.validation(
                self.denoiser, [self.validation[i % n] for i in mine], self.ctx.device
            )
        rows = rows[: len(range(group, n, groups))]
        mean = self.ctx.total(rows.sum(0)) / (n * self.ctx.sequence)
        self.meters.write({"step": step, **self.step.summary(mean)})
        self.meters.pause()

    def sample(self, step: int) -> None:
        """Generate samples from the sample prompts, with the EMA weights if there is an EMA.

        All processes take part if weights are sharded, or if processes share a sequence (sequence
        parallelism). Otherwise, only the main process generates.
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
            memory.trim()
        self.ctx.barrier()
        self.meters.pause()

    def save(self, step: int, *, final: bool) -> None:
        """Write a checkpoint with unsharded tensors.

        If `final`, the trained weights are also copied to the run folder.
        """
        gather, trained, name = self.strategy.gather, self.trained, self.trained.folder
        about = {"inlaid_step": str(step), **self.family.about()}
        self.meters.sync()  # a checkpoint at step n means that the metrics up to step n are on the disk
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
                save_state(folder, tensors, values, self.data)
        if self.ctx.main:
            self.run.keep(self.config.train.keep)
        if final and self.ctx.main:
            self.publish(step)
        self.ctx.barrier()
        self.meters.pause()

    def publish(self, step: int) -> None:
        """Copy the trained weights from the checkpoint of `step` to the run folder, and add a model card."""
        name = self.trained.folder
        with atomic(self.run.folder / name) as folder:
            shutil.copytree(self.run.checkpoint(str(step)) / name, folder)
            (folder / "README.md").write_text(self.trained.card(step, self.prompts.texts), "utf-8")

    def complete(self) -> None:
        """Create the missing outputs of a run that has already reached its last step.

        Outputs are missing if the run was killed or if files were deleted. Missing validation metrics and
        samples of the last step are created if the recipe requires them. The trained weights in the run
        folder are replaced if they differ from the weights in the last checkpoint. Checkpoints in excess of
        `train.keep` are deleted.
        """
        step = self.start
        lacks = [False, False, False]
        if self.ctx.main:
            lines = read_metrics(self.run.metrics)
            made = list((self.run.folder / "samples" / f"step-{step:06d}").glob("*.json"))
            lacks = [
                bool(self.validation)
                and not any(x["step"] == step and "validation_loss" in x for x in lines),
                self.schedule.samples(step) and len(made) < len(self.prompts.texts),
                not published(self.run.folder, self.run.checkpoint(str(step)), self.trained.folder),
            ]
            self.run.keep(self.config.train.keep)
        validation, samples, weights = self.ctx.gather(lacks)[0]
        if validation:
            self.validate(step)
        if samples:
            self.sample(step)
        if weights and self.ctx.main:
            say(f"completing the run: {self.run.folder / self.trained.folder} of step {step}")
            self.publish(step)
        self.ctx.barrier()

    def resume(self, found: Path, values: Mapping[str, Any]) -> None:
        """Restore weights, EMA and optimizer state from the checkpoint `found`.

        Args:
            found: folder of the checkpoint.
            values: result of `verify` for this checkpoint.

        Raises:
            ValueError: if the checkpoint lacks a trained weight, or contains the state of another optimizer.
        """
        tensors = load_tensors(found)
        try:
            for key, held in (("weights", self.parameters), ("ema", self.ema.weights if self.ema else {})):
                self.strategy.scatter({n: tensors[f"{key}.{n}"] for n in held}, held)
            self.strategy.load_optimizer(self.optimizer, unpack_state(values["optimizer"], tensors))
        except (LookupError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(
                f"{found}: this checkpoint does not fit the recipe ({error}); choose another folder (run=...)"
            ) from None
        self.start = values["step"]
        say(f"resuming after step {self.start} ({found})", show=self.ctx.main)


def published(run: Path, checkpoint: Path, name: str) -> bool:
    """Return True if a checkpoint's trained weights have been copied to the run folder.

    This is the case if the folder `name` in the run folder contains a model card, and an identical copy of
    every file in the checkpoint's folder `name`.
    """
    ours = [f for f in (checkpoint / name).rglob("*") if f.is_file()]
    pairs = [(f, run / name / f.relative_to(checkpoint / name)) for f in ours]
    return (run / name / "README.md").is_file() and all(
        b.is_file() and a.stat().st_size == b.stat().st_size and sha256(a) == sha256(b) for a, b in pairs
    )


def resumed_from(config: recipe.Config, ctx: Context, run: Run) -> tuple[Path | None, dict[str, Any]]:
    """Return the newest checkpoint of a run, and the values of its `state.json`.

    If the run has no checkpoint, the result is None and an empty mapping.

    Raises:
        ValueError: if the checkpoint is damaged, or was trained with another number of micro-batches per
            step.
    """
    found = run.checkpoints()
    if not found:
        return None, {}
    values, per_step = verify(found[-1]), config.train.accumulate * ctx.share[1]
    if values["per_step"] != per_step:
        shared = f" / {ctx.sequence} (runtime.sequence)" if ctx.sequence > 1 else ""
        raise ValueError(
            f"{run.folder}: was trained with {values['per_step']} micro-batches per step over all "
            f"processes, this launch has {per_step}: set train.accumulate so that processes{shared} "
            f"x accumulate = {values['per_step']}"
        )
    return found[-1], values


def check_data(
    config: recipe.Config, checkpoint: Path | None, now: Fingerprint, *, encoded: bool = True
) -> None:
    """Compare the current data of a run with the data that its checkpoint was trained on.

    Args:
        config: recipe of the run.
        checkpoint: folder of the checkpoint from which the run resumes; None for a new run.
        now: fingerprint of the current data.
        encoded: False if the clips have not been encoded yet, so that `now` may contain clips that cannot be
            encoded.

    Raises:
        ValueError: if the data differ and `train.accept_changed_data` is false.
    """
    lines = differences(load_fingerprint(checkpoint), now, encoded=encoded) if checkpoint else []
    if not lines or not checkpoint:
        return
    text = "\n".join(f"  {line}" for line in lines)
    if config.train.accept_changed_data:
        say(f"note: the data have changed since {checkpoint.name}:\n{text}")
        return
    raise ValueError(
        f"{config.run}: the data have changed since {checkpoint.name}, from which the run resumes:\n{text}\n"
        "restore them, choose another folder (run=...), or set train.accept_changed_data=true to go on with "
        "the changed data"
    )


def prepare(config: recipe.Config, ctx: Context, run: Run) -> Job:
    """Prepare a training job: fill the cache, load the network, and create the optimizer.

    The recipe, the checkpoint and the data are checked before anything is written to the run folder. After
    encoding, the data are checked again without the clips that could not be encoded.

    Args:
        config: the recipe.
        ctx: device and rank of this process.
        run: run folder, from `open_run`.

    Raises:
        ValueError: for any problem that the user can fix.
    """
    for note in ctx.notes:
        say(f"note: {note}", show=ctx.main)
    strategy, family = parallel.strategy(config, ctx), open_family(config)
    trained = check_recipe(config, ctx, family)
    resumed, values = resumed_from(config, ctx, run)
    sources, planned = config.data.sources, {}

    def begin(plan: Plan, store: Cache) -> None:
        planned.update(fingerprint(plan, store, sources))
        check_data(config, resumed, planned, encoded=False)
        run.begin(config, ctx)

    clips = build_cache(config, family, run, ctx, begin)
    data = fingerprint(clips.plan, clips.store, sources, planned)
    check_data(config, resumed, data)
    sampler = make_sampler(clips.plan.train, sources, config.train.batch, config.seed)
    schedule = make_schedule(config, len(sampler), config.train.accumulate * ctx.world)
    if config.train.epochs is not None:
        say(f"training {config.train.epochs:g} epochs: {schedule.steps:,} steps", show=ctx.main)
    for caution in length_cautions(config, schedule.steps):
        say(f"warning: {caution}", show=ctx.main)
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
        config.train.accumulate * ctx.share[1],
        [source.prior_preservation for source in sources],
    )
    validation = clips.validation_batches(family)
    say(f"loading {config.model.checkpoint}", show=ctx.main)
    denoiser = family.load_denoiser(torch.float32 if trained.autocast else ctx.precision).train()
    away = offload.offloaded(config.memory, denoiser)
    quantize.shrink_weights(config.memory, denoiser, strategy.device, ctx.precision, host=away)
    trained.attach(denoiser, seed=stable_hash(config.seed, "tuner"))
    _, store = offload.offload(config.memory, denoiser, ctx.device, show=ctx.main)
    if config.memory.gradient_checkpointing:
        memory.enable_checkpointing(denoiser, config.memory.gradient_checkpointing, store)
    strategy.split_sequence(family, denoiser)
    if config.runtime.compile:
        memory.compile_blocks(denoiser)
    parameters = strategy.shard(denoiser)
    count = sum(p.numel() for p in parameters.values())
    say(f"training {len(parameters)} tensors, {count:,} parameters ({trained.name})", show=ctx.main)
    optimizer = make_optimizer(
        ctx.optimizer,
        config.optim,
        list(parameters.values()),
        offload=config.memory.offload_optimizer,
    )
    precision = torch.autocast(
        ctx.device.type, ctx.precision, enabled=trained.autocast and ctx.precision is not torch.float32
    )
    start = values.get("step", 0)
    if ctx.main:
        run.truncate_metrics(start)
    meters = Meters(run, ctx, config.train.trackers, json.loads(config.model_dump_json()), start)
    network, held = strategy.own(denoiser, optimizer, parameters)
    ema = EMA(config.optim.ema, held) if config.optim.ema else None
    step = trained.step(precision)
    job = Job(config, ctx, run, family, trained, loader, schedule, strategy, denoiser, network, held,
              optimizer, step, validation, clips.prompts, meters, data, ema)  # fmt: skip
    if resumed:
        job.resume(resumed, values)
    meters.pause()
    return job


def check_recipe(config: recipe.Config, ctx: Context, family: families.Family) -> Trained:
    """Check a recipe without reading its data, and return the interface to the trained weights.

    Raises:
        ValueError: if the device does not support the recipe, a required package is missing, or a pattern in
            `tuner.targets` matches nothing.
    """
    wrong = memory.problems(config, ctx.device, ctx.precision)
    if wrong:
        raise ValueError("this device does not support this recipe:\n" + "\n".join(f"  {w}" for w in wrong))
    named = [("optim.name", ctx.optimizer), *(("train.trackers", name) for name in config.train.trackers)]
    named.append(("memory.quantize", config.memory.quantize or ""))
    for key, name in named:
        if name in PACKAGES:
            require_package(key, name)
    trained, network = trained_by(config, family), family.load_denoiser(torch.float32, meta=True)
    wrong = offload.problems(config.memory, network) or offload.check_host(
        config.memory, network, ctx.precision, ctx
    )
    if wrong:
        raise ValueError("\n".join(wrong))
    for caution in cautions(config, network, trained.select(network)):
        say(f"warning: {caution}", show=ctx.main)
    return trained
