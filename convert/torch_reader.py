"""PyTorch's zip format (torch.save since 1.6), read without running the code that its pickle may hold.

The pickle describes a dict of tensors; it may name a handful of constructors, each replaced here by one of ours that
only notes shapes and places (`unpickle`). The zip's directory is read by the standard library, what it tells of by
us: every entry is stored, so that no byte is read that is not in the file."""

import struct
import zipfile
import zlib
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from convert.tensor import MOST_DIMENSIONS, ConvertError, SourceTensor, refuse_lfs_pointer
from convert.unpickle import PickleError, unpickle

_LONGEST_PICKLE = 4 << 20  # some 30,000 tensors
_MOST_REPEATED = 64 << 20
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


class _StorageType(NamedTuple):
    dtype: str
    itemsize: int


class _Storage(NamedTuple):
    type: _StorageType
    key: str
    size: int


class _Tensor(NamedTuple):
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def _counts(values: Any) -> bool:
    return type(values) is tuple and all(type(value) is int and 0 <= value < 1 << 63 for value in values)


def _rebuild_tensor(
    storage: Any = None, offset: Any = None, shape: Any = None, strides: Any = None, *rest: Any
) -> _Tensor:
    if type(storage) is not _Storage or not _counts((offset,)) or not _counts(shape) or not _counts(strides):
        raise PickleError(
            "a tensor whose storage, offset, shape or strides are none: sizes are whole numbers from 0 up"
        )
    if len(shape) != len(strides) or len(shape) > MOST_DIMENSIONS:
        raise PickleError(f"a tensor of {len(shape)} dimensions with {len(strides)} strides")
    if any(rest[2:]):  # after requires_grad and hooks: bits that say that the numbers count as negated or conjugate
        raise PickleError("a tensor whose numbers mean others than they are (negated, conjugate)")
    return _Tensor(storage, offset, shape, strides)


def _rebuild_parameter(tensor: Any = None, *rest: Any) -> _Tensor:
    if type(tensor) is not _Tensor:
        raise PickleError("a parameter of what is no tensor")
    return tensor


def _ordered_dict(*rest: Any) -> dict[str, Any]:
    if rest:
        raise PickleError("an OrderedDict that is not made empty")
    return {}


_NAMES = {
    "collections OrderedDict": _ordered_dict,
    "torch._utils _rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils _rebuild_parameter": _rebuild_parameter,
} | {f"torch {name}": _StorageType(*storage) for name, storage in _STORAGES.items()}


def _storage(pid: Any) -> _Storage:
    if type(pid) is not tuple or len(pid) != 5 or type(pid[0]) is not str or pid[0] != "storage":
        raise PickleError("a storage that is described as no storage is")
    _, kind, key, _, size = pid
    if type(kind) is not _StorageType or type(key) is not str or not _counts((size,)):
        raise PickleError("a storage whose type, key or size is none")
    return _Storage(kind, key, size)


@dataclass(frozen=True)
class Section:
    """An entry of the zip: where its bytes are in the file, and what their CRC-32 is; None where none was written."""

    name: str
    start: int
    size: int
    crc: int | None

    def check(self, path: Path, found: int) -> None:
        """Raises ConvertError where `found`, of the bytes that were read, is not the entry's CRC-32."""
        if self.crc not in (None, found):
            what = f"CRC-32 of {self.name}: found {found:08x}, the file says {self.crc:08x}"
            raise ConvertError(f"{path}: damaged: {what}; download it again")


def open_torch(path: Path) -> dict[str, SourceTensor]:
    """Every tensor of a state dict and its place in the file. The tensors' own bytes are not looked at: `sections`.

    Raises:
      ConvertError: an old format (not a zip), truncated, damaged, compressed, big-endian, a pickle that names anything
        but tensors, or a tensor that reaches beyond its storage.
    """
    refuse_lfs_pointer(path)
    _refuse_other_formats(path)
    found = {section.name: section for section in sections(path)}
    roots = [name.removesuffix("data.pkl") for name in found if name.endswith("/data.pkl")]
    if len(roots) != 1:
        raise ConvertError(f"{path}: not a torch.save file: {len(roots)} entries named data.pkl")
    root = roots[0]
    order = found.get(f"{root}byteorder")
    if order and _content(path, order, len("little\n")).strip() != b"little":
        raise ConvertError(f"{path}: written on a big-endian machine, not supported")
    try:
        state = unpickle(_content(path, found[f"{root}data.pkl"], _LONGEST_PICKLE), _NAMES, _storage)
    except PickleError as error:
        raise ConvertError(f"{path}: its pickle cannot be read as plain weights: {error}") from error
    if type(state) is not dict:
        raise ConvertError(f"{path}: holds {type(state).__name__.lstrip('_')}, not a state dict of tensors")
    tensors = {}
    for name, value in state.items():
        if type(value) is not _Tensor:
            kind = type(value).__name__.lstrip("_")
            raise ConvertError(f"{path}: {name!r} is {kind}, not a tensor: not a plain state dict")
        tensors[name] = _placed(path, name, value, found.get(f"{root}data/{value.storage.key}"))
    return tensors


def sections(path: Path) -> list[Section]:
    """The entries of a zip in the order in which they lie in the file: apart from each other, none beyond its end.

    Raises:
      ConvertError: damaged, or an entry that is compressed or encrypted, as torch.save writes none.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            infos = archive.infolist()
    except zipfile.BadZipFile as error:
        raise ConvertError(f"{path}: truncated or damaged zip file: {error}; download it again") from error
    except (ValueError, RuntimeError, struct.error, OverflowError, MemoryError) as error:
        # what else the library ends in where the directory is damaged
        raise ConvertError(f"{path}: damaged zip file: its directory cannot be read; download it again") from error
    # torch.serialization.set_crc32_options(False) leaves all of them out
    checked = any(info.CRC for info in infos)
    found, end = [], 0
    with open(path, "rb") as file:
        size = file.seek(0, 2)
        for info in sorted(infos, key=lambda info: info.header_offset):
            if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1 or info.compress_size != info.file_size:
                how = f"zip method {info.compress_type}, flags {info.flag_bits:#x}"
                raise ConvertError(
                    f"{path}: entry {info.filename}: expected one stored without compression, found {how}"
                )
            start = _data_start(path, file, info, end)
            end = start + info.file_size
            if end > size:
                raise ConvertError(f"{path}: truncated: entry {info.filename} ends beyond the file")
            found.append(Section(info.filename, start, info.file_size, info.CRC if checked else None))
    if len({section.name for section in found}) < len(found):
        raise ConvertError(f"{path}: damaged zip file: two entries of one name")
    return found


def _data_start(path: Path, file: BinaryIO, info: zipfile.ZipInfo, after: int) -> int:
    # zip's local header (APPNOTE 4.3.7): its own name and extra lengths, which differ from the directory's
    header = b""
    if info.header_offset >= after:
        file.seek(info.header_offset)
        header = file.read(30)
    if len(header) < 30 or header[:4] != b"PK\x03\x04":
        raise ConvertError(f"{path}: damaged zip file: no local header of {info.filename}")
    name_length, extra_length = struct.unpack("<HH", header[26:30])
    if file.read(name_length) != info.orig_filename.encode("utf-8" if info.flag_bits & 0x800 else "cp437"):
        raise ConvertError(f"{path}: damaged zip file: the local header of {info.filename} has another name")
    return info.header_offset + 30 + name_length + extra_length


def _content(path: Path, section: Section, most: int) -> bytes:
    if section.size > most:
        raise ConvertError(f"{path}: its {section.name} has {section.size} bytes: not plain weights")
    with open(path, "rb") as file:
        file.seek(section.start)
        data = file.read(section.size)
    section.check(path, zlib.crc32(data))
    return data


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


def _placed(path: Path, name: str, tensor: _Tensor, section: Section | None) -> SourceTensor:
    storage = tensor.storage
    if section is None:
        raise ConvertError(f"{path}: tensor {name}: its storage {storage.key} is not in the file")
    needs = storage.size * storage.type.itemsize
    if section.size != needs:
        raise ConvertError(f"{path}: tensor {name}: its storage has {section.size} bytes, expected {needs}")
    count = prod(tensor.shape)
    last = tensor.offset + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.strides))
    if count and last >= storage.size:
        raise ConvertError(f"{path}: tensor {name} reaches element {last} of a storage of {storage.size}")
    if count > storage.size and count * storage.type.itemsize > _MOST_REPEATED:
        raise ConvertError(f"{path}: tensor {name} has {count} elements made of the {storage.size} of its storage")
    offset = section.start + tensor.offset * storage.type.itemsize
    return SourceTensor(name, path, storage.type.dtype, tensor.shape, offset, tensor.strides)
