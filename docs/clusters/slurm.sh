#!/bin/bash
# A training job that survives its time limit: sbatch docs/clusters/slurm.sh OPTIONS OF shufflenet train
# Set the three lines below; the rest follows from them. docs/clusters.md says what was tested.
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=2
#SBATCH --time=04:00:00
#
#SBATCH --job-name=shufflenet
#SBATCH --cpus-per-task=1
#SBATCH --signal=USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
# For GPUs, one per task: #SBATCH --gpus-per-node=2

set -u
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1}
export MASTER_ADDR MASTER_PORT OMP_NUM_THREADS
# export MLFLOW_TRACKING_URI=https://mlflow.example.org

# One process per task. Slurm's warning reaches all of them: they agree on an iteration; the first one saves it, delivers
# it to MLflow, and asks for the requeue. The job's number names the run for every attempt.
srun --kill-on-bad-exit=1 bash -c '
    export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
    exec shufflenet train --requeue --job "slurm-$SLURM_JOB_ID" --grace 60 "$@"
' shufflenet "$@"
