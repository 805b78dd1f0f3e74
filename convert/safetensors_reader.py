"""The safetensors format: eight bytes of header length, a JSON header, then the tensors without gaps."""

from collections import Counter
from math import prod
from pathlib import Path
from typing import Any

from convert.tensor import MOST_DIMENSIONS, ConvertError, SourceTensor, refuse_lfs_pointer, row_strides
from jaxinfer import json_text

_ITEM_BYTES = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2}
_ITEM_BYTES |= {"U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8}
_LONGEST_HEADER = json_text.LONGEST  # the format allows 100 MB, some 1,000,000 tensors


def open_safetensors(path: Path) -> dict[str, SourceTensor]:
    """Reads and checks the header: every tensor's place in the file.

    Raises:
      ConvertError: not a safetensors file, truncated, or a tensor whose bytes overlap another's, leave a gap, lie
        outside the file or do not fit its shape.
    """
    refuse_lfs_pointer(path)
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8:
            raise ConvertError(f"{path}: truncated: {size} bytes, too short for a safetensors header")
        if length > _LONGEST_HEADER:
            raise ConvertError(f"{path}: not a safetensors file: a header of {length} bytes")
        if 8 + length > size:
            raise ConvertError(f"{path}: truncated: {size} bytes, its header alone needs {8 + length}")
        raw = file.read(length)
    try:
        header = json_text.parse(raw, pairs=lambda pairs: _unique(path, pairs))
    except ConvertError:
        raise
    except ValueError as error:
        raise ConvertError(f"{path}: its safetensors header is damaged: {error}") from error
    if type(header) is not dict:
        raise ConvertError(f"{path}: its safetensors header is damaged: {type(header).__name__}, expected an object")
    entries = {name: _entry(path, name, entry) for name, entry in header.items() if name != "__metadata__"}
    return _checked(path, entries, 8 + length, size)


def _unique(path: Path, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise ConvertError(f"{path}: listed twice in the header: {twice}")
    return found


def _entry(path: Path, name: str, entry: Any) -> tuple[str, tuple[int, ...], int, int]:
    fields = entry if type(entry) is dict else {}
    dtype, shape, ends = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
    right = type(shape) is list and len(shape) <= MOST_DIMENSIONS and type(ends) is list and len(ends) == 2
    if not right or not all(type(number) is int and 0 <= number < 1 << 63 for number in (*shape, *ends)):
        legal = "a dtype, a shape and two data_offsets, of whole numbers from 0 up"
        raise ConvertError(f"{path}: its safetensors header is damaged: tensor {name} needs {legal}")
    if type(dtype) is not str or dtype not in _ITEM_BYTES:
        raise ConvertError(f"{path}: tensor {name} has the unknown dtype {dtype!r}")
    return dtype, tuple(shape), *ends


def _checked(path: Path, entries: dict[str, Any], data_start: int, size: int) -> dict[str, SourceTensor]:
    tensors, expected, before = {}, 0, "the header"
    for name, (dtype, shape, begin, end) in sorted(entries.items(), key=lambda item: item[1][2:]):
        if end - begin != prod(shape) * _ITEM_BYTES[dtype]:
            needs = prod(shape) * _ITEM_BYTES[dtype]
            raise ConvertError(f"{path}: tensor {name} has {end - begin} bytes, {dtype} {list(shape)} needs {needs}")
        if begin != expected:
            kind = "overlaps" if begin < expected else "leaves a gap after"
            raise ConvertError(f"{path}: tensor {name} (bytes {begin} to {end}) {kind} {before}; it ends at {expected}")
        if data_start + end > size:
            raise ConvertError(
                f"{path}: truncated: {size} bytes, but tensor {name} ends at byte {data_start + end}; download it again"
            )
        tensors[name] = SourceTensor(name, path, dtype, shape, data_start + begin, row_strides(shape))
        expected, before = end, f"tensor {name}"
    if data_start + expected != size:
        raise ConvertError(f"{path}: {size - data_start - expected} bytes follow {before}, the last in the header")
    return tensors
