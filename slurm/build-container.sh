#!/usr/bin/env bash
# Makes jaxinfer.sif in two halves, from the repository's folder, as an ordinary user:
#   slurm/build-container.sh download   with internet: base.sif and the wheels of jaxinfer and all it needs, into BUNDLE
#   slurm/build-container.sh build      without internet, from BUNDLE alone (copy it where Apptainer is)
# Settings are variables: EXTRA=cuda13 slurm/build-container.sh download. The halves of download are `base`, which needs
# Apptainer, and `wheels`, which needs the base's version of Python.
set -euo pipefail
umask 022 # whoever runs the image reads it
cd "$(dirname "$0")/.."

EXTRA=${EXTRA:-cuda12}                 # cuda12, cuda13 (newer driver) or cpu
BUNDLE=${BUNDLE:-build/container}      # base.sif and app/; with CUDA 4 GB
SIF=${SIF:-jaxinfer.sif}
BOOTSTRAP=${BOOTSTRAP:-docker}         # where the base comes from
BASE=${BASE:-debian:12}
PYTHON=${PYTHON:-python3.11}           # that of the base
# unpacking takes 15 GB with CUDA: export APPTAINER_TMPDIR=FOLDER on a local disk where /tmp is small

fail() { echo "error: $*" >&2; exit 2; }

needs_apptainer() {
  apptainer --version >/dev/null 2>&1 || fail "apptainer is not on the PATH here (on some clusters: module load apptainer)"
}

not_as_root() {
  [ "$(id -u)" != 0 ] || grep -qsE '^(root|0):' /etc/subuid ||
    fail "Apptainer builds as an ordinary user here, not as root, who is not in /etc/subuid: runuser -u USER -- $0 ... (with" \
      "BUNDLE and SIF in folders of that user)"
}

base() {
  needs_apptainer
  not_as_root
  mkdir -p "$BUNDLE"
  build_image "$BUNDLE/base.sif" "$BOOTSTRAP" "$BASE" slurm/base.def
}

wheels() {
  local app=$BUNDLE/app found
  found=$("$PYTHON" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) ||
    fail "$PYTHON does not run here: set PYTHON to the base's version of Python"
  if [ -e "$BUNDLE/base.sif" ] && apptainer --version >/dev/null 2>&1; then
    wanted=$(apptainer exec "$BUNDLE/base.sif" python3 -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    [ "$found" = "$wanted" ] || fail "$PYTHON is Python $found, but $BUNDLE/base.sif has $wanted: set PYTHON"
  fi
  mkdir -p "$BUNDLE"
  work=$(mktemp -d "$BUNDLE/new.XXXXXX")
  trap 'rm -rf "$work"' EXIT
  # a clean copy: setuptools would take up what earlier builds left in build/
  mkdir "$work/source" "$work/app"
  tar -c --exclude=__pycache__ pyproject.toml README.md LICENSE jaxinfer convert configs/models | tar -x -C "$work/source"
  tar -c --exclude=__pycache__ slurm configs | tar -x -C "$work/app"
  "$PYTHON" -m pip wheel --quiet --no-deps --wheel-dir "$work/app/wheels" "$work/source"
  local own=("$work"/app/wheels/jaxinfer-*.whl) extras=
  [ "$EXTRA" = cpu ] || extras="[$EXTRA]"
  "$PYTHON" -m pip download --quiet --only-binary :all: -c constraints.txt -c slurm/constraints-cuda.txt \
    --dest "$work/app/wheels" "${own[0]}$extras"
  local version=${own[0]##*/jaxinfer-}
  {
    echo "VERSION=${version%%-*}"
    echo "COMMIT=$(git describe --always --dirty 2>/dev/null || echo unknown)"
    echo "EXTRA=$EXTRA"
  } >"$work/app/release"
  (cd "$work/app" && find . -type f ! -name SHA256SUMS -print0 | sort -z | xargs -0 sha256sum >SHA256SUMS)
  rm -rf "$app"
  mv "$work/app" "$app"
  echo "$app: $(find "$app/wheels" -name '*.whl' | wc -l) wheels, $(du -sh "$app" | cut -f1)"
}

build() {
  local app=$BUNDLE/app wrong
  needs_apptainer
  [ -e "$BUNDLE/base.sif" ] || fail "$BUNDLE/base.sif is missing: where there is internet, run $0 base"
  [ -e "$app/SHA256SUMS" ] || fail "$app is missing or not whole: where there is internet, run $0 wheels"
  wrong=$(cd "$app" && sha256sum --check --quiet SHA256SUMS 2>/dev/null) ||
    fail "$app is not what was downloaded; run $0 wheels again. These are missing or damaged:"$'\n'"$wrong"
  wrong=$(cd "$app" && find . -name '*.whl' | grep -vxFf <(cut -d' ' -f3 SHA256SUMS)) &&
    fail "$app has wheels that were not downloaded with it: remove"$'\n'"$wrong"
  not_as_root
  # shellcheck disable=SC1091
  . "$app/release"
  build_image "$SIF" localimage "$BUNDLE/base.sif" slurm/jaxinfer.def --build-arg "APP=$app" \
    --build-arg "VERSION=$VERSION" --build-arg "COMMIT=$COMMIT" --build-arg "EXTRA=$EXTRA"
  echo "$SIF: jaxinfer $VERSION, commit $COMMIT, $EXTRA, $(du -h "$SIF" | cut -f1)"
}

build_image() { # IMAGE BOOTSTRAP BASE DEFINITION [OPTION]...; zstd starts faster than gzip and is made faster
  local bootstrap=$2 base=$3 definition=$4
  image=$1
  shift 4
  trap 'rm -f "$image.part"' EXIT
  apptainer --quiet build --force --fakeroot --mksquashfs-args "-comp zstd -Xcompression-level 3" \
    --build-arg "BOOTSTRAP=$bootstrap" --build-arg "BASE=$base" "$@" "$image.part" "$definition"
  mv "$image.part" "$image"
}

case $EXTRA in cuda12 | cuda13 | cpu) ;; *) fail "EXTRA: found '$EXTRA', legal are cuda12, cuda13, cpu" ;; esac
case ${1:-} in
  download) base; wheels ;;
  base | wheels | build) "$1" ;;
  *) fail "usage: $0 download|base|wheels|build" ;;
esac
