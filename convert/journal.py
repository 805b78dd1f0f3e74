"""What an unfinished conversion has done so far: one line per source file hashed and per leaf written, each made
durable before the next leaf starts, so that a run after a crash knows what it can keep."""

import json
import os
from pathlib import Path
from typing import Any

from convert.tensor import ConvertError
from jaxinfer.checkpoint.files import sync_folder

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
          ConvertError: an unfinished conversion with another `header`, or a damaged journal.
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
            entries = [json.loads(line) for line in lines] or [{"header": None}]
            found = entries[0]["header"]
            for entry in entries[1:]:
                self.sources.update(entry.get("source", {}))
                self.leaves.update(entry.get("leaf", {}))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            what = f"damaged: {type(error).__name__}: {error}"
            raise ConvertError(f"{self.path}: {what}; remove this file and convert again") from error
        if found is None:  # a crash left a torn line alone
            self._append({"header": header})
            return
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
