#!/bin/bash
# One of several machines that train together; start it on each: docs/clusters/torchrun.sh OPTIONS OF shufflenet train
#
#   JOB       the job's name, the same on all machines and in every attempt
#   NODES     how many machines
#   FIRST     address of the first machine, with a free port: 10.0.0.1:29500
#   PER_NODE  processes on this machine: its GPUs, or 1
#
# No folder is shared, and only the first process needs to reach MLflow. What was tried is said in docs/clusters.md.

set -eu
exec torchrun \
    --nnodes "$NODES" --nproc-per-node "${PER_NODE:-1}" --max-restarts 3 \
    --rdzv-backend c10d --rdzv-endpoint "$FIRST" --rdzv-id "$JOB" \
    -m shufflenet_mlflow train --job "$JOB" "$@"
