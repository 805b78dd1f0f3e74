"""Hashes of files. A source file is hashed while the one before it is converted, which also warms the page cache."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

import xxhash

_BLOCK = 8 << 20
Told = Callable[[int], object]


def _hashed(path: Path, hasher: Any, told: Told, stop: Event | None = None) -> tuple[int, str]:
    size, buffer = 0, bytearray(_BLOCK)
    view = memoryview(buffer)
    with open(path, "rb", buffering=0) as file:
        while (count := file.readinto(buffer)) and not (stop and stop.is_set()):
            hasher.update(view[:count])
            size += count
            told(count)
    return size, hasher.hexdigest()


def sha256(path: Path, told: Told = lambda size: None, stop: Event | None = None) -> dict[str, Any]:
    size, digest = _hashed(path, hashlib.sha256(), told, stop)
    return {"bytes": size, "sha256": digest}


def intact(folder: Path, files: dict[str, dict[str, Any]]) -> bool:
    """Whether chunk files are as they were written."""
    for name, expected in files.items():
        try:
            size, digest = _hashed(folder / name, xxhash.xxh3_128(), lambda size: None)
        except FileNotFoundError:
            return False
        if {"bytes": size, "xxh3_128": digest} != expected:
            return False
    return True


def hashed_ahead(paths: Sequence[Path], told: Told) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Each file with its {bytes, sha256}; the next one is hashed in a thread while the caller works on this one."""
    stop = Event()
    with ThreadPoolExecutor(1) as pool:
        try:
            ahead = pool.submit(sha256, paths[0], told, stop)
            for path, following in zip(paths, [*paths[1:], None]):
                found = ahead.result()
                if following:
                    ahead = pool.submit(sha256, following, told, stop)
                yield path, found
        finally:
            stop.set()
