"""By what a cell is known: its hash is one of everything that its figures follow from."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import xxhash

import jaxinfer
from jaxinfer.study.errors import StudyError

SOURCES = (".py", ".cu")


@cache
def code() -> str:
    """Of the source files of jaxinfer/ and convert/. Those of jaxinfer/study/ run in no cell: what they make of a
    study file is in the identity itself, and a table may change without a measurement anew."""
    package = Path(jaxinfer.__file__).parent
    own = package / "study"
    files = [path for top in (package, package.parent / "convert") for path in top.rglob("*") if path.suffix in SOURCES]
    return _of_files(package.parent, [path for path in files if own not in path.parents])


@cache
def reference_code() -> str:
    """Of what runs the cells against: transformers."""
    package = Path(jaxinfer.__file__).parent
    return _of_files(package.parent, [package / "study" / "reference.py"])


def _of_files(top: Path, files: list[Path]) -> str:
    digest = xxhash.xxh3_64()
    for path in sorted(files):
        try:
            data = path.read_bytes()
        except OSError as error:
            raise StudyError(f"{path}: {error.strerror}") from None
        digest.update(f"{path.relative_to(top)}\0{len(data)}\0".encode())
        digest.update(data)
    return digest.hexdigest()


def hash_of(identity: dict[str, Any]) -> str:
    return xxhash.xxh3_64_hexdigest(json.dumps(identity, sort_keys=True).encode())


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What makes one cell another: names of the parts of the identity that differ, settings by their own names."""
    found = []
    for name in sorted(before.keys() | now.keys()):
        old, new = before.get(name), now.get(name)
        if old == new:
            continue
        if isinstance(old, dict) and isinstance(new, dict):
            keys = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
            found += [f"{key}: {old.get(key)!r} -> {new.get(key)!r}" for key in keys]
        else:
            found.append(name)
    return found
