#!/usr/bin/env bash
# One file of prompts in shards, each a task of a job array with GPUs of its own. From the repository's folder:
#   MODEL=ckpt/llama PROMPTS=in.jsonl sbatch --account=... --array=0-7 slurm/generate-array.sh [options of generate]
# and when all are done:
#   python -m slurm.shards merge in.jsonl runs/JOBID/parts/*.jsonl --output runs/JOBID/out.jsonl
# Some shards again: RUN=runs/JOBID SHARDS=8, else the same line with --array=3,5.
#SBATCH --job-name=generate-array
#SBATCH --array=0-3
#SBATCH --nodes=1
#SBATCH --gpus-per-node=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --mem=50G
#SBATCH --time=04:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%A_%a.log

MODEL=${MODEL-build/tinystories}       # empty: options say --preset NAME --random-weights
PROMPTS=${PROMPTS:-examples/tinystories/prompts.jsonl}
RUN=${RUN:-runs/$SLURM_ARRAY_JOB_ID}   # parts/SHARD.jsonl and logs/SHARD/rank-TASK-NODE.log
SHARDS=${SHARDS:-$((SLURM_ARRAY_TASK_MAX + 1))}
MESH=${MESH:-auto}                     # auto: tensor over the GPUs of a task's node
PYTHON=${PYTHON:-.venv/bin/python}     # or "apptainer exec --nv jaxinfer.sif python3"
# module load ...

# ---- the job
set -euo pipefail
SHARD=$SLURM_ARRAY_TASK_ID
OUTPUT=$RUN/parts/$SHARD.jsonl LOGS=$RUN/logs/$SHARD
PART=$RUN/prompts/$SHARD.${PROMPTS##*.}
. slurm/step.sh
# shellcheck disable=SC2086 # PYTHON may be several words
$PYTHON -m slurm.shards split "$PROMPTS" --shard "$SHARD" --of "$SHARDS" --output "$PART"
# shellcheck disable=SC2086
run_step $PYTHON -m jaxinfer.generate \
  ${MODEL:+--model "$MODEL"} --prompts "$PART" --output "$OUTPUT" --mesh "$MESH" "$@"
