#!/usr/bin/env bash
# Several machines: run the same command on each, with the first machine's host name and a free port:
#     recipes/launch/torchrun-nodes.sh 2 FIRST:29500 8 RECIPE [SECTION.KEY=VALUE]...      (2 machines of 8 GPUs)
# The run folder, the cache and the clips must be on a file system shared by all machines.
set -euo pipefail
machines=$1 first=$2 processes=$3
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=600  # seconds to save after Ctrl-C; torchrun's default of 30 is too short
exec torchrun --nnodes "$machines" --nproc-per-node "$processes" --rdzv-backend c10d --rdzv-id inlaid \
    --rdzv-endpoint "$first" -m inlaid train "${@:4}"
