#!/usr/bin/env bash
# Installs what the testbed needs from Debian's packages; needs root. Does nothing when all is there.
#
#   install.sh [--accounting]
set -euo pipefail

PACKAGES=(slurmctld slurmd slurm-client munge iproute2)
COMMANDS=(slurmctld slurmd srun munged ip)
case ${1:-} in
  '') ;;
  --accounting)
    PACKAGES+=(slurmdbd mariadb-server-core mariadb-client-core)
    COMMANDS+=(slurmdbd mariadbd mariadb-install-db)
    ;;
  *) echo "unknown option $1" >&2; exit 2 ;;
esac

missing=0
for command in "${COMMANDS[@]}"; do
  type -P "$command" >/dev/null || missing=1
done
[ $missing = 1 ] || exit 0
[ "$(id -u)" = 0 ] || { echo "install.sh needs root" >&2; exit 2; }
type -P apt-get >/dev/null || { echo "install.sh needs apt-get: this is no Debian machine" >&2; exit 2; }

export DEBIAN_FRONTEND=noninteractive
# packages must not start daemons of their own
policy=/usr/sbin/policy-rc.d
if [ ! -e $policy ]; then
  printf '#!/bin/sh\nexit 101\n' >$policy
  chmod +x $policy
  trap 'rm -f $policy' EXIT
fi
apt-get -qq update
apt-get -qq install -y --no-install-recommends "${PACKAGES[@]}" >/dev/null
