#!/usr/bin/env bash
# slurm/generate-multi.sh in a container (slurm/container.md). From the repository's folder:
#   MODEL=ckpt/llama PROMPTS=in.jsonl sbatch --account=... slurm/generate-container.sh [options of jaxinfer.generate]
# A requeued job goes on where it stopped. To continue an earlier job: RUN=runs/JOBID, else the same line.
#SBATCH --job-name=generate-container
#SBATCH --nodes=2
#SBATCH --gpus-per-node=4
#SBATCH --ntasks-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --mem=200G
#SBATCH --time=04:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log

SIF=${SIF:-jaxinfer.sif}               # slurm/build-container.sh makes it
MODEL=${MODEL:-build/tinystories}
PROMPTS=${PROMPTS:-examples/tinystories/prompts.jsonl}
RUN=${RUN:-runs/$SLURM_JOB_ID}         # out.jsonl, out.metrics.json, out.run.json and logs/rank-TASK-NODE.log
COMPILED=${COMPILED:-build/compiled}   # compiled programs, kept for the next job
BIND=${BIND:-}                         # more folders that the container shall see: /data,/archive
MESH=${MESH:-auto}                     # auto here: stage=2,tensor=4
# module load apptainer; export NCCL_NET=IB  # where there is InfiniBand: an error instead of slow sockets

# ---- the job
set -euo pipefail
fail() { echo "error: $*" >&2; exit 2; }
apptainer --version >/dev/null 2>&1 || fail "apptainer is not on this node's PATH: does it want a module load above?"
for path in "$SIF" "$MODEL" "$PROMPTS"; do [ -e "$path" ] || fail "$path is missing"; done
mkdir -p "$RUN/logs" "$COMPILED"

# real paths, since a link may lead out of what is bound, and the whole filesystem that each is on
MODEL=$(realpath "$MODEL") PROMPTS=$(realpath "$PROMPTS") RUN=$(realpath "$RUN") COMPILED=$(realpath "$COMPILED")
binds=$(for path in "$PWD" "$MODEL" "$(dirname "$PROMPTS")" "$RUN" "$COMPILED"; do
  mount=$(stat --format=%m "$path")
  case $mount in / | /opt | /usr | /var) echo "$path" ;; *) echo "$mount" ;; esac # these the image has itself
done | sort -u | paste -sd,)
options=(--no-home --pwd "$PWD" --bind "$binds")
if [ -n "$BIND" ]; then options+=(--bind "$BIND"); fi
if [ -e /dev/infiniband ]; then options+=(--bind /dev/infiniband); fi # where the site hides the host's devices
if [ -e /dev/nvidiactl ]; then options+=(--nv); fi

# No --cleanenv: Slurm's variables differ from task to task, and NCCL_*, XLA_FLAGS and JAX_* are meant for the program.
# What must not get in (PYTHONPATH, ...) the image keeps out.
export JAXINFER_COMPILE_CACHE=$COMPILED
OUTPUT=$RUN/out.jsonl LOGS=$RUN/logs
# by which the ranks know each other: the image has neither the home folder nor munge
export JAXINFER_SECRET_FILE=$RUN/secret
(umask 077 && head -c 32 /dev/urandom >"$JAXINFER_SECRET_FILE.new" && mv "$JAXINFER_SECRET_FILE.new" "$JAXINFER_SECRET_FILE")
. slurm/step.sh
run_step apptainer exec "${options[@]}" "$SIF" python -m jaxinfer.generate \
  --model "$MODEL" --prompts "$PROMPTS" --output "$OUTPUT" --mesh "$MESH" "$@"
