#!/usr/bin/env bash
# Several machines, the same line on each, the first one's name and a free port in it:
#     recipes/launch/torchrun-nodes.sh 2 FIRST:29500 8 RECIPE [SECTION.KEY=VALUE]...      (2 machines of 8 GPUs)
# The run folder, the cache and the clips lie on a file system that all of them share.
set -euo pipefail
machines=$1 first=$2 processes=$3
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=600  # seconds that Ctrl-C leaves for saving; torchrun's own 30 are too few
exec torchrun --nnodes "$machines" --nproc-per-node "$processes" --rdzv-backend c10d --rdzv-id inlaid \
    --rdzv-endpoint "$first" -m inlaid train "${@:4}"
