"""Training: loop, job, loader, steps, optimizers, memory, parallelism, checkpoints, metrics."""
