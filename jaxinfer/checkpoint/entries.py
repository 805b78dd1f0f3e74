"""What the fields of a manifest may hold. Damage that no checksum tells of, and a hand that edits, end here."""

import re
from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np

DTYPES = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": np.dtype(np.float16), "float32": np.dtype(np.float32)}
_MOST = 1 << 40  # numbers along an axis: far beyond any model
_DIGITS = {"xxh3_128": 32, "sha256": 64}


def check_entries(data: dict[str, Any], names: Sequence[str], sealed: bool) -> None:
    """The fields `names` of a manifest, the model's own aside. sealed: it has a checksum.

    Raises:
      ValueError: a field that is missing or, without a checksum, unknown; one that is not of its type or range.
    """
    if missing := [name for name in names if name not in data]:
        raise ValueError(f"missing {', '.join(sorted(missing))}")
    if not sealed and (unknown := sorted(data.keys() - set(names))):
        raise ValueError(f"unknown field {unknown[0]!r}")
    _mapping("model", data["model"])
    _legal("dtype", data["dtype"], " or ".join(DTYPES), data["dtype"] in tuple(DTYPES))
    _legal("quantization", data["quantization"], "null", data["quantization"] is None)
    _legal("converter", data["converter"], "a text", isinstance(data["converter"], str))
    _whole("parameters", data["parameters"])
    for name, leaf in _mapping("leaves", data["leaves"]).items():
        _leaf(f"leaves: {name!r}", name, leaf)
    for name, entry in _mapping("files", data["files"]).items():
        _legal("files", name, "a path inside the checkpoint", _inside(name))
        _entry(f"files: {name!r}", entry, "xxh3_128")
    for name, entry in _mapping("sources", data["sources"]).items():
        _entry(f"sources: {name!r}", entry, "sha256")
    tokenizer = data["tokenizer"]
    _legal("tokenizer", tokenizer, "a list of file names", isinstance(tokenizer, list) and all(map(_plain, tokenizer)))
    if sealed and (without := [name for name in tokenizer if f"tokenizer/{name}" not in data["files"]]):
        raise ValueError(f"files: missing 'tokenizer/{without[0]}'")


def _legal(field: str, value: Any, legal: str, holds: bool) -> None:
    if not holds:
        shown = repr(value)
        shown = shown if len(shown) < 80 else f"{shown[:76]} ..."
        raise ValueError(f"{field}: found {shown}, legal is {legal}")


def _mapping(field: str, value: Any, *needed: str) -> dict[str, Any]:
    _legal(field, value, "a mapping", isinstance(value, dict))
    for name in needed:
        if name not in value:
            raise ValueError(f"{field}: missing {name}")
    return value


def _whole(field: str, value: Any, least: int = 0, most: int = 1 << 63) -> None:
    _legal(field, value, f"a whole number from {least}", type(value) is int and least <= value < most)


def _plain(name: Any) -> bool:
    return isinstance(name, str) and name not in ("", ".", "..") and "/" not in name and "\0" not in name


def _inside(name: str) -> bool:
    return all(map(_plain, name.split("/")))


def _leaf(field: str, name: str, leaf: Any) -> None:
    _legal("leaves", name, "the name of a folder", _plain(name))
    _mapping(field, leaf, "shape", "dtype", "chunks")
    shape, chunks = leaf["shape"], leaf["chunks"]
    _legal(f"{field}: dtype", leaf["dtype"], " or ".join(DTYPES), leaf["dtype"] in tuple(DTYPES))
    _legal(f"{field}: shape", shape, "a list of sizes", isinstance(shape, list) and len(shape) > 0)
    _legal(f"{field}: chunks", chunks, f"{len(shape)} sizes", isinstance(chunks, list) and len(chunks) == len(shape))
    for size, chunk in zip(shape, chunks):
        _whole(f"{field}: shape", size, 1, _MOST)
        _whole(f"{field}: chunks", chunk, 1, size + 1)


def _entry(field: str, entry: Any, kind: str) -> None:
    _whole(f"{field}: bytes", _mapping(field, entry, "bytes", kind)["bytes"])
    found, digits = entry[kind], _DIGITS[kind]
    holds = isinstance(found, str) and re.fullmatch(f"[0-9a-f]{{{digits}}}", found) is not None
    _legal(f"{field}: {kind}", found, f"{digits} hexadecimal digits", holds)
