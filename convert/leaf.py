"""One tensor into one leaf: cast and compared in blocks, so that only the leaf itself is held whole."""

from collections.abc import Callable, Iterator

import numpy as np

from convert.llama import Target
from convert.tensor import ConvertError, SourceTensor, blocks
from jaxinfer.checkpoint.reader import DTYPES

Told = Callable[[int], object]


def read_leaf(tensor: SourceTensor, target: Target, dtype: str, told: Told = lambda size: None) -> np.ndarray:
    """The leaf as an array of `dtype`; `told` hears the source bytes of each block."""
    leaf = np.empty(target.spec.shape, DTYPES[dtype])
    flat = _bits(leaf).reshape(target.source_shape)
    for start, block in _cast_blocks(tensor, dtype, told):
        flat[start : start + len(block)] = block
    return leaf


def same_as_source(leaf: np.ndarray, tensor: SourceTensor, target: Target, told: Told = lambda size: None) -> bool:
    """Whether the leaf holds the tensor, bit for bit after the cast to the leaf's dtype."""
    flat = _bits(leaf).reshape(target.source_shape)
    blocks_of = _cast_blocks(tensor, leaf.dtype.name, told)
    return all(np.array_equal(flat[start : start + len(block)], block) for start, block in blocks_of)


def same_tensors(one: SourceTensor, other: SourceTensor) -> bool:
    """Whether two tensors of the source are equal bit for bit."""
    if (one.path, one.offset, one.strides) == (other.path, other.offset, other.strides):
        return True
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    return all(np.array_equal(_bits(a), _bits(b)) for (_, a), (_, b) in zip(blocks(one), blocks(other)))


def _bits(array: np.ndarray) -> np.ndarray:
    return array.view(np.dtype(f"u{array.dtype.itemsize}"))


def _cast_blocks(tensor: SourceTensor, dtype: str, told: Told) -> Iterator[tuple[int, np.ndarray]]:
    for start, block in blocks(tensor):
        yield start, _bits(_cast(block, dtype, tensor))
        told(block.nbytes)


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
