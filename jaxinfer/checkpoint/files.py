"""Files of a checkpoint: written so that a crash leaves the whole file or none of it, and known by their checksums."""

import json
import math
import os
import re
from pathlib import Path
from typing import IO, Any

import xxhash

OPEN_FILES = re.compile(r"/proc/\d+(/task/\d+)?/fd")
MOST_LINKS = 40  # that Linux follows


class CheckpointError(ValueError):
    """A checkpoint folder that is absent, incomplete, damaged or newer than this code: the message names the file."""


class DamagedError(CheckpointError):
    """A file is missing or not as it was written. Converting again, by the same command, mends it."""


MEND = "the same conversion again mends it"


def describe(data: bytes) -> dict[str, Any]:
    """A file's entry in the manifest."""
    return {"bytes": len(data), "xxh3_128": xxhash.xxh3_128_hexdigest(data)}


def sync_folder(path: Path) -> None:
    """Makes the names inside a folder durable: a rename alone may be lost with the power."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def is_stream(path: Path) -> bool:
    """Whether what is written to `path` cannot be renamed into its place or read again: a pipe, a device, or what this
    process was given open (/dev/stdout, /dev/fd/3)."""
    if path.exists() and not path.is_file() and not path.is_dir():
        return True
    for _ in range(MOST_LINKS):
        if OPEN_FILES.fullmatch(os.path.realpath(path.parent)):
            return True
        if not path.is_symlink():
            return False
        path = path.parent / os.readlink(path)
    return False


def json_bytes(data: Any, indent: int | None = None) -> bytes:
    """JSON in UTF-8 and a last newline. Numbers that JSON has no word for, NaN and the infinities, become null."""
    try:
        text = json.dumps(data, indent=indent, ensure_ascii=False, allow_nan=False)
    except ValueError:
        text = json.dumps(_finite(data), indent=indent, ensure_ascii=False, allow_nan=False)
    # half of a surrogate pair, from a path or an id, becomes JSON's own escape of it
    return (text + "\n").encode(errors="backslashreplace")


def _finite(data: Any) -> Any:
    if isinstance(data, dict):
        return {name: _finite(value) for name, value in data.items()}
    if isinstance(data, list | tuple):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def write_json(path: Path, data: Any) -> None:
    """Writes a small file as `write_whole` does, and as `json_bytes` says."""
    write_whole(path, json_bytes(data, indent=1))


def write_whole(path: Path, data: bytes) -> None:
    """Writes a small file, in a folder that is made where it is missing: aside, then renamed to its name. A stream
    takes the bytes as they come.

    Raises:
      OSError: it cannot be written, with its name.
    """
    try:
        _write_whole(path, data)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def _write_whole(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if is_stream(path):
        with open(path, "ab", buffering=0) as stream:
            write_all(stream, data)
        return
    aside = path.with_name(path.name + ".partial")
    try:
        with open(aside, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError:
        aside.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_all(file: IO[bytes], data: bytes) -> None:
    """To a file without a buffer, which may take a part at a time."""
    rest = memoryview(data)
    while rest:
        rest = rest[file.write(rest) :]
