#!/usr/bin/env bash
# Starts a throw-away Slurm of several nodes on this machine, beside others of other names. Needs root.
#
#   start.sh [--name NAME] [--nodes N | --names a1,a2,b7] [--gpus PER_NODE] [--cpus PER_NODE] [--mem MB]
#            [--accounting] [--mode nodes|hosts|plain] [--owner PID]
#
# --owner: the bed is stopped when that process ends.
# Modes (default: the first that this machine allows)
#   nodes  each node has its own network, hostname, /etc/hosts and processes
#   hosts  the same, but all nodes share the machine's network
#   plain  nothing is separate; the node names are added to /etc/hosts
set -euo pipefail

HERE=$(cd "$(dirname "$0")" && pwd)
REGISTRY=/run/slurm-testbed      # one link per bed: its number -> its run folder
NAME=default NODES=4 NAMES='' GPUS=4 CPUS=32 MEMORY=256000 ACCOUNTING=0 MODE='' OWNER=''
WAIT_S=30                        # that a daemon has to come up

fail() { echo "start.sh: $*" >&2; exit 2; }

while [ $# -gt 0 ]; do
  case $1 in
    --accounting) ACCOUNTING=1; shift; continue ;;
    --name | --nodes | --names | --gpus | --cpus | --mem | --mode | --owner) [ $# -gt 1 ] || fail "$1 needs a value" ;;
    *) fail "unknown option $1" ;;
  esac
  case $1 in
    --name) NAME=$2 ;; --nodes) NODES=$2 ;; --names) NAMES=$2 ;; --gpus) GPUS=$2 ;; --cpus) CPUS=$2 ;;
    --mem) MEMORY=$2 ;; --mode) MODE=$2 ;; --owner) OWNER=$2 ;;
  esac
  shift 2
done
[ "$(id -u)" = 0 ] || fail "needs root"
[[ $NAME =~ ^[A-Za-z0-9._-]+$ ]] || fail "--name: found '$NAME', legal are letters, digits, dot, dash, underscore"
for command in slurmctld slurmd srun munged ip unshare; do
  type -P "$command" >/dev/null || fail "$command is not installed: run $HERE/install.sh"
done
if [ -n "$NAMES" ]; then IFS=, read -ra NODE <<<"$NAMES"; else mapfile -t NODE < <(seq -f 'node%.0f' "$NODES"); fi
[ ${#NODE[@]} -ge 1 ] && [ ${#NODE[@]} -le 32 ] || fail "found ${#NODE[@]} nodes, legal are 1 to 32"

# ---- a number of its own: network, ports and links follow from it ----
RUN=${TMPDIR:-/tmp}/slurm-testbed/$NAME
[ ${#RUN} -le 80 ] || fail "the path $RUN is too long for a socket: set TMPDIR"
mkdir -p $REGISTRY
for link in $REGISTRY/*; do
  [ "$(basename "$(readlink "$link")")" != "$NAME" ] || fail "a bed '$NAME' is there already: stop.sh --name $NAME"
done
mkdir -p "$(dirname "$RUN")"
mkdir "$RUN" 2>/dev/null || fail "$RUN is there already, of no running bed: remove it"
for ((SLOT = 0; SLOT < 64; SLOT++)); do
  ln -sT "$RUN" "$REGISTRY/$SLOT" 2>/dev/null && break
done
[ $SLOT -lt 64 ] || { rmdir "$RUN"; fail "64 beds run already"; }

started=0
undo() {
  [ $started = 1 ] && return
  echo "start.sh: no start; the last lines of each log:" >&2
  tail -n 5 "$RUN"/log/* >&2 || true
  "$HERE/stop.sh" --name "$NAME" >&2
}
trap undo EXIT
trap 'exit 130' INT TERM HUP

BRIDGE=stb$SLOT NET=10.199.$SLOT PORT=$((21000 + 50 * SLOT))
LOGIN=$(hostname -s)
SPLIT=(unshare --uts --mount --pid --fork --kill-child --mount-proc)
mkdir -p "$RUN"/{log,state,spool,munge,dev,etc}
chmod 755 "$RUN" "$RUN/munge"
export SLURM_CONF=$RUN/etc/slurm.conf
unset XLA_FLAGS
ulimit -c 0 # an aborted JAX process leaves a core of half a GB

if [ -z "$MODE" ]; then
  if ip link add "$BRIDGE" type bridge 2>/dev/null && "${SPLIT[@]}" --net true 2>/dev/null; then
    MODE=nodes
  elif "${SPLIT[@]}" true 2>/dev/null; then
    MODE=hosts
  else
    MODE=plain
  fi
  ip link del "$BRIDGE" 2>/dev/null || true
fi
echo "$MODE" >"$RUN/mode"

# ---- configuration ----
case $MODE in
  nodes) CONTROL=$NET.254 ;;
  hosts | plain) CONTROL=127.0.0.1 ;;
  *) fail "--mode: found '$MODE', legal are nodes, hosts, plain" ;;
esac
fill() {
  sed -e "s#@RUN@#$RUN#g; s#@LOGIN@#$LOGIN#g; s#@CONTROL@#$CONTROL#g; s#@PORT@#$PORT#g" \
    -e "s#@DBDPORT@#$((PORT + 1))#g; s#@SQLPORT@#$((PORT + 2))#g" "$1"
}
printf '127.0.0.1 localhost\n::1 localhost\n%s %s\n' "$CONTROL" "$LOGIN" >"$RUN/etc/hosts"
echo "CgroupPlugin=cgroup/v1" >"$RUN/etc/cgroup.conf" # not used: only ends the search for one
: >"$RUN/etc/gres.conf"
gres=
if [ "$GPUS" -gt 0 ]; then
  # CUDA_VISIBLE_DEVICES is set for device files only; a plain file is none
  for ((i = 0; i < GPUS; i++)); do ln -s /dev/null "$RUN/dev/gpu$i"; done
  range=0; [ "$GPUS" = 1 ] || range="[0-$((GPUS - 1))]"
  printf 'AutoDetect=off\nName=gpu Type=fake File=%s\n' "$RUN/dev/gpu$range" >"$RUN/etc/gres.conf"
  gres="Gres=gpu:fake:$GPUS"
fi
{
  fill "$HERE/slurm.conf.in"
  if [ $ACCOUNTING = 1 ]; then
    echo "AccountingStorageType=accounting_storage/slurmdbd"
    echo "AccountingStorageHost=$CONTROL"
    echo "AccountingStoragePort=$((PORT + 1))"
    echo "AccountingStoragePass=$RUN/munge/socket"
    echo "AccountingStorageTRES=gres/gpu"
  fi
  for i in "${!NODE[@]}"; do
    address=127.0.0.1 port=$((PORT + 10 + i)) host=${NODE[i]}
    [ "$MODE" = nodes ] && address=$NET.$((i + 1))
    [ "$MODE" = plain ] && host=$LOGIN
    echo "NodeName=${NODE[i]} NodeHostname=$host NodeAddr=$address Port=$port CPUs=$CPUS RealMemory=$MEMORY $gres"
    if [ "$MODE" = plain ]; then
      echo "127.0.0.1 ${NODE[i]} # slurm-testbed $SLOT" >>/etc/hosts
    else
      echo "$address ${NODE[i]}" >>"$RUN/etc/hosts"
    fi
  done
  all=$(IFS=,; echo "${NODE[*]}")
  echo "PartitionName=main Nodes=$all Default=YES PriorityTier=1 GraceTime=10 State=UP"
  echo "PartitionName=urgent Nodes=$all PriorityTier=2 PreemptMode=OFF State=UP"
} >"$SLURM_CONF"
echo "export SLURM_CONF=$SLURM_CONF" >"$RUN/env.sh"

# ---- daemons: stop.sh finds them by the variable TESTBED_RUN ----
daemon() { # LOG COMMAND...
  local log=$RUN/log/$1
  shift
  TESTBED_RUN=$RUN setsid "$@" >"$log" 2>&1 </dev/null &
  LAST=$!
  disown
}
wait_for() { # COMMAND... : until it succeeds, as long as the daemon started last lives
  local end=$((SECONDS + WAIT_S))
  until "$@" >/dev/null 2>&1; do
    [ -z "$LAST" ] || kill -0 "$LAST" 2>/dev/null || { echo "start.sh: the daemon died; waited for: $*" >&2; exit 1; }
    [ $SECONDS -lt $end ] || { echo "start.sh: $WAIT_S s are over; waited for: $*" >&2; exit 1; }
    sleep 0.05
  done
}
listens() { (: <"/dev/tcp/$1/$2"); }

if [ -n "$OWNER" ]; then
  # shellcheck disable=SC2016
  daemon owner.out bash -c 'tail --pid="$1" -f /dev/null; exec env -u TESTBED_RUN "$2" --name "$3"' \
    bash "$OWNER" "$HERE/stop.sh" "$NAME"
fi

dd if=/dev/urandom of="$RUN/munge/key" bs=1024 count=1 status=none
chmod 400 "$RUN/munge/key"
daemon munged.out munged --foreground --force --key-file="$RUN/munge/key" --socket="$RUN/munge/socket" \
  --pid-file="$RUN/munge/pid" --log-file="$RUN/log/munged.log" --seed-file="$RUN/munge/seed"
wait_for test -S "$RUN/munge/socket"

if [ $ACCOUNTING = 1 ]; then
  mariadb-install-db --no-defaults --user=root --datadir="$RUN/mysql" --skip-test-db \
    --auth-root-authentication-method=normal >"$RUN/log/mariadb-install.log" 2>&1
  cat >"$RUN/etc/init.sql" <<SQL
CREATE DATABASE IF NOT EXISTS slurm_acct_db;
CREATE USER IF NOT EXISTS 'slurm'@'127.0.0.1' IDENTIFIED BY 'slurm';
CREATE USER IF NOT EXISTS 'slurm'@'localhost' IDENTIFIED BY 'slurm';
GRANT ALL ON slurm_acct_db.* TO 'slurm'@'127.0.0.1';
GRANT ALL ON slurm_acct_db.* TO 'slurm'@'localhost';
SQL
  daemon mariadbd.out mariadbd --no-defaults --user=root --datadir="$RUN/mysql" --socket="$RUN/mysql/s" \
    --pid-file="$RUN/mysql/pid" --bind-address=127.0.0.1 --port=$((PORT + 2)) --init-file="$RUN/etc/init.sql" \
    --innodb-buffer-pool-size=64M --innodb-log-file-size=16M --innodb-lock-wait-timeout=900
  wait_for listens 127.0.0.1 $((PORT + 2))
  fill "$HERE/slurmdbd.conf.in" >"$RUN/etc/slurmdbd.conf"
  chmod 600 "$RUN/etc/slurmdbd.conf"
  daemon slurmdbd.out slurmdbd -D
  [ "$MODE" = nodes ] || wait_for listens "$CONTROL" $((PORT + 1))
fi

if [ "$MODE" = nodes ]; then
  ip link add "$BRIDGE" type bridge
  ip addr add "$CONTROL/24" dev "$BRIDGE"
  ip link set "$BRIDGE" up
  [ $ACCOUNTING = 0 ] || wait_for listens "$CONTROL" $((PORT + 1))
fi

daemon slurmctld.out slurmctld -D -c
wait_for scontrol ping

# the first process of a node: its death, or that of the unshare above it, ends all others there
# shellcheck disable=SC2016
NODE_MAIN='
name=$1 run=$2 address=$3
hostname "$name"
mount --bind "$run/etc/hosts" /etc/hosts
[ ! -d /etc/slurm ] || mount --bind "$run/etc" /etc/slurm  # where --export=NONE jobs look
if [ -n "$address" ]; then
  until [ -e /proc/sys/net/ipv4/conf/eth0 ]; do sleep 0.02; done
  ip link set lo up
  ip addr add "$address/24" dev eth0
  ip link set eth0 up
fi
slurmd -D -N "$name" -f "$run/etc/slurm.conf" &
wait $!'
apart() { [ "$(readlink "/proc/$1/ns/net")" != "$(readlink /proc/self/ns/net)" ]; }
for i in "${!NODE[@]}"; do
  name=${NODE[i]}
  mkdir "$RUN/spool/$name"
  case $MODE in
    nodes)
      daemon "slurmd-$name.out" "${SPLIT[@]}" --net bash -ec "$NODE_MAIN" bash "$name" "$RUN" "$NET.$((i + 1))"
      wait_for apart "$LAST"
      ip link add "${BRIDGE}v$i" type veth peer name eth0 netns "$LAST"
      ip link set "${BRIDGE}v$i" master "$BRIDGE" up
      ;;
    hosts) daemon "slurmd-$name.out" "${SPLIT[@]}" bash -ec "$NODE_MAIN" bash "$name" "$RUN" '' ;;
    plain) daemon "slurmd-$name.out" slurmd -D -N "$name" -f "$SLURM_CONF" ;;
  esac
done
all_idle() { [ "$(sinfo -h -N -p main -t idle -o %N | wc -l)" = ${#NODE[@]} ]; }
wait_for all_idle
started=1
echo "Slurm testbed '$NAME': ${#NODE[@]} nodes with $GPUS GPUs each (mode $MODE); . $RUN/env.sh"
