"""One tensor: read and cast in blocks, compared bit for bit."""

from collections.abc import Callable

import numpy as np

from convert.tensor import ConvertError, SourceTensor, blocks
from jaxinfer.checkpoint.reader import DTYPES

Told = Callable[[int], object]


def read_tensor(tensor: SourceTensor, dtype: str, told: Told = lambda size: None) -> np.ndarray:
    """The whole tensor as an array of `dtype`; `told` hears the source bytes of each block."""
    whole = np.empty(tensor.shape, DTYPES[dtype])
    bits = _bits(whole)
    for start, block in blocks(tensor):
        bits[start : start + len(block)] = _bits(_cast(block, dtype, tensor))
        told(block.nbytes)
    return whole


def same_bits(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether two arrays of one dtype hold the same numbers, NaN and all."""
    return np.array_equal(_bits(one), _bits(other))


def same_tensors(one: SourceTensor, other: SourceTensor) -> bool:
    """Whether two tensors of the source are equal bit for bit."""
    if (one.path, one.offset, one.strides) == (other.path, other.offset, other.strides):
        return True
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    return all(np.array_equal(_bits(a), _bits(b)) for (_, a), (_, b) in zip(blocks(one), blocks(other)))


def _bits(array: np.ndarray) -> np.ndarray:
    return array.view(np.dtype(f"u{array.dtype.itemsize}"))


def _cast(block: np.ndarray, dtype: str, tensor: SourceTensor) -> np.ndarray:
    if block.dtype == DTYPES[dtype]:
        return block
    with np.errstate(over="ignore"):
        cast = block.astype(DTYPES[dtype])
    over = np.isinf(cast) & np.isfinite(block)
    if over.any():
        worst = np.abs(block[over].astype(np.float64)).max()
        raise ConvertError(
            f"{tensor.path}: tensor {tensor.name} does not fit {dtype}: {over.sum()} numbers in one block overflow to "
            f"infinity, the largest is {worst:g}; choose --dtype bfloat16 or float32"
        )
    return cast
