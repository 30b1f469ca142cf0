"""Training loop.

The sample order, the noise and the timesteps depend only on the seed and the micro-batch index. A killed run
therefore resumes bit-identically from its last checkpoint. For the same reason, N processes compute the same
result as one process with gradient accumulation over N micro-batches.
"""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import torch

from inlaid import config as recipe
from inlaid.console import progress
from inlaid.data.batch import stable_hash
from inlaid.runs.folder import open_run
from inlaid.runs.launch import Interrupt, start_processes
from inlaid.training.job import prepare


def train(config: recipe.Config) -> Path:
    """Train as the recipe specifies: fill the cache, train, validate, generate samples and write checkpoints.

    If the run folder contains a checkpoint, training resumes from it.

    Args:
        config: the recipe.

    Returns:
        The run folder.

    Raises:
        ValueError: for any problem that the user can fix.
        KeyboardInterrupt: after Ctrl-C, SIGTERM or SIGHUP, once the checkpoint is written.
    """
    with start_processes(config) as ctx, open_run(config, ctx) as run:
        job = prepare(config, ctx, run)
        t, plan, meters = config.train, job.schedule, job.meters
        with (
            Interrupt() as interrupt,
            closing(job.loader.stream(job.start, plan.steps, ctx)) as batches,
            progress("train", plan.steps, "step", show=ctx.main, done=job.start) as advance,
        ):
            for step in range(job.start + 1, plan.steps + 1):
                for i in range(t.accumulate):
                    index, batch = next(batches)
                    torch.manual_seed(stable_hash(config.seed, "dropout", index))
                    generator = torch.Generator().manual_seed(stable_hash(config.seed, "noise", index))
                    out = job.step(job.network, batch.to(ctx.device), generator)
                    job.strategy.backward(out["loss"] / t.accumulate, last=i + 1 == t.accumulate)
                    meters.add(step, out, batch.names)
                meters.norm(step, job.update(step))
                last = step == plan.steps
                stop = (
                    step % t.log_every == 0 and any(ctx.gather(interrupt.wanted))
                    if ctx.world > 1
                    else interrupt.wanted
                )
                note = None
                if step % t.log_every == 0 or plan.saves(step) or last or stop:
                    meters.check()
                    line = meters.flush(step, learning_rate=job.rate(step))
                    note = f"loss {line['loss']:.4f}"
                if plan.validates(step) or last:
                    job.validate(step)
                if plan.samples(step):
                    job.sample(step)
                if plan.saves(step) or last or stop:
                    job.save(step, final=last or stop)
                advance(note=note)
                if stop and not last:
                    raise KeyboardInterrupt(
                        f"stopped after step {step}; run the same command again to resume"
                    )
        if job.start >= plan.steps:
            job.complete()
    return run.folder
