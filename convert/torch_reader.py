"""PyTorch's zip format (torch.save since 1.6), read without running the code that its pickle may hold.

The pickle describes a dict of tensors; it may name a handful of constructors, each replaced here by one of ours that
only notes shapes and places. Any other name is refused before it is looked up."""

import io
import pickle
import struct
import zipfile
from collections import OrderedDict
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from convert.tensor import ConvertError, SourceTensor, refuse_lfs_pointer

_LONGEST_PICKLE = 256 << 20
_STORAGES = {
    "BFloat16Storage": ("BF16", 2),
    "HalfStorage": ("F16", 2),
    "FloatStorage": ("F32", 4),
    "DoubleStorage": ("F64", 8),
    "BoolStorage": ("BOOL", 1),
    "ByteStorage": ("U8", 1),
    "CharStorage": ("I8", 1),
    "ShortStorage": ("I16", 2),
    "IntStorage": ("I32", 4),
    "LongStorage": ("I64", 8),
}


@dataclass(frozen=True)
class _StorageType:
    dtype: str
    itemsize: int


@dataclass(frozen=True)
class _Storage:
    type: _StorageType
    key: str
    size: int


@dataclass(frozen=True)
class _Tensor:
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def _rebuild_tensor(storage: Any, offset: Any, shape: Any, strides: Any, *rest: Any) -> _Tensor:
    numbers = (offset, *shape, *strides)
    if not isinstance(storage, _Storage) or not all(isinstance(number, int) and number >= 0 for number in numbers):
        raise pickle.UnpicklingError(f"a tensor of {storage}, offset {offset}, shape {shape}, strides {strides}")
    if len(shape) != len(strides):
        raise pickle.UnpicklingError(f"a tensor of shape {shape} with strides {strides}")
    return _Tensor(storage, offset, tuple(shape), tuple(strides))


def _rebuild_parameter(tensor: Any, *rest: Any) -> Any:
    return tensor


_ALLOWED = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
} | {("torch", name): _StorageType(*storage) for name, storage in _STORAGES.items()}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which plain weights do not need: refused, not run")
        return _ALLOWED[module, name]

    def persistent_load(self, pid: Any) -> _Storage:
        kind, storage_type, key, _, size = pid
        if kind != "storage" or not isinstance(storage_type, _StorageType) or not isinstance(size, int):
            raise pickle.UnpicklingError(f"an unknown storage: {pid!r}")
        return _Storage(storage_type, str(key), size)


def open_torch(path: Path) -> dict[str, SourceTensor]:
    """Every tensor of a state dict and its place in the file.

    Raises:
      ConvertError: an old format (not a zip), truncated, big-endian, a pickle that names anything but tensors, or a
        tensor that reaches beyond its storage.
    """
    refuse_lfs_pointer(path)
    _refuse_other_formats(path)
    try:
        with zipfile.ZipFile(path) as archive:
            return _tensors(path, archive)
    except zipfile.BadZipFile as error:
        raise ConvertError(f"{path}: truncated or damaged zip file: {error}; download it again") from error


def _refuse_other_formats(path: Path) -> None:
    with open(path, "rb") as file:
        start = file.read(4)
    if start[:2] == b"\x80\x02":
        raise ConvertError(
            f"{path}: the format of PyTorch before 1.6 (a bare pickle), not supported; write it again with a newer "
            f"PyTorch: torch.save(torch.load(old, weights_only=True), new)"
        )
    if start != b"PK\x03\x04":
        raise ConvertError(f"{path}: not a PyTorch file: it starts with {start!r}, a zip starts with b'PK\\x03\\x04'")


def _tensors(path: Path, archive: zipfile.ZipFile) -> dict[str, SourceTensor]:
    entries = {info.filename: info for info in archive.infolist()}
    roots = [name.removesuffix("data.pkl") for name in entries if name.endswith("/data.pkl")]
    if len(roots) != 1:
        raise ConvertError(f"{path}: not a torch.save file: {len(roots)} entries named data.pkl")
    root = roots[0]
    if f"{root}byteorder" in entries and archive.read(f"{root}byteorder").strip() != b"little":
        raise ConvertError(f"{path}: written on a big-endian machine, not supported")
    described = entries[f"{root}data.pkl"]
    if described.file_size > _LONGEST_PICKLE:
        raise ConvertError(f"{path}: its data.pkl has {described.file_size} bytes: not plain weights")
    state = _unpickled(path, archive.read(described))
    tensors = {}
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, _Tensor):
            raise ConvertError(f"{path}: {name!r} is {type(value).__name__}, not a tensor: not a plain state dict")
        entry = entries.get(f"{root}data/{value.storage.key}")
        tensors[name] = _placed(path, name, value, entry)
    return tensors


def _unpickled(path: Path, data: bytes) -> dict[Any, Any]:
    try:
        state = _Unpickler(io.BytesIO(data)).load()
    except Exception as error:  # a hostile pickle can make the machine fail in any way
        raise ConvertError(f"{path}: its pickle cannot be read as plain weights: {error}") from error
    if not isinstance(state, dict):
        raise ConvertError(f"{path}: holds {type(state).__name__}, not a state dict of tensors")
    return state


def _placed(path: Path, name: str, tensor: _Tensor, entry: zipfile.ZipInfo | None) -> SourceTensor:
    storage = tensor.storage
    if entry is None:
        raise ConvertError(f"{path}: tensor {name}: its storage {storage.key} is not in the file")
    needs = storage.size * storage.type.itemsize
    if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != needs:
        raise ConvertError(
            f"{path}: tensor {name}: its storage has {entry.file_size} bytes (zip method {entry.compress_type}), "
            f"expected {needs}, stored without compression"
        )
    last = tensor.offset + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.strides))
    if prod(tensor.shape) and last >= storage.size:
        raise ConvertError(f"{path}: tensor {name} reaches element {last} of a storage of {storage.size}")
    start = _data_start(path, entry)
    if start + needs > path.stat().st_size:
        raise ConvertError(f"{path}: truncated: tensor {name} ends beyond the file")
    offset = start + tensor.offset * storage.type.itemsize
    return SourceTensor(name, path, storage.type.dtype, tensor.shape, offset, tensor.strides)


def _data_start(path: Path, entry: zipfile.ZipInfo) -> int:
    # zip's local header (APPNOTE 4.3.7): its own name and extra lengths, which differ from the directory's
    with open(path, "rb") as file:
        file.seek(entry.header_offset)
        header = file.read(30)
    if len(header) < 30 or header[:4] != b"PK\x03\x04":
        raise ConvertError(f"{path}: damaged zip file: no local header of {entry.filename}")
    name_length, extra_length = struct.unpack("<HH", header[26:30])
    return entry.header_offset + 30 + name_length + extra_length
