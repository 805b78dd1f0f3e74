"""What an unfinished conversion has done so far: one line per source file hashed and per leaf written, each made
durable before the next leaf starts, so that a run after a crash knows what it can keep."""

import json
import os
from pathlib import Path
from typing import Any

from convert.tensor import ConvertError
from jaxinfer.checkpoint.files import DamagedError, sync_folder
from jaxinfer.json_text import parse

NAME = "convert.journal.jsonl"


class Record:
    """What a folder holds. `sources`: file name to {bytes, sha256}; `leaves`: leaf name to its chunk files."""

    def __init__(self, sources: dict[str, dict[str, Any]], leaves: dict[str, dict[str, dict[str, Any]]]):
        self.sources, self.leaves = sources, leaves

    def source(self, name: str, found: dict[str, Any]) -> None:
        self.sources[name] = found

    def leaf(self, name: str, files: dict[str, dict[str, Any]]) -> None:
        self.leaves[name] = files


class Journal(Record):
    """A record that the folder itself keeps."""

    def __init__(self, folder: Path, header: dict[str, Any], leaves: dict[str, dict[str, dict[str, Any]]]):
        """Opens the folder's journal, or starts one with the leaves that are there already.

        Raises:
          ConvertError: an unfinished conversion with another `header`.
          DamagedError: a journal that cannot be read.
        """
        super().__init__({}, {})
        self.path = folder / NAME
        if self.path.exists():
            self._read(folder, header)
            return
        self._append({"header": header})
        sync_folder(folder)
        for name, files in leaves.items():
            self.leaf(name, files)

    def _read(self, folder: Path, header: dict[str, Any]) -> None:
        lines = self.path.read_bytes().split(b"\n")
        torn = lines.pop()  # what a crash left of the line that was being written, or nothing
        if torn:
            os.truncate(self.path, self.path.stat().st_size - len(torn))
        try:
            entries = [_entry(line, number) for number, line in enumerate(lines)]
        except ValueError as error:
            raise DamagedError(f"{self.path}: damaged, {error}") from error
        if not entries:  # a crash left a torn line alone
            self._append({"header": header})
            return
        found = entries[0]["header"]
        for entry in entries[1:]:
            self.sources.update(entry.get("source", {}))
            self.leaves.update(entry.get("leaf", {}))
        header = json.loads(json.dumps(header))  # tuples become lists, as they did on disk
        if found != header:
            names = [name for name in header if found.get(name) != header[name]]
            differ = "; ".join(f"{name} was {found.get(name)!r}, now {header[name]!r}" for name in names)
            raise ConvertError(
                f"{folder}: holds an unfinished conversion with other settings ({differ}); remove the folder, "
                f"or choose another --output"
            )

    def _append(self, entry: dict[str, Any]) -> None:
        with open(self.path, "ab") as file:
            file.write(json.dumps(entry).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def source(self, name: str, found: dict[str, Any]) -> None:
        """Notes a source file; refuses one that is not what an earlier run converted from."""
        if name not in self.sources:
            self._append({"source": {name: found}})
            super().source(name, found)
        elif self.sources[name] != found:
            both = self.sources[name], found
            before, now = (f"{each['bytes']} bytes, sha256 {each['sha256'][:12]}" for each in both)
            raise ConvertError(
                f"{self.path.parent}: an earlier run converted from another {name} ({before}; now {now}); "
                f"remove the folder, or choose another --output"
            )

    def leaf(self, name: str, files: dict[str, dict[str, Any]]) -> None:
        self._append({"leaf": {name: files}})
        super().leaf(name, files)


def _entry(line: bytes, number: int) -> dict[str, dict[str, Any]]:
    """One line's entry: of a header, which is the first, of a source file, or of a leaf."""
    try:
        entry = parse(line)
    except ValueError as error:
        raise ValueError(f"line {number + 1} is not JSON: {error}") from error
    kinds = {"source", "leaf"} if number else {"header"}
    if not isinstance(entry, dict) or len(entry) != 1 or not entry.keys() <= kinds:
        raise ValueError(f"line {number + 1} is no object of {' or '.join(sorted(kinds))}")
    ((kind, value),) = entry.items()
    if not isinstance(value, dict) or not all(_described(kind, each) for each in value.values()):
        raise ValueError(f"line {number + 1}: its {kind} is not as it was written")
    return entry


def _described(kind: str, value: Any) -> bool:
    if kind == "source":
        return isinstance(value, dict) and {"bytes", "sha256"} <= value.keys() and isinstance(value["sha256"], str)
    return kind == "header" or (isinstance(value, dict) and all(_is_file(each) for each in value.values()))


def _is_file(value: Any) -> bool:
    return isinstance(value, dict) and {"bytes", "xxh3_128"} <= value.keys()
