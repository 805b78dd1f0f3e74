#!/usr/bin/env bash
# Installs Apptainer and mmdebstrap, for tests of the container; needs root. Does nothing when they are there.
#
# Debian 12 has no package of Apptainer and unstable's wants a newer C library. So unstable's package is unpacked, with
# unstable's C library in a folder that only Apptainer uses; the system's own packages and sources stay as they are.
set -euo pipefail

SUITE=unstable
LIBC=/opt/apptainer-libc
KEYRING=/usr/share/keyrings/debian-archive-keyring.gpg
TOOLS=(squashfs-tools uidmap fakeroot libseccomp2 libsqlite3-0 patchelf mmdebstrap)

if apptainer --version >/dev/null 2>&1 && type -P mksquashfs newuidmap fakeroot mmdebstrap >/dev/null; then
  echo "$(apptainer --version) is already there"
  exit 0
fi
fail() { echo "install-apptainer.sh: $*" >&2; exit 2; }
[ "$(id -u)" = 0 ] || fail "needs root"
type -P apt-get >/dev/null && [ -e $KEYRING ] || fail "needs apt-get and $KEYRING: this is no Debian machine"

export DEBIAN_FRONTEND=noninteractive
apt-get -qq update
apt-get -qq install -y --no-install-recommends "${TOOLS[@]}" >/dev/null

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
chmod 755 "$work" # apt downloads as a user of its own
mkdir -p "$work"/{lists,cache/archives}/partial "$work/debs"
chmod 777 "$work/debs"
mirror=$(apt-get indextargets --format '$(SITE)' 'Created-By: Packages' | grep -m1 '/debian/*$' || true)
echo "deb [signed-by=$KEYRING] ${mirror:-http://deb.debian.org/debian} $SUITE main" >"$work/sources.list"
apt=(apt-get -qq -o Dir::Etc::SourceList="$work/sources.list" -o Dir::Etc::SourceParts=- -o Dir::State::Lists="$work/lists"
  -o Dir::Cache="$work/cache" -o Acquire::Languages=none)
"${apt[@]}" update
(cd "$work/debs" && "${apt[@]}" download apptainer libc6)
dpkg -x "$work"/debs/apptainer_*.deb "$work/apptainer"
dpkg -x "$work"/debs/libc6_*.deb "$work/libc"

rm -rf $LIBC
mkdir -p $LIBC /var/lib/apptainer/mnt/session
cp -a "$work"/libc/usr/lib/*-linux-gnu/*.so.* $LIBC/
find "$work/apptainer/usr" -type f \( -name apptainer -o -name 'starter*' \) | while read -r program; do
  loader=$(patchelf --print-interpreter "$program" 2>/dev/null) || continue
  patchelf --set-interpreter "$LIBC/${loader##*/}" --force-rpath --set-rpath $LIBC "$program"
done
cp -a "$work"/apptainer/{etc,usr} /
apptainer --version
