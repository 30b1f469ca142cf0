#!/usr/bin/env bash
# One machine, several GPUs:    recipes/launch/torchrun.sh 4 RECIPE [SECTION.KEY=VALUE]...
# By default every process holds the whole model; runtime.parallel=fsdp (or zero2, zero3) shards it.
# N processes are equivalent to one process with N times the train.accumulate.
set -euo pipefail
processes=$1
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=600  # seconds to save after Ctrl-C; torchrun's default of 30 is too short
exec torchrun --standalone --nproc-per-node "$processes" -m inlaid train "${@:2}"
