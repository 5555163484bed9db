#!/bin/bash
# Training on several machines; run this on each: docs/clusters/torchrun.sh OPTIONS OF shufflenet train
#
#   JOB       the job's name, the same on all machines and in every attempt
#   NODES     number of machines
#   FIRST     address of the first machine and a free port on it: 10.0.0.1:29500
#   PER_NODE  processes on this machine: its GPUs, or 1
#
# No folder is shared, and only the first process must reach MLflow. docs/clusters.md says what was tested.

set -eu
exec torchrun \
    --nnodes "$NODES" --nproc-per-node "${PER_NODE:-1}" --max-restarts 3 \
    --rdzv-backend c10d --rdzv-endpoint "$FIRST" --rdzv-id "$JOB" \
    -m shufflenet_mlflow train --job "$JOB" "$@"
