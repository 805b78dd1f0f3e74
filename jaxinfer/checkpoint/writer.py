"""Leaves on disk: one folder per leaf, zarr version 2, uncompressed, in the form that Orbax restores (no OCDBT)."""

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from itertools import product
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from jaxinfer.checkpoint.files import sync_folder, write_whole

PIECES = 8
PARTIAL = ".partial"
_CUT_AXES = ("vocab", "heads", "kv_heads", "mlp")
_BLOCK = 4 << 20


def chunk_shape(shape: Sequence[int], axes: Sequence[str | None]) -> tuple[int, ...]:
    """The shape of one chunk file: up to eight pieces along the axis that tensor parallelism cuts, other axes whole.

    Tensor parallelism by 1, 2, 4 or 8 then reads whole chunks. A vocabulary may not divide: it is cut into rows of
    ceil(V/8), which is also how it is padded over 8 devices.
    """
    chunk = list(shape)
    for index, axis in enumerate(axes):
        if axis == "vocab":
            chunk[index] = ceil(shape[index] / PIECES)
        elif axis in _CUT_AXES:
            chunk[index] = shape[index] // next(n for n in (8, 4, 2, 1) if shape[index] % n == 0)
    return tuple(chunk)


def zarr_dtype(dtype: np.dtype) -> str:
    """numpy has no bfloat16 of its own: Orbax and tensorstore write its name where zarr has ``<f4``."""
    return dtype.name if dtype.name == "bfloat16" else dtype.newbyteorder("<").str


def write_leaf(
    params_dir: str | Path, name: str, array: np.ndarray, chunks: Sequence[int]
) -> dict[str, dict[str, Any]]:
    """Writes one leaf beside its place, makes it durable, then renames it there (over an older one).

    Memory beyond `array` is a few MB. Returns, per chunk file (relative to the checkpoint folder), bytes and xxh3_128.
    """
    params_dir = Path(params_dir)
    aside, place = params_dir / (name + PARTIAL), params_dir / name
    for old in (aside, place):
        shutil.rmtree(old, ignore_errors=True)
    aside.mkdir(parents=True)
    files = {}
    for key in product(*(range(ceil(size / chunk)) for size, chunk in zip(array.shape, chunks, strict=True))):
        file = ".".join(map(str, key))
        files[f"{params_dir.name}/{name}/{file}"] = _write_chunk(aside / file, array, key, chunks)
    meta = {
        "zarr_format": 2,
        "shape": list(array.shape),
        "chunks": list(chunks),
        "dtype": zarr_dtype(array.dtype),
        "compressor": None,
        "fill_value": None,
        "filters": None,
        "order": "C",
        "dimension_separator": ".",
    }
    write_whole(aside / ".zarray", json.dumps(meta).encode())  # syncs the folder, so the chunks' names too
    os.rename(aside, place)
    sync_folder(params_dir)
    return files


def _write_chunk(path: Path, array: np.ndarray, key: Sequence[int], chunks: Sequence[int]) -> dict[str, Any]:
    view = array[tuple(slice(k * chunk, (k + 1) * chunk) for k, chunk in zip(key, chunks))]
    checksum, size = xxhash.xxh3_128(), 0
    with open(path, "wb", buffering=0) as file:
        for block in _blocks(view, chunks):
            data = memoryview(block.reshape(-1).view(np.uint8))
            checksum.update(data)
            size += len(data)
            while data:
                data = data[file.write(data) :]
        os.fsync(file.fileno())
    return {"bytes": size, "xxh3_128": checksum.hexdigest()}


def _blocks(view: np.ndarray, chunks: Sequence[int]) -> Iterator[np.ndarray]:
    """The chunk in C order as contiguous blocks of rows; an edge chunk is padded with zeros to its full shape."""
    rows = max(1, _BLOCK // max(1, view[:1].nbytes))
    for start in range(0, chunks[0], rows):
        block = view[start : start + rows]
        full = (min(rows, chunks[0] - start), *chunks[1:])
        if block.shape != full:
            padded = np.zeros(full, view.dtype)
            padded[tuple(map(slice, block.shape))] = block
            block = padded
        yield np.ascontiguousarray(block)


def write_orbax_metadata(params_dir: str | Path, names: Sequence[str]) -> None:
    """What Orbax needs to restore the folder by itself as a flat dict of numpy arrays: the tree, and who reads it."""
    tree = {
        str((name,)): {
            "key_metadata": [{"key": name, "key_type": 2}],
            "value_metadata": {"value_type": "np.ndarray", "skip_deserialize": False},
        }
        for name in names
    }
    meta = {"tree_metadata": tree, "use_ocdbt": False, "use_zarr3": False, "custom_metadata": None}
    write_whole(Path(params_dir) / "_METADATA", json.dumps(meta).encode())
