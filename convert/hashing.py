"""Hashes of files. A source file is hashed while the one before it is converted, which also warms the page cache."""

import hashlib
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

import xxhash

from convert.torch_reader import sections

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
    """Of a source file, {bytes, sha256}. The same reading checks the CRC-32 of every entry of a ``.bin``.

    Raises:
      ConvertError: an entry has another.
    """
    size, digest = _hashed(path, _Checked(path) if path.suffix == ".bin" else hashlib.sha256(), told, stop)
    return {"bytes": size, "sha256": digest}


class _Checked:
    """SHA-256 of a zip file's bytes, which come in order, and the check of each entry that is complete."""

    def __init__(self, path: Path):
        self.path, self.hasher = path, hashlib.sha256()
        self.waiting = sections(path)[::-1]
        self.place, self.crc = 0, 0

    def update(self, data: memoryview) -> None:
        self.hasher.update(data)
        end = self.place + len(data)
        while self.waiting and self.waiting[-1].start < end:
            section = self.waiting[-1]
            stop = section.start + section.size
            self.crc = zlib.crc32(data[max(0, section.start - self.place) : min(stop, end) - self.place], self.crc)
            if stop > end:
                break
            section.check(self.path, self.crc)
            self.waiting.pop()
            self.crc = 0
        self.place = end

    def hexdigest(self) -> str:
        return self.hasher.hexdigest()


def intact(folder: Path, files: dict[str, dict[str, Any]] | None) -> bool:
    """Whether files are known, are there, can be read and are as they were written."""
    if files is None:
        return False
    try:
        if any((folder / name).stat().st_size != expected["bytes"] for name, expected in files.items()):
            return False
        for name, expected in files.items():
            _, digest = _hashed(folder / name, xxhash.xxh3_128(), lambda size: None)
            if digest != expected["xxh3_128"]:
                return False
    except OSError:
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
