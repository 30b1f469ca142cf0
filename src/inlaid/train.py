"""Training: job preparation and the training loop.

The order of samples, the noise and the noise levels are functions of (seed, index of the micro-batch). A
killed run therefore resumes bit-identically from its last checkpoint, and N processes do the same as one
process with gradient accumulation N.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from inlaid import (
    CallableModule,
    alpha,
    cache,
    data,
    families,
    generate,
    mediums,
    memory,
    parallel,
    runtime,
    steps,
    tuners,
)
from inlaid import config as recipe
from inlaid.console import once, progress, say
from inlaid.runtime import Context, Run
from inlaid.steps import Batch, Step, stable_hash

HELD_OUT_AT_MOST = 16
"""Maximum number of validation clips measured each time."""


def train(config: recipe.Config) -> Path:
    """Fill the cache, train, validate and sample; resumes an interrupted run.

    Args:
        config: the recipe.

    Returns:
        The run folder.

    Raises:
        ValueError: for every mistake that the user can fix.
        KeyboardInterrupt: after Ctrl-C or SIGTERM, once the checkpoint is written.
    """
    with runtime.start(config) as ctx:
        job = prepare(config, ctx)
        t, meters = config.train, job.meters
        with (
            runtime.Interrupt() as interrupt,
            closing(job.loader.stream(job.start, t.steps, ctx)) as batches,
            progress("train", t.steps, "step", show=ctx.main, done=job.start) as advance,
        ):
            for step in range(job.start + 1, t.steps + 1):
                for i in range(t.accumulate):
                    index, batch = next(batches)
                    torch.manual_seed(stable_hash(config.seed, "dropout", index))
                    generator = torch.Generator().manual_seed(stable_hash(config.seed, "noise", index))
                    out = job.step(job.network, batch.to(ctx.device), generator)
                    job.strategy.backward(out["loss"] / t.accumulate, last=i + 1 == t.accumulate)
                    meters.add(step, out, batch.names)
                meters.norm(step, job.update(step))
                last = step == t.steps
                stop = (
                    step % t.log_every == 0 and any(ctx.gather(interrupt.wanted))
                    if ctx.world > 1
                    else interrupt.wanted
                )
                note = None
                if step % t.log_every == 0 or step % t.save_every == 0 or last or stop:
                    meters.check()
                    line = meters.flush(step, learning_rate=job.rate(step))
                    note = f"loss {line['loss']:.4f}"
                if step % t.validate_every == 0 or last:
                    job.validate(step)
                if config.sample.every and step % config.sample.every == 0:
                    job.sample(step)
                if step % t.save_every == 0 or last or stop:
                    job.save(step, final=last or stop)
                advance(note=note)
                if stop and not last:
                    raise KeyboardInterrupt(
                        f"stopped after step {step}; run the same command again to resume"
                    )
    return job.run.folder


@dataclass
class Loader:
    """Random access to the micro-batches of a run by index."""

    family: families.Family
    store: cache.Cache
    windows: Sequence[data.Window]
    media: Sequence[str]
    text: Sequence[str]
    empty: str
    sampler: data.BucketSampler
    dropout: float
    seed: int

    def batch(self, k: int) -> Batch:
        """Read micro-batch k."""
        rows = self.sampler.batch(k)
        drop = torch.rand(
            len(rows), generator=torch.Generator().manual_seed(stable_hash(self.seed, "caption", k))
        )
        texts = [
            self.empty if d < self.dropout else self.text[r] for r, d in zip(rows, drop.tolist(), strict=True)
        ]
        clips = [self.store.read("media", self.media[r]) for r in rows]
        names = [self.windows[r].clip.name for r in rows]
        words = [self.store.read("text", n) for n in texts]
        batch = Batch.of(self.family, clips, words, names, self.seed, k)
        kept = [self.preserve[self.windows[r].clip.source] for r in rows]
        return replace(batch, preserve=torch.tensor(kept)) if any(kept) else batch

    def stream(self, start: int, steps: int, ctx: Context) -> Generator[tuple[int, Batch], None, None]:
        """Yield the micro-batches of this process from step `start` on, prefetching one."""
        total = self.per_step
        indices = [
            k for s in range(start, steps) for k in range(s * total + ctx.rank, (s + 1) * total, ctx.world)
        ]
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(self.batch, indices[0]) if indices else None
            for index, following in zip(indices, [*indices[1:], None], strict=True):
                assert waiting is not None
                batch = waiting.result()
                waiting = pool.submit(self.batch, following) if following is not None else None
                yield index, batch

    per_step: int = 1
    """Micro-batches per optimizer step over all processes."""
    preserve: Sequence[float] = ()
    """Weight of the prior preservation loss, for each source."""


@dataclass
class Job:
    """State of a run between two steps."""

    config: recipe.Config
    ctx: Context
    run: Run
    family: families.Family
    loader: Loader
    strategy: parallel.Replicated
    denoiser: nn.Module
    network: nn.Module
    parameters: Mapping[str, Tensor]
    optimizer: torch.optim.Optimizer
    step: Step
    held_out: list[Batch]
    prompts: generate.Prompts
    meters: runtime.Meters
    ema: runtime.EMA | None = None
    start: int = 0
    _pipeline: object = field(default=None, init=False)

    def rate(self, step: int) -> float:
        """Return the learning rate of a step."""
        return runtime.rate(self.config.optim, step - 1, self.config.train.steps)

    def averaged(self) -> AbstractContextManager[None]:
        """Return a context in which the EMA replaces the weights, if there is an EMA."""
        return runtime.swapped(self.parameters, self.ema.weights if self.ema else None)

    def update(self, step: int) -> Tensor:
        """Average gradients over processes, clip and apply them; returns their norm, on the device."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate(step)
        norm = self.strategy.step(self.optimizer, list(self.parameters.values()), self.config.optim.clip)
        if self.ema:
            self.ema.update(self.parameters, step)
        return norm

    def validate(self, step: int) -> None:
        """Measure and write the validation metrics, such as the loss at fixed noise levels."""
        if not self.held_out:
            return
        n, world = len(self.held_out), self.ctx.world
        mine = range(
            self.ctx.rank, -(-n // world) * world, world
        )  # same number of passes in each process, as sharding needs
        with self.averaged():
            rows = self.step.held_out(self.denoiser, [self.held_out[i % n] for i in mine], self.ctx.device)
        rows = rows[: len(range(self.ctx.rank, n, world))]
        self.meters.write({"step": step, **self.step.summary(self.ctx.total(rows.sum(0)) / n)})
        self.meters.pause()

    def sample(self, step: int) -> None:
        """Generate the sample prompts with the current weights; sharded weights need all processes."""
        if self.ctx.main or self.strategy.sharded:
            if self._pipeline is None:
                self._pipeline = self.family.pipeline(
                    denoiser=self.denoiser, device=self.ctx.device, dtype=self.ctx.precision
                )
            self.denoiser.eval()
            with self.averaged():
                about = {"checkpoint": f"step-{step:06d}", "strength": 1.0}
                generate.draw(
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
        """Write a checkpoint and, at the end, the files for other programs; tensors are never sharded."""
        gather, section, name = self.strategy.gather, self.config.tuner, tuners.folder(self.config.tuner)
        about = {"inlaid_step": str(step), **self.family.about()}
        with self.run.writing(step) if self.ctx.main else nullcontext() as folder:
            with self.averaged():
                weights = gather(tuners.weights(section, self.denoiser))
                if folder is not None:
                    tuners.save(section, self.denoiser, weights, folder / name, metadata=about)
            tensors = {f"weights.{n}": w for n, w in gather(self.parameters).items()}
            tensors |= {f"ema.{n}": w for n, w in gather(self.ema.weights if self.ema else {}).items()}
            state, moments = self.strategy.optimizer_state(self.optimizer)
            tensors |= moments
            if folder is not None:
                values = {"step": step, "per_step": self.loader.per_step, "optimizer": state}
                runtime.save_state(folder, tensors, values)
        if self.ctx.main:
            self.run.keep(self.config.train.keep)
        if final and self.ctx.main:
            with runtime.atomic(self.run.folder / name) as folder:
                shutil.copytree(self.run.checkpoint(str(step)) / name, folder)
                card = generate.card(
                    self.config,
                    self.family,
                    step,
                    self.prompts.texts,
                    getattr(self.step, "objective", None),
                )
                (folder / "README.md").write_text(card, "utf-8")
        self.ctx.barrier()
        self.meters.pause()

    def resume(self) -> None:
        """Load the newest checkpoint, if there is one.

        Raises:
            ValueError: when it is damaged or was written with another number of micro-batches per step.
        """
        found = self.run.checkpoints()
        if not found:
            return
        tensors, values = runtime.load_state(found[-1])
        if values["per_step"] != self.loader.per_step:
            raise ValueError(
                f"{self.run.folder}: was trained with {values['per_step']} micro-batches per step over all "
                f"processes, this launch has {self.loader.per_step}: set train.accumulate so that processes "
                f"x accumulate = {values['per_step']}"
            )
        for key, held in (("weights", self.parameters), ("ema", self.ema.weights if self.ema else {})):
            self.strategy.scatter({n: tensors[f"{key}.{n}"] for n in held}, held)
        self.strategy.load_optimizer(self.optimizer, runtime.unpack(values["optimizer"], tensors))
        self.start = values["step"]
        if self.ctx.main:
            self.run.truncate_metrics(self.start)
        say(f"resuming after step {self.start} ({found[-1]})", show=self.ctx.main)


def prepare(config: recipe.Config, ctx: Context) -> Job:
    """Prepare the job: run folder, cache, network with its tuner, and optimizer.

    Raises:
        ValueError: for every mistake that the user can fix.
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
        if name in runtime.PACKAGES:
            runtime.package(key, name)
    tuners.select(config.tuner, family.targets, family.load_denoiser(torch.float32, meta=True))
    run = open_run(config, ctx)
    clips = build_cache(config, family, run, ctx)
    per_step = config.train.accumulate * ctx.world
    sampler = data.sampler(clips.plan.train, config.data.sources, config.train.batch, config.seed)
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
        [source.preserve for source in config.data.sources],
    )
    held_out = clips.held_out_batches(family)
    say(f"loading {config.model.checkpoint}", show=ctx.main)
    full = config.tuner.kind in ("full", "codec")  # float32 weights, computed under autocast
    denoiser = family.load_denoiser(torch.float32 if full else ctx.precision).train()
    memory.shrink(config.memory, denoiser, strategy.device, ctx.precision)
    if config.memory.gradient_checkpointing:
        memory.checkpoint(denoiser, config.memory.gradient_checkpointing)
    tuners.attach(config.tuner, family.targets, denoiser, seed=stable_hash(config.seed, "tuner"))
    family.attached(denoiser)
    if config.runtime.compile:
        memory.compile_blocks(denoiser)
    parameters = strategy.shard(denoiser)
    count = sum(p.numel() for p in parameters.values())
    say(f"training {len(parameters)} tensors, {count:,} numbers ({config.tuner.kind})", show=ctx.main)
    optimizer = runtime.optimizer(
        ctx.optimizer,
        config.optim,
        list(parameters.values()),
        offload=config.memory.offload_optimizer,
    )
    precision = torch.autocast(
        ctx.device.type, ctx.precision, enabled=full and ctx.precision is not torch.float32
    )
    step = steps.of(config, family, precision, tuners.disabled)
    meters = runtime.Meters(run, ctx, config.train.trackers, json.loads(config.model_dump_json()))
    network, held = strategy.own(denoiser, optimizer, parameters)
    ema = runtime.EMA(config.optim.ema, held) if config.optim.ema else None
    job = Job(
        config,
        ctx,
        run,
        family,
        loader,
        strategy,
        denoiser,
        network,
        held,
        optimizer,
        step,
        held_out,
        clips.prompts,
        meters,
        ema,
    )
    job.resume()
    meters.pause()
    return job


def open_family(config: recipe.Config) -> families.Family:
    """Return the family of a recipe, after checking that it supports everything in the recipe.

    Raises:
        ValueError: with everything that it does not support.
    """
    family = alpha.family(config)
    wrong = family.problems(config)
    if wrong:
        raise ValueError(
            f"{config.model.checkpoint} does not support this recipe:\n" + "\n".join(f"  {w}" for w in wrong)
        )
    for note in family.notes(config):
        once(f"note: {note}")
    return family


def open_run(config: recipe.Config, ctx: Context) -> Run:
    """Create the run folder, or check that the recipe matches the one the run was started with.

    Raises:
        ValueError: when it does not match.
    """
    run = Run(Path(config.run))
    if run.checkpoints():
        differ = runtime.changes(run.config(), config)
        if differ:
            raise ValueError(
                f"{run.folder}: this run was started with another recipe:\n"
                + "\n".join(f"  {d}" for d in differ)
                + "\nrestore these values to resume, or choose another folder (run=...)"
            )
    if ctx.main:
        try:
            run.folder.mkdir(parents=True, exist_ok=True)
            recipe.save(config, run.folder / "config.yaml")
        except OSError as error:
            raise ValueError(
                f"{run.folder}: the run folder cannot be written ({error.strerror}); choose another folder "
                "(run=...), or free disk space"
            ) from None
        (run.folder / "environment.json").write_text(json.dumps(runtime.environment(), indent=2), "utf-8")
    ctx.barrier()
    return run


@dataclass(frozen=True)
class Clips:
    """Dataset of a run, fully cached: names of cached items for each window of the plan."""

    plan: data.Plan
    store: cache.Cache
    media: Sequence[str]
    text: Sequence[str]
    held_out_media: Sequence[str]
    held_out_text: Sequence[str]
    empty: str
    prompts: generate.Prompts
    built: cache.Built

    def held_out_batches(self, family: families.Family) -> list[Batch]:
        """Return the first validation clips, one per batch, on which the validation loss is measured."""
        rows = zip(self.plan.held_out, self.held_out_media, self.held_out_text, strict=True)
        return [
            Batch.of(
                family,
                [self.store.read("media", m)],
                [self.store.read("text", t)],
                [w.clip.name],
                w.clip.name,
            )
            for w, m, t in list(rows)[:HELD_OUT_AT_MOST]
        ]


def build_cache(config: recipe.Config, family: families.Family, run: Run, ctx: Context) -> Clips:
    """Plan the dataset and encode what is not cached: clips, captions, empty caption and sample prompts.

    Raises:
        ValueError: when clips have errors and the recipe says to stop.
    """
    store = cache.Cache(run.cache(config))
    medium = mediums.of(family.medium)
    with progress("look", 1, medium.one, show=ctx.main) as advance:
        look = (store.probe, store.look)
        plan = medium.plan(config, family, lambda n, of: advance(done=n, total=of), *look)
    quarantined = {p.name: f"{p.code}: {p.message}" for p in data.require(plan, config.data.bad_clips)}
    windows = [*plan.train, *plan.held_out]
    names = store.media_names(family, windows)
    dtype = ctx.precision if ctx.device.type == "cuda" else torch.float32
    sample = generate.resolve_sample(config)
    asked = medium.texts(sample.prompts, sample.images) if sample.prompts or sample.images else []
    texts = asked or list(dict.fromkeys(w.caption for w in windows if w.caption))[:4]
    words = list(dict.fromkeys([*(w.words for w in windows), "", sample.negative_prompt, *texts]))
    text_names = dict(zip(words, store.text_names(family, words, dtype), strict=True))
    mine = slice(ctx.rank, None, ctx.world)
    with progress(f"cache {medium.one}s", len(names[mine]), medium.one, show=ctx.main) as advance:
        built = cache.build_media(
            store,
            family,
            windows[mine],
            names[mine],
            device=ctx.device,
            workers=config.runtime.workers,
            advance=advance,
        )
    with progress("cache text", len(words[mine]), "caption", show=ctx.main) as advance:
        cache.build_text(
            store,
            family,
            words[mine],
            list(text_names.values())[mine],
            device=ctx.device,
            dtype=dtype,
            advance=advance,
        )
    if ctx.main:
        store.remember()
    failed = {k: v for part in ctx.gather(built.failed) for k, v in part.items()}
    if failed and config.data.bad_clips == "stop":
        lines = "\n".join(f"  {k}: {v}" for k, v in sorted(failed.items()))
        raise ValueError(
            f"{len(failed)} {medium.one}(s) could not be encoded:\n{lines}\n"
            "fix or remove them, or set data.bad_clips=quarantine; the others are cached"
        )
    if ctx.main and (failed or quarantined):
        listed = {**quarantined, **failed}
        (run.folder / "quarantine.json").write_text(json.dumps(listed, indent=2, ensure_ascii=False), "utf-8")
        where = run.folder / "quarantine.json"
        say(f"excluded {len(listed)} {medium.one}(s) with errors; {where} lists them with the reasons")
    train, held_out = (
        [w for w in part if str(w.clip.path) not in failed] for part in (plan.train, plan.held_out)
    )
    plan = replace(plan, train=train, held_out=held_out)
    if not train:
        raise ValueError(f"no {medium.one} is left to train on: " + "; ".join(failed.values()))
    name_of = dict(zip(windows, names, strict=True))
    images: list[list[generate.Picture]] = []
    if family.images and sample.size and sample.frames:
        first = {w.caption: w for w in reversed([*train, *held_out]) if not w.clip.embedding}
        texts = asked or [t for t in texts if t in first]
        each: Sequence[generate.Images] = sample.images or [first[t] for t in texts]
        images = [medium.read(family, e, sample) for e in each]
    if sample.every and not texts:
        raise ValueError("sample.every: precomputed latents provide no prompts; set sample.prompts")
    return Clips(
        plan,
        store,
        [name_of[w] for w in plan.train],
        [text_names[w.words] for w in plan.train],
        [name_of[w] for w in plan.held_out],
        [text_names[w.words] for w in plan.held_out],
        text_names[""],
        generate.Prompts(
            texts,
            [store.read("text", text_names[t]) for t in texts],
            store.read("text", text_names[sample.negative_prompt]),
            sample,
            config.data.fps or family.fps,
            images,
        ),
        built,
    )


sys.modules[__name__].__class__ = CallableModule
