#!/usr/bin/env bash
# A Hugging Face folder to a checkpoint, on one node without GPUs. From the repository's folder:
#   SOURCE=hf/open_llama_3b_v2 CKPT=ckpt/openllama-3b sbatch --account=... slurm/convert.sh [--dtype bfloat16 --verify]
# It works tensor by tensor, so a few GB of memory do for any model; a requeued job finishes the rest.
#SBATCH --job-name=convert
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=4
#SBATCH --mem=16G
#SBATCH --time=04:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log

SOURCE=${SOURCE:-examples/tinystories/model}
CKPT=${CKPT:-build/tinystories}
LOGS=${LOGS:-runs/$SLURM_JOB_ID/logs}
PYTHON=${PYTHON:-.venv/bin/python}     # or "apptainer exec jaxinfer.sif python3"

# ---- the job
set -euo pipefail
OUTPUT=$CKPT
. slurm/step.sh
# shellcheck disable=SC2086 # PYTHON may be several words
run_step $PYTHON -m convert --source "$SOURCE" --output "$CKPT" "$@"
