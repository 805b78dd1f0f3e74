"""A tensor inside a weight file: where its bytes are and how they lie; read in blocks of rows, never through mmap."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import ml_dtypes
import numpy as np

DTYPES = {
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
}
BLOCK = 16 << 20
MOST_DIMENSIONS = 64  # as many as numpy and PyTorch know


class ConvertError(ValueError):
    """A source or an output folder that cannot be converted as asked: the message names the file and what is wrong."""


@dataclass(frozen=True)
class SourceTensor:
    """`offset` in bytes from the start of the file to the first element, `strides` in elements, dtype as safetensors
    names it."""

    name: str
    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    strides: tuple[int, ...]

    @property
    def size(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * DTYPES[self.dtype].itemsize

    @property
    def contiguous(self) -> bool:
        return self.strides == row_strides(self.shape)


def row_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides in elements of an array that lies row by row without gaps."""
    return tuple(prod(shape[index + 1 :]) for index in range(len(shape)))


def refuse_lfs_pointer(path: Path) -> None:
    with open(path, "rb") as file:
        if file.read(40).startswith(b"version https://git-lfs.github.com"):
            raise ConvertError(f"{path}: a git-lfs pointer, not the weights; fetch them with: git lfs pull")


def blocks(tensor: SourceTensor) -> Iterator[tuple[int, np.ndarray]]:
    """The tensor in row order: (first row, its rows as an array [rows, ...]), about 16 MB each.

    One that does not lie row by row is held whole while it is read.
    """
    dtype = DTYPES[tensor.dtype]
    if not tensor.size:
        return
    with open(tensor.path, "rb", buffering=0) as file:
        extent = _extent(tensor, file.seek(0, 2))
        if not tensor.contiguous:
            flat = np.empty(extent, dtype)
            _read(file, tensor, tensor.offset, flat)
            strides = [stride * dtype.itemsize for stride in tensor.strides]
            whole = np.lib.stride_tricks.as_strided(flat, tensor.shape, strides, writeable=False)
        row = prod(tensor.shape[1:])
        step = max(1, BLOCK // max(1, row * dtype.itemsize))
        for start in range(0, tensor.shape[0], step):
            rows = min(step, tensor.shape[0] - start)
            if tensor.contiguous:
                block = np.empty((rows, *tensor.shape[1:]), dtype)
                _read(file, tensor, tensor.offset + start * row * dtype.itemsize, block)
            else:
                block = whole[start : start + rows]
            yield start, block


def _extent(tensor: SourceTensor, file_bytes: int) -> int:
    """How many elements lie from the first to the last. as_strided looks at no bounds: what is refused here is what
    keeps it inside of them."""
    if len(tensor.strides) != len(tensor.shape) or min((tensor.offset, *tensor.shape, *tensor.strides)) < 0:
        what = f"offset {tensor.offset}, shape {tensor.shape}, strides {tensor.strides}"
        raise ConvertError(f"{tensor.path}: tensor {tensor.name}: {what} cannot be")
    extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.strides))
    if tensor.offset + extent * DTYPES[tensor.dtype].itemsize > file_bytes:
        raise ConvertError(f"{tensor.path}: truncated: tensor {tensor.name} ends beyond the file")
    return extent


def _read(file, tensor: SourceTensor, offset: int, into: np.ndarray) -> None:
    file.seek(offset)
    data = memoryview(into.reshape(-1).view(np.uint8))
    while data:
        count = file.readinto(data)
        if not count:
            raise ConvertError(f"{tensor.path}: truncated: it ends inside tensor {tensor.name}")
        data = data[count:]
