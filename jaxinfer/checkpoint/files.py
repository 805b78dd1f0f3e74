"""Writing so that a crash leaves either the whole file or none of it."""

import os
from pathlib import Path


class CheckpointError(ValueError):
    """A checkpoint folder that is absent, incomplete, damaged or newer than this code: the message names the file."""


def sync_folder(path: Path) -> None:
    """Makes the names inside a folder durable: a rename alone may be lost with the power."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_whole(path: Path, data: bytes) -> None:
    """Writes a small file aside and renames it to its name."""
    aside = path.with_name(path.name + ".partial")
    with open(aside, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)
    sync_folder(path.parent)
