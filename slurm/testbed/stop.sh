#!/usr/bin/env bash
# Stops testbeds, half-started ones too, with all their jobs, and removes what start.sh made.
#
#   stop.sh [--name NAME | --all]
set -uo pipefail

REGISTRY=/run/slurm-testbed
NAME=default
WAIT_S=10 # that processes have to end after SIGKILL

case ${1:-} in
  '') ;;
  --all) NAME='*' ;;
  --name) NAME=${2:?--name needs a value} ;;
  *) echo "stop.sh: unknown option $1" >&2; exit 2 ;;
esac

processes() { # RUN: ids of the daemons, which carry TESTBED_RUN, and in plain mode of what jobs have left
  local run=$1 file
  {
    grep -lsxzF "TESTBED_RUN=$run" /proc/[0-9]*/environ
    for file in $(grep -lsxzF "SLURM_CONF=$run/etc/slurm.conf" /proc/[0-9]*/environ); do
      # a shell that only uses the bed stays
      if grep -qsz '^SLURMD_NODENAME=' "$file" || grep -qs '^slurmstepd:' "${file%environ}cmdline"; then echo "$file"; fi
    done
  } | grep -o '[0-9]*'
}

tree() { # PIDS...: with all their descendants
  local pid children
  for pid in "$@"; do
    echo "$pid"
    children=$(cat /proc/"$pid"/task/*/children 2>/dev/null)
    # shellcheck disable=SC2086
    tree $children
  done
}

stop() { # SLOT
  local slot=$1 run mode i pids=() end=$((SECONDS + WAIT_S)) link
  run=$(readlink "$REGISTRY/$slot") || return
  mode=$(cat "$run/mode" 2>/dev/null)
  # daemons first, their children with them: nothing restarts what is killed
  while mapfile -t pids < <(processes "$run") && [ ${#pids[@]} -gt 0 ]; do
    mapfile -t pids < <(tree "${pids[@]}")
    kill -KILL "${pids[@]}" 2>/dev/null
    sleep 0.05
    if [ $SECONDS -ge $end ]; then
      echo "stop.sh: still there after $WAIT_S s: ${pids[*]}" >&2
      return 1
    fi
  done
  for link in /sys/class/net/"stb${slot}"v*; do
    [ -e "$link" ] && ip link del "$(basename "$link")" 2>/dev/null
  done
  [ -e "/sys/class/net/stb$slot" ] && ip link del "stb$slot"
  # a mount over it may forbid a rename
  if [ "$mode" = plain ] && hosts=$(grep -v "# slurm-testbed $slot\$" /etc/hosts); then echo "$hosts" >/etc/hosts; fi
  rm -rf "$run"
  rm -f "$REGISTRY/$slot"
  echo "stopped testbed '$(basename "$run")'"
}

failed=0
for link in "$REGISTRY"/*; do
  [ -L "$link" ] || continue
  # shellcheck disable=SC2053
  [[ $(basename "$(readlink "$link")") == $NAME ]] && { stop "$(basename "$link")" || failed=1; }
done
exit $failed
