# Sourced by the job scripts: run_step COMMAND... runs it as one srun step and ends the job with its exit status.
#   OUTPUT  what the command makes, a file or a folder      LOGS  folder for the log of each rank
#
# Ahead of the time limit Slurm sends USR1 to this shell alone (--signal=B:), and we pass it on; TERM (scancel,
# preemption) reaches the tasks by itself. Either way they write what is finished, put the rest back and exit 0. After
# USR1 the job goes back into the queue and continues there; after TERM that is Slurm's to decide. A failure is not
# repeated, and neither is an attempt that adds nothing, three times in a row.
#
# Where JAXINFER_STEP has options of srun (slurm.submit --inside), this is a step of somebody's allocation: nothing is
# requeued, and TERM, which nobody else tells the tasks of, is passed on as USR1 is.

ulimit -c 0 # an aborted task would leave a core file as large as its memory
# compiled programs, for the next attempt
export JAXINFER_COMPILE_CACHE=${JAXINFER_COMPILE_CACHE:-$PWD/build/compiled}
srun='' stopped='' interrupted=''
trap 'stop USR1' USR1
if [ -n "${JAXINFER_STEP-}" ]; then trap 'stop USR1' TERM; else trap 'stop TERM' TERM; fi

run_step() {
  local before status options
  metrics=${OUTPUT%.jsonl}.metrics.json
  mkdir -p "$LOGS"
  echo "${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}" >"$LOGS/started" # where slurm.submit was killed before it had noted it
  before=$(size)
  options=(--cpus-per-task="${SLURM_CPUS_PER_TASK:-1}") # srun does not inherit the job's
  if [ -n "${JAXINFER_STEP-}" ]; then options=("${JAXINFER_STEP[@]}"); fi
  srun --kill-on-bad-exit=1 --open-mode=append --output="${LOGS//%/%%}/rank-%t-%N.log" "${options[@]}" "$@" &
  srun=$!
  if [ "$stopped" = USR1 ]; then pass_on & fi
  while true; do
    interrupted=
    wait "$srun" && status=0 || status=$?
    [ -n "$interrupted" ] || break # else a trap ended the wait, not srun
  done
  if [ "$stopped" = TERM ]; then exit 143; fi
  if [ -z "${JAXINFER_STEP-}" ] && work_left "$status"; then requeue "$before"; fi
  exit "$status"
}

stop() {
  stopped=$1 interrupted=1
  echo "$(date +%FT%T) $1: stopping, what is finished stays"
  if [ "$1" = USR1 ] && [ -n "$srun" ]; then pass_on & fi
}

pass_on() { # again and again: an srun whose tasks do not run yet swallows it
  while kill -s USR1 "$srun" 2>/dev/null; do sleep 1; done
}

work_left() { # after exit status $1
  local fresh=
  if [ "$metrics" -nt "$LOGS/started" ]; then fresh=1; fi
  case $1 in
    0) if [ -n "$fresh" ]; then grep -q '"unfinished": [1-9]' "$metrics"; else [ "$stopped" = USR1 ]; fi ;;
    # USR1 came before the program could take it: some tasks died of it, the others by --kill-on-bad-exit
    137 | 138 | 143) [ "$stopped" = USR1 ] && [ -z "$fresh" ] ;;
    *) false ;;
  esac
}

requeue() { # $1: size of the output when this attempt began
  local job=$SLURM_JOB_ID
  # the bare id of an array's last task means the whole array
  if [ -n "${SLURM_ARRAY_JOB_ID:-}" ]; then job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID; fi
  if [ "$(size)" -gt "$1" ]; then rm -f "$LOGS/idle"; else echo "$job" >>"$LOGS/idle"; fi
  if [ -e "$LOGS/idle" ] && [ "$(wc -l <"$LOGS/idle")" -ge 3 ]; then
    rm "$LOGS/idle"
    echo "error: three attempts added nothing to $OUTPUT: is --time too short to load the model?" >&2
    exit 1
  fi
  echo "$(date +%FT%T) work is left: job $job goes back into the queue (restart ${SLURM_RESTART_COUNT:-0})"
  scontrol requeue "$job" || { echo "error: no requeue here; the same sbatch line does the rest" >&2; exit 1; }
  exit 0
}

size() { du -sb "$OUTPUT" 2>/dev/null | cut -f1 | grep . || echo 0; }
