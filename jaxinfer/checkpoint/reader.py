"""Reading slices of leaves: only the chunk files that a slice touches, whole and in order, checksums checked."""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from io import FileIO
from itertools import product
from math import prod
from pathlib import Path

import numpy as np
import xxhash

from jaxinfer.checkpoint.entries import DTYPES
from jaxinfer.checkpoint.files import MEND, CheckpointError, DamagedError
from jaxinfer.checkpoint.manifest import PARAMS, Manifest, read_manifest

BLOCK = 4 << 20  # one read: large for a parallel file system, small enough to be checked and copied out of the cache

Slices = tuple[slice, ...]
Bounds = list[tuple[int, int]]


@dataclass(frozen=True)
class Cut:
    """What one chunk file gives to a slice: the part `source` of the chunk is the part `target` of the result."""

    file: str
    leaf: str
    source: Slices
    target: Slices


class Reader:
    """A checkpoint open for reading. `manifest` is its manifest, read from the folder unless given; `bytes_read` counts
    the bytes of chunk files read."""

    def __init__(self, folder: str | Path, manifest: Manifest | None = None):
        self.folder = Path(folder)
        self.manifest = manifest or read_manifest(folder)
        self.bytes_read = 0

    def read(self, leaf: str, index: Slices, out: np.ndarray | None = None) -> np.ndarray:
        """The part of a leaf that `index` cuts out, one slice of step 1 per dimension.

        It is written into `out` where given, any view of the right shape, cast to its dtype. Beside the result, one
        block of a chunk is held (`read_file`).

        Raises:
          KeyError: no such leaf.
          CheckpointError: a chunk file is missing, truncated, changed or cannot be read; the message names it
        """
        shape = tuple(stop - start for start, stop in self._bounds(leaf, index))
        out = np.empty(shape, DTYPES[self.manifest.leaves[leaf]["dtype"]]) if out is None else out
        if out.shape != shape:
            raise ValueError(f"{leaf}: the slice has shape {shape}, the array to fill {out.shape}")
        for cut in self.cuts(leaf, index):
            self.read_file(cut.file, leaf, [(cut.source, out[cut.target])], self.count)
        return out

    def cuts(self, leaf: str, index: Slices) -> list[Cut]:
        """The chunk files that a slice touches, in order."""
        touched = _touched(self._bounds(leaf, index), tuple(self.manifest.leaves[leaf]["chunks"]))
        return [Cut(f"{PARAMS}/{leaf}/{'.'.join(map(str, key))}", leaf, *parts) for key, *parts in touched]

    def count(self, size: int) -> None:
        self.bytes_read += size

    def read_file(
        self, file: str, leaf: str, parts: Sequence[tuple[Slices, np.ndarray]], read: Callable[[int], None]
    ) -> None:
        """Reads and checks a whole chunk file, and copies `chunk[source]` into `out` for each (source, out) of `parts`.

        It goes in blocks of whole rows of about 4 MiB (one row, where that is larger), each checked and copied while it
        is in the processor's cache; `read` is told the size of each. Where an `out` takes the whole chunk as it is, the
        file is read straight into it; else one block is held.

        Raises CheckpointError as `read` does; the parts are then filled in part.
        """
        info, path = self.manifest.leaves[leaf], self.folder / file
        dtype, shape = DTYPES[info["dtype"]], tuple(info["chunks"])
        row = prod(shape[1:]) * dtype.itemsize
        size, rows = shape[0] * row, max(1, BLOCK // row)
        expected = self.manifest.files.get(file)
        if expected is None or expected["bytes"] != size:
            found = "no entry" if expected is None else f"{expected['bytes']} bytes"
            raise DamagedError(f"{path}: damaged, the manifest has {found} for it, its leaf needs {size} bytes; {MEND}")
        same = (out for _, out in parts if out.shape == shape and out.dtype == dtype and out.flags.c_contiguous)
        whole = next(same, None)
        scratch = np.empty((min(rows, shape[0]), *shape[1:]), dtype) if whole is None else None
        checksum = xxhash.xxh3_128()
        try:
            handle = open(path, "rb", buffering=0)
        except FileNotFoundError:
            raise DamagedError(f"{path}: missing; {MEND}") from None
        with handle:
            if (found := os.fstat(handle.fileno()).st_size) != size:
                raise _wrong_size(path, found, size)
            for start in range(0, shape[0], rows):
                stop = min(start + rows, shape[0])
                block = scratch[: stop - start] if whole is None else whole[start:stop]
                data = memoryview(block.reshape(-1).view(np.uint8))
                try:
                    got = _read_into(handle, data)
                except OSError as error:  # of a failing disk or server: it does not say which file
                    raise CheckpointError(f"{path}: cannot be read at byte {start * row}: {error.strerror}") from error
                if got != len(data):
                    raise _wrong_size(path, start * row + got, size)
                checksum.update(data)
                for source, out in parts:
                    if out is not whole:
                        _copy_rows(block, start, stop, source, out)
                read(len(data))
            if handle.read(1):
                raise _wrong_size(path, os.fstat(handle.fileno()).st_size, size)
        if checksum.hexdigest() != expected["xxh3_128"]:
            raise DamagedError(f"{path}: its bytes changed since it was written (xxh3_128 differs); {MEND}")

    def _bounds(self, leaf: str, index: Slices) -> Bounds:
        shape = self.manifest.leaves[leaf]["shape"]
        bounds = [each.indices(size) for each, size in zip(index, shape, strict=True)]
        if any(step != 1 for _, _, step in bounds):
            raise ValueError(f"{leaf}: slices must have step 1, got {index}")
        return [(start, max(start, stop)) for start, stop, _ in bounds]


def _wrong_size(path: Path, found: int, expected: int) -> CheckpointError:
    kind = "truncated" if found < expected else "longer than it was written"
    return DamagedError(f"{path}: {kind}: {found} bytes, expected {expected}; {MEND}")


def _read_into(file: FileIO, data: memoryview) -> int:
    done = 0
    while done < len(data) and (count := file.readinto(data[done:])):
        done += count
    return done


def _copy_rows(block: np.ndarray, start: int, stop: int, source: Slices, out: np.ndarray) -> None:
    """Copies what the rows `start` to `stop` of a chunk (the block) hold of `chunk[source]` to its place in `out`."""
    first, *others = source
    low, high = max(start, first.start), min(stop, first.stop)
    if low < high:
        out[low - first.start : high - first.start] = block[(slice(low - start, high - start), *others)]


def _touched(bounds: Bounds, chunks: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], Slices, Slices]]:
    """Per chunk that the bounds touch: its key, the part of the chunk, and the part of the result that it fills."""

    def along(start: int, stop: int, size: int) -> Iterator[tuple[int, slice, slice]]:
        for key in range(start // size, -(-stop // size) if stop > start else start // size):
            low, high = max(start, key * size), min(stop, (key + 1) * size)
            yield key, slice(low - key * size, high - key * size), slice(low - start, high - start)

    for parts in product(*(list(along(start, stop, size)) for (start, stop), size in zip(bounds, chunks))):
        keys, source, target = zip(*parts)
        yield keys, source, target
