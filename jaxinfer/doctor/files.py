"""The checkpoint's folder, and those that are written to: there, whole, fast enough, with room."""

import hashlib
import os
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxinfer.checkpoint.files import CheckpointError, DamagedError
from jaxinfer.checkpoint.manifest import NAME, read_manifest
from jaxinfer.checkpoint.verify import check_tokenizer
from jaxinfer.compile_cache import OF_JAX, OFF, VARIABLE, default_folder
from jaxinfer.doctor.finding import Finding, error, ok, warning

GIB = 1 << 30
BLOCK = 16 << 20
READ_SECONDS = 20.0
SLOW, FROM_MEMORY = 0.2e9, 10e9  # bytes/s
LEAST_TO_JUDGE = 64 << 20
LEAST_FREE, LEAST_INODES = GIB, 1000
IN_MEMORY = ("tmpfs", "ramfs", "devtmpfs")


def check_checkpoint(folder: Path, process: int, processes: int, most: int) -> tuple[list[Finding], dict[str, Any]]:
    """All files are there with their sizes, and up to `most` bytes are read; each process begins at its own part."""
    try:
        manifest = read_manifest(folder)
        check_tokenizer(folder, manifest)
    except DamagedError as problem:
        return [error("checkpoint", str(problem), "copy it again, or convert again")], {"manifest": None}
    except (CheckpointError, OSError) as problem:
        fix = "give the folder that python -m convert wrote, on a file system that every node has"
        return [error("checkpoint", str(problem), fix)], {"manifest": None}
    total = sum(entry["bytes"] for entry in manifest.files.values())
    facts = {"manifest": hashlib.sha256((folder / NAME).read_bytes()).hexdigest(), "checkpoint_bytes": total}
    for name, entry in manifest.files.items():
        try:
            size = (folder / name).stat().st_size
        except OSError as problem:
            return [
                error("checkpoint", f"{folder / name}: {problem.strerror}", "copy it again, or convert again")
            ], facts
        if size != entry["bytes"]:
            what = f"{folder / name}: {size} bytes, expected {entry['bytes']}"
            return [error("checkpoint", what, "copy it again, or convert again")], facts
    names = sorted(manifest.files)
    start = len(names) * process // processes
    done, seconds = _read([folder / name for name in names[start:] + names[:start]], most)
    rate = done / max(seconds, 1e-9)
    facts["read_bytes_per_s"] = rate
    kind = file_system(folder)
    text = f"{len(names)} files, {total / 1e9:.3g} GB on {kind}; read {done / 1e9:.3g} GB at {rate / 1e9:.2f} GB/s"
    if kind in IN_MEMORY or rate > FROM_MEMORY:
        text += ", likely from memory"
    if done >= LEAST_TO_JUDGE and rate < SLOW:
        minutes = total / processes / rate / 60
        what = f"{text}: a rank's share takes {minutes:.0f} minutes"
        fix = "copy it to a parallel or node-local file system; on Lustre: lfs setstripe -c 8 for the folder, then copy"
        return [warning("checkpoint", what, fix)], facts
    return [ok("checkpoint", text)], facts


def _read(paths: list[Path], most: int) -> tuple[int, float]:
    """Bytes and seconds of plain reads in large blocks, after the kernel was asked to forget the files."""
    done, buffer, began = 0, bytearray(BLOCK), time.monotonic()
    for path in paths:
        with open(path, "rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            while count := file.readinto(buffer):
                done += count
                if done >= most or time.monotonic() - began > READ_SECONDS:
                    return done, time.monotonic() - began
    return done, time.monotonic() - began


def file_system(path: Path, mounts: Path = Path("/proc/self/mounts")) -> str:
    """The type of the file system that holds `path`."""
    path, best, kind = path.resolve(), -1, "an unknown file system"
    for line in mounts.read_bytes().splitlines():
        _, mount, name, *_ = line.split(b" ")
        # a space is \040 there
        point = Path(os.fsdecode(re.sub(rb"\\([0-7]{3})", lambda octal: bytes([int(octal[1], 8)]), mount)))
        if path.is_relative_to(point) and len(point.parts) >= best:
            best, kind = len(point.parts), name.decode()
    return kind


def check_folder(name: str, folder: Path) -> list[Finding]:
    """Whether a file can be written there as jaxinfer does it, and how much room there is."""
    place = folder
    while not place.exists() and place != place.parent:
        place = place.parent
    where = f"{folder}" if place == folder else f"{folder} (not there yet; looked at {place})"
    if not place.is_dir():
        return [error(name, f"{where}: not a folder", "give a folder")]
    probe = place / f".jaxinfer-doctor-{os.uname().nodename}-{os.getpid()}"
    began = time.monotonic()
    try:
        with open(probe, "wb") as file:
            file.write(bytes(4096))
            file.flush()
            os.fsync(file.fileno())
        os.replace(probe, f"{probe}.done")
        os.unlink(f"{probe}.done")
    except OSError as problem:
        probe.unlink(missing_ok=True)
        fix = (
            "quota or disk full: look at `quota -s` or `df -hi`"
            if problem.errno in (28, 122)
            else "give another folder"
        )
        return [error(name, f"{where}: cannot be written: {problem.strerror}", fix)]
    took, room = time.monotonic() - began, os.statvfs(place)
    free = room.f_bavail * room.f_frsize
    text = f"{where}: writable ({took * 1000:.0f} ms), {free / GIB:.0f} GiB free on {file_system(place)}"
    if free < LEAST_FREE or (0 < room.f_files and room.f_favail < LEAST_INODES):
        what = f"{where}: {free / GIB:.2f} GiB and {room.f_favail} files left"
        return [warning(name, what, "make room, or give another folder")]
    return [ok(name, text)]


def check_cache(env: Mapping[str, str]) -> list[Finding]:
    """Where generate will look: in a folder that JAX was told of first."""
    name, folder = "compile cache", env.get(OF_JAX) or env.get(VARIABLE) or str(default_folder())
    if folder == OFF:
        return [ok(name, f"{VARIABLE} is {OFF}: every start compiles anew")]
    if "://" in folder:
        return [ok(name, f"{folder} (not looked at)")]
    return check_folder(name, Path(folder))
