"""Reading slices of leaves: only the chunk files that a slice touches, whole and in order, checksums checked."""

from collections.abc import Iterator
from itertools import product
from pathlib import Path

import ml_dtypes
import numpy as np
import xxhash

from jaxinfer.checkpoint.files import CheckpointError
from jaxinfer.checkpoint.manifest import PARAMS, Manifest, read_manifest

DTYPES = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": np.dtype(np.float16), "float32": np.dtype(np.float32)}


class Reader:
    """A checkpoint open for reading. `manifest` is its manifest, read from the folder unless given; `bytes_read` counts
    the bytes of chunk files read."""

    def __init__(self, folder: str | Path, manifest: Manifest | None = None):
        self.folder = Path(folder)
        self.manifest = manifest or read_manifest(folder)
        self.bytes_read = 0

    def read(self, leaf: str, index: tuple[slice, ...], out: np.ndarray | None = None) -> np.ndarray:
        """The part of a leaf that `index` cuts out, one slice of step 1 per dimension.

        It is written into `out` where given, any view of the right shape, cast to its dtype. Chunks that lie together
        in the result are read straight into it; for all others one chunk is held beside it.

        Raises:
          KeyError: no such leaf.
          CheckpointError: a chunk file is missing, truncated or changed; the message names it and says which.
        """
        info = self.manifest.leaves[leaf]
        dtype, chunks = DTYPES[info["dtype"]], tuple(info["chunks"])
        bounds = [each.indices(size) for each, size in zip(index, info["shape"], strict=True)]
        if any(step != 1 for _, _, step in bounds):
            raise ValueError(f"{leaf}: slices must have step 1, got {index}")
        bounds = [(start, max(start, stop)) for start, stop, _ in bounds]
        shape = tuple(stop - start for start, stop in bounds)
        out = np.empty(shape, dtype) if out is None else out
        if out.shape != shape:
            raise ValueError(f"{leaf}: the slice has shape {shape}, the array to fill {out.shape}")
        scratch = None
        for key, source, target in _touched(bounds, chunks):
            part = out[target]
            whole = part.shape == chunks and part.flags.c_contiguous and part.dtype == dtype
            if not whole and scratch is None:
                scratch = np.empty(chunks, dtype)
            chunk = part if whole else scratch
            self._read_file(f"{PARAMS}/{leaf}/{'.'.join(map(str, key))}", chunk)
            if not whole:
                part[...] = chunk[source]
        return out

    def _read_file(self, name: str, into: np.ndarray) -> None:
        path, data = self.folder / name, memoryview(into.reshape(-1).view(np.uint8))
        expected = self.manifest.files.get(name)
        if expected is None or expected["bytes"] != len(data):
            found = "no entry" if expected is None else f"{expected['bytes']} bytes"
            raise CheckpointError(f"{path}: the manifest has {found} for it, its leaf needs {len(data)} bytes: damaged")
        try:
            read = read_into(path, data)
        except FileNotFoundError:
            raise CheckpointError(f"{path}: missing; convert the model again") from None
        if read != len(data):
            kind = "truncated" if read < len(data) else "longer than it was written"
            raise CheckpointError(f"{path}: {kind}: {path.stat().st_size} bytes, expected {len(data)}")
        self.bytes_read += read
        if xxhash.xxh3_128_hexdigest(data) != expected["xxh3_128"]:
            raise CheckpointError(f"{path}: its bytes changed since it was written (xxh3_128 differs); convert again")


def read_into(path: Path, data: memoryview) -> int:
    """Fills `data` from the start of a file with plain reads; a result above its length means that more follows."""
    done = 0
    with open(path, "rb", buffering=0) as file:
        while done < len(data) and (count := file.readinto(data[done:])):
            done += count
        return done + len(file.read(1))


Bounds = list[tuple[int, int]]
Cut = tuple[slice, ...]


def _touched(bounds: Bounds, chunks: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], Cut, Cut]]:
    """Per chunk that the bounds touch: its key, the part of the chunk, and the part of the result that it fills."""

    def along(start: int, stop: int, size: int) -> Iterator[tuple[int, slice, slice]]:
        for key in range(start // size, -(-stop // size) if stop > start else start // size):
            low, high = max(start, key * size), min(stop, (key + 1) * size)
            yield key, slice(low - key * size, high - key * size), slice(low - start, high - start)

    for parts in product(*(list(along(start, stop, size)) for (start, stop), size in zip(bounds, chunks))):
        keys, source, target = zip(*parts)
        yield keys, source, target
