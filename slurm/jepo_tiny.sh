#!/bin/bash
# Try out a cluster: a model that learns nothing trains for seconds over two nodes, without a GPU. If this ends with
# "done", nodes see the same files, reach each other and can be requeued.
#
#   sbatch [--account=A --partition=P] slurm/jepo_tiny.sh [key=value ...]
#
# From the top of this repository, on a file system that the nodes share. With ROLLOUT_NODES=1 the second node serves
# vLLM (MODEL is then a small model's folder); every variable is in docs/guides/on-a-cluster.md.
#SBATCH --job-name=jepo-tiny
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --time=00:10:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail

: "${TRAINERS_PER_NODE:=1}"
: "${SERVER_OPTIONS:=--dtype float32 --load-format dummy}"
RECIPE_OVERRIDES=()
if ((${ROLLOUT_NODES:-0})); then
    : "${MODEL:?folder of a small Hugging Face model, which every node sees}"
    RECIPE_OVERRIDES=(rollout=vllm model.hf_config=null "pretrained_checkpoint.restore_from_path=$MODEL")
fi

# shellcheck source-path=SCRIPTDIR source=launch.sh
source "${PROJECT_DIR:-${SLURM_SUBMIT_DIR:?start this script with sbatch}}/slurm/launch.sh"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
launch jepo_tiny "$@"
