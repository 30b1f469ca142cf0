#!/usr/bin/env bash
# One machine, several GPUs:    recipes/launch/torchrun.sh 4 RECIPE [SECTION.KEY=VALUE]...
# Every process holds the whole network; runtime.parallel=fsdp (or zero2, zero3) has them share it instead.
# N processes do what one does with train.accumulate N times as high.
set -euo pipefail
processes=$1
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=600  # seconds that Ctrl-C leaves for saving; torchrun's own 30 are too few
exec torchrun --standalone --nproc-per-node "$processes" -m inlaid train "${@:2}"
