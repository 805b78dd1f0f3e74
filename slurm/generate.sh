#!/usr/bin/env bash
# Completions on one node: one task per GPU, tensor parallel over them. From the repository's folder:
#   MODEL=ckpt/llama PROMPTS=in.jsonl sbatch --account=... slurm/generate.sh [options of jaxinfer.generate]
# A requeued job goes on where it stopped. To continue an earlier job: RUN=runs/JOBID, else the same line.
#SBATCH --job-name=generate
#SBATCH --nodes=1
#SBATCH --gpus-per-node=4
#SBATCH --ntasks-per-node=4
#SBATCH --cpus-per-task=8
# one task per node works as well: --ntasks-per-node=1 and all cores in --cpus-per-task
#SBATCH --mem=200G
#SBATCH --time=04:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log

MODEL=${MODEL-build/tinystories}       # empty: options say --preset NAME --random-weights
PROMPTS=${PROMPTS:-examples/tinystories/prompts.jsonl}
RUN=${RUN:-runs/$SLURM_JOB_ID}         # out.jsonl, out.metrics.json, out.run.json and logs/rank-TASK-NODE.log
MESH=${MESH:-auto}                     # auto: tensor over the GPUs of the node
PYTHON=${PYTHON:-.venv/bin/python}     # or "apptainer exec --nv jaxinfer.sif python3"
# module load ...; export NCCL_...

# ---- the job
set -euo pipefail
OUTPUT=$RUN/out.jsonl LOGS=$RUN/logs
. slurm/step.sh
# shellcheck disable=SC2086 # PYTHON may be several words
run_step $PYTHON -m jaxinfer.generate \
  ${MODEL:+--model "$MODEL"} --prompts "$PROMPTS" --output "$OUTPUT" --mesh "$MESH" "$@"
