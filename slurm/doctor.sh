#!/usr/bin/env bash
# Can these nodes run jaxinfer? A table of the ranks and what to do, in a few minutes, ahead of a long job.
# From the repository's folder, with the nodes and tasks of the job to come:
#   MODEL=ckpt/llama sbatch --account=... --nodes=2 --ntasks-per-node=4 slurm/doctor.sh [options of jaxinfer.doctor]
# The answer is in the job's log, for machines in answer.json; the exit status is 1 where there is an error.
#SBATCH --job-name=doctor
#SBATCH --nodes=2
#SBATCH --gpus-per-node=4
#SBATCH --ntasks-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --mem=64G
#SBATCH --time=00:15:00
#SBATCH --output=%x-%j.log

MODEL=${MODEL:-}                       # checkpoint folder; empty: nothing is read
RUN=${RUN:-runs/$SLURM_JOB_ID}         # answer.json and logs/rank-TASK-NODE.log
OUTPUT_DIR=${OUTPUT_DIR:-$RUN}         # where the job to come will write
PYTHON=${PYTHON:-.venv/bin/python}     # or "apptainer exec --nv jaxinfer.sif python3"
# module load ...

# ---- the job
set -euo pipefail
ulimit -c 0 # an aborted task would leave a core file as large as its memory
mkdir -p "$RUN/logs"

options=(--output-dir "$OUTPUT_DIR" --json "$RUN/answer.json")
if [ -n "$MODEL" ]; then options+=(--model "$MODEL"); fi

# the doctor's ranks end by themselves, and one that dies is in the answer: no --kill-on-bad-exit
# srun does not inherit the job's CPUs per task
status=0
# shellcheck disable=SC2086 # PYTHON may be several words
srun --kill-on-bad-exit=0 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" --output="$RUN/logs/rank-%t-%N.log" \
  $PYTHON -m jaxinfer.doctor "${options[@]}" "$@" || status=$?
cat "$RUN"/logs/rank-*.log
exit "$status"
