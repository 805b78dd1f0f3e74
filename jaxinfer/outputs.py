"""Results on disk: whole lines appended as requests finish, and what a run that continues finds there."""

import dataclasses
import fcntl
import json
import os
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import xxhash

from jaxinfer.checkpoint.files import write_whole
from jaxinfer.engine.request import Output
from jaxinfer.inputs import InputError, InputRecord

SYNC_SECONDS = 5.0


class OutputError(RuntimeError):
    """An output that cannot be written or continued."""


def beside(output: Path, kind: str) -> Path:
    """``OUT.jsonl`` to ``OUT.<kind>.json``."""
    return output.with_name(f"{output.name.removesuffix('.jsonl')}.{kind}.json")


def write_json(path: Path, data: Any) -> None:
    try:
        write_whole(path, (json.dumps(data, indent=1) + "\n").encode())
    except OSError as error:
        raise OutputError(f"{path}: {error.strerror}") from error


def output_line(output: Output) -> dict[str, Any]:
    """The fields of a result; logprobs only where asked for."""
    line = {name: getattr(output, name) for name in (each.name for each in dataclasses.fields(output))}
    for name in ("ttft_s", "latency_s"):
        line[name] = round(line[name], 6)
    for name in ("logprobs", "prompt_logprobs"):
        if line[name] is None:
            del line[name]
        else:
            line[name] = [None if each is None else each.to_json() for each in line[name]]
    return line


class Writer:
    """Appends JSON lines. Each is one write, so that a crash leaves at most the last one torn; the disk is told to keep
    them every few seconds and at the end."""

    def __init__(self, path: Path):
        self.path = path
        self._file = open(path, "ab", buffering=0)
        _lock(self._file, path)
        self._synced = time.monotonic()

    def write(self, line: dict[str, Any]) -> None:
        """Raises OutputError when the disk does not take the whole line; the file then ends with the line before."""
        data = (json.dumps(line, ensure_ascii=False) + "\n").encode()
        end = os.fstat(self._file.fileno()).st_size
        try:
            rest = memoryview(data)
            while rest:
                rest = rest[self._file.write(rest) :]
            if time.monotonic() - self._synced > SYNC_SECONDS:
                self.sync()
        except OSError as error:
            os.ftruncate(self._file.fileno(), end)
            raise OutputError(
                f"{self.path}: {error.strerror}; all {end} bytes before this result are whole, "
                "and the same command goes on from there"
            ) from error

    def sync(self) -> None:
        os.fsync(self._file.fileno())
        self._synced = time.monotonic()

    def close(self) -> None:
        try:
            self.sync()
        except OSError as error:
            raise OutputError(f"{self.path}: {error.strerror}; its last results may be lost") from error
        finally:
            self._file.close()


@dataclass
class Found:
    """What an earlier run left: the ids that are finished, and the lines that are to stay as (offset, size)."""

    finished: set[str] = field(default_factory=set)
    keep: list[tuple[int, int]] = field(default_factory=list)
    size: int = 0


def find_finished(path: Path, samples: Callable[[str], int]) -> Found:
    """Reads an output. `samples` is how many lines an id has when it is finished.

    A torn last line, error records (their lines are tried again) and samples of requests that lack others are not kept.

    Raises:
      OutputError: a line that no run wrote, or a sample that is there twice.
    """
    found = Found()
    where: dict[str, dict[int, tuple[int, int]]] = defaultdict(dict)
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            start, found.size = found.size, found.size + len(line)
            try:
                data = json.loads(line)
                name, index = data["id"], data.get("index")
                if not line.endswith(b"\n"):
                    break
                if "error" in data:
                    continue
                if not isinstance(name, str) or not isinstance(index, int):
                    raise ValueError
            except (ValueError, KeyError, TypeError, AttributeError):
                if file.read(1):
                    raise OutputError(
                        f"{path}, line {number}: not a result; choose another output or --overwrite"
                    ) from None
                break
            if index in where[name]:
                raise OutputError(f"{path}, line {number}: id {name!r}, index {index} is there twice")
            where[name][index] = (start, len(line))
    found.size = path.stat().st_size
    found.finished = {name for name, lines in where.items() if len(lines) >= samples(name)}
    found.keep = sorted(span for name in found.finished for span in where[name].values())
    return found


def drop_unfinished(path: Path, found: Found) -> None:
    """Rewrites an output with the lines of finished requests alone, aside and renamed; leaves it if they are all."""
    if sum(size for _, size in found.keep) == found.size:
        return
    aside = path.with_name(path.name + ".partial")
    try:
        with open(path, "rb") as old, open(aside, "wb") as new:
            for start, size in found.keep:
                old.seek(start)
                new.write(old.read(size))
            new.flush()
            os.fsync(new.fileno())
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise OutputError(f"{path}: cannot be rewritten without its unfinished lines: {error.strerror}") from error
    os.replace(aside, path)


def prompt_hash(record: InputRecord) -> str:
    """Of all that makes a request's tokens, beside the settings of the run."""
    data = [record.kind, record.value, record.params.to_dict()]
    return xxhash.xxh3_64_hexdigest(json.dumps(data, sort_keys=True).encode())


def changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """The settings that differ, as ``name: before -> now``."""
    names = sorted(before.keys() | now.keys())
    return [f"{name}: {before.get(name)!r} -> {now.get(name)!r}" for name in names if before.get(name) != now.get(name)]


def prepare(
    path: Path,
    records: list[InputRecord | InputError],
    settings: dict[str, Any],
    run: dict[str, Any],
    overwrite: bool,
    anyway: bool,
) -> set[str]:
    """Makes an output ready to be appended to, and returns the ids that are finished.

    Beside it goes what the results were made with: `settings`, which decide whether a run may go on where another
    stopped; a hash of each prompt, for the same reason; and one `run` (versions, command ...) for each time that one
    began.

    Raises:
      OutputError: an output of another model, other sampling settings or another prompt under the same id, unless
        `anyway`; one without the settings it was made with; one that is not an output.
    """
    run_file = beside(path, "run")
    requests = {record.id: record for record in records if isinstance(record, InputRecord)}
    prompts = {name: prompt_hash(record) for name, record in requests.items()}
    found = Found()
    earlier: dict[str, Any] = {}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "ab") as file:
            _lock(file, path)
            if overwrite:
                file.truncate(0)
            if path.stat().st_size:
                found = find_finished(path, lambda name: requests[name].params.n if name in requests else 1)
                earlier = _read_run(run_file, path, anyway)
                if not anyway:
                    _refuse_changes(path, earlier, settings, prompts, found.finished)
                drop_unfinished(path, found)
        kept = {name: value for name, value in earlier.get("prompts", {}).items() if name in found.finished}
        runs = [*earlier.get("runs", []), run]
        write_json(run_file, {"settings": settings, "runs": runs, "prompts": prompts | kept})
    except OSError as error:
        raise OutputError(f"{error.filename or path}: {error.strerror}") from error
    return found.finished & requests.keys()


def take_back(path: Path) -> None:
    """Removes what `prepare` made, if nothing has been written since: a run that was refused leaves no file that looks
    like results."""
    if path.is_symlink() or not path.is_file():  # /dev/null, say
        return
    try:
        with open(path, "ab") as file:
            _lock(file, path)
            if path.stat().st_size == 0:
                path.unlink()
                beside(path, "run").unlink(missing_ok=True)
    except (OSError, OutputError):
        pass  # gone, or another run's by now


def _lock(file: IO[bytes], path: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise OutputError(f"{path}: another run is writing to it") from None
    except OSError:
        pass  # a file system without locks: then nobody guards against two runs at once


def _read_run(run_file: Path, output: Path, anyway: bool) -> dict[str, Any]:
    try:
        return json.loads(run_file.read_bytes())
    except (FileNotFoundError, ValueError) as error:
        if anyway:
            return {}
        what = "is absent" if isinstance(error, FileNotFoundError) else "is damaged"
        raise OutputError(
            f"{output} has results, but {run_file}, which tells the settings they were made with, {what}; "
            "choose another output, --overwrite to start over or --resume-anyway to add to it"
        ) from None


def _refuse_changes(
    path: Path, earlier: dict[str, Any], settings: dict[str, Any], prompts: dict[str, str], finished: set[str]
) -> None:
    changed = changes(earlier["settings"], settings)
    if not changed:
        before = earlier["prompts"]
        changed = [f"the prompt or sampling fields of id {name!r}" for name in sorted(finished & prompts.keys())
                   if before.get(name) != prompts[name]]  # fmt: skip
    if changed:
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        raise OutputError(
            f"{path} has results of other settings ({'; '.join(changed[:3])}{more}); choose another output, "
            "--overwrite to start over or --resume-anyway to add to it"
        )
