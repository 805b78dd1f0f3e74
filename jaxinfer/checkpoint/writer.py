"""Leaves on disk: one folder per leaf, zarr version 2, uncompressed, in the form that Orbax restores (no OCDBT)."""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from jaxinfer.checkpoint.files import sync_folder, write_all, write_whole
from jaxinfer.checkpoint.manifest import PARAMS

PIECES = 8
ZARRAY, METADATA = ".zarray", "_METADATA"
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
    for file, view in _views(array, chunks):
        with open(aside / file, "wb", buffering=0) as handle:
            files[f"{params_dir.name}/{name}/{file}"] = _described(view, chunks, partial(write_all, handle))
            os.fsync(handle.fileno())
    meta = zarr_meta(array.shape, chunks, array.dtype)
    write_whole(aside / ZARRAY, meta)  # syncs the folder, so the chunks' names too
    os.rename(aside, place)
    sync_folder(params_dir)
    return files


def describe_leaf(name: str, array: np.ndarray, chunks: Sequence[int]) -> dict[str, dict[str, Any]]:
    """What `write_leaf` into a folder `PARAMS` would return."""
    return {f"{PARAMS}/{name}/{file}": _described(view, chunks) for file, view in _views(array, chunks)}


def chunk_files(name: str, shape: Sequence[int], chunks: Sequence[int]) -> list[str]:
    """The chunk files of a leaf, relative to the checkpoint folder."""
    return [f"{PARAMS}/{name}/{'.'.join(map(str, key))}" for key in _keys(shape, chunks)]


def zarr_meta(shape: Sequence[int], chunks: Sequence[int], dtype: np.dtype) -> bytes:
    """A leaf's ``.zarray``."""
    meta = {
        "zarr_format": 2,
        "shape": list(shape),
        "chunks": list(chunks),
        "dtype": zarr_dtype(dtype),
        "compressor": None,
        "fill_value": None,
        "filters": None,
        "order": "C",
        "dimension_separator": ".",
    }
    return json.dumps(meta).encode()


def _keys(shape: Sequence[int], chunks: Sequence[int]) -> Iterator[tuple[int, ...]]:
    return product(*(range(ceil(size / chunk)) for size, chunk in zip(shape, chunks, strict=True)))


def _views(array: np.ndarray, chunks: Sequence[int]) -> Iterator[tuple[str, np.ndarray]]:
    """Each chunk's file name and numbers, without padding."""
    for key in _keys(array.shape, chunks):
        view = array[tuple(slice(k * chunk, (k + 1) * chunk) for k, chunk in zip(key, chunks))]
        yield ".".join(map(str, key)), view


def _described(
    view: np.ndarray, chunks: Sequence[int], write: Callable[[memoryview], None] = lambda data: None
) -> dict[str, Any]:
    checksum, size = xxhash.xxh3_128(), 0
    for block in _blocks(view, chunks):
        data = memoryview(block.reshape(-1).view(np.uint8))
        checksum.update(data)
        size += len(data)
        write(data)
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


def orbax_metadata(names: Sequence[str]) -> bytes:
    """What Orbax needs to restore the folder by itself as a flat dict of numpy arrays: the tree, and who reads it."""
    tree = {
        str((name,)): {
            "key_metadata": [{"key": name, "key_type": 2}],
            "value_metadata": {"value_type": "np.ndarray", "skip_deserialize": False},
        }
        for name in names
    }
    meta = {"tree_metadata": tree, "use_ocdbt": False, "use_zarr3": False, "custom_metadata": None}
    return json.dumps(meta).encode()
