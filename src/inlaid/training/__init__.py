"""Training: loop, data loading, losses, optimizers, memory options, parallelism, checkpoints, metrics."""
