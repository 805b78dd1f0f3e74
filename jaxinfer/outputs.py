"""Results on disk: whole lines appended as requests finish, and what a run that continues finds there."""

import dataclasses
import errno
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

from jaxinfer.checkpoint import files
from jaxinfer.checkpoint.files import is_stream, write_all
from jaxinfer.engine.request import Output
from jaxinfer.inputs import InputError, InputRecord
from jaxinfer.telemetry.samples import merged_path, part_files

SYNC_SECONDS = 5.0
READER_SECONDS = 30.0  # for the reader of a named pipe to come


class OutputError(RuntimeError):
    """An output that cannot be written or continued."""


def beside(output: Path, kind: str) -> Path:
    """``OUT.jsonl`` to ``OUT.<kind>.json``."""
    return output.with_name(f"{output.name.removesuffix('.jsonl')}.{kind}.json")


def write_json(path: Path, data: Any) -> None:
    try:
        files.write_json(path, data)
    except OSError as error:
        raise OutputError(f"{path}: {error.strerror}") from error


def output_line(output: Output) -> dict[str, Any]:
    """The fields of a result; logprobs and meta only where asked for. Of one that ended with an error, that alone:
    a run that continues does it again, as it does bad lines, since what mends it is another dtype (with
    --resume-anyway)."""
    if output.error is not None:
        meta = {} if output.meta is None else {"meta": output.meta}
        return {"id": output.id, "index": output.index, "error": output.error} | meta
    line = {name: getattr(output, name) for name in (each.name for each in dataclasses.fields(output))}
    for name in ("ttft_s", "latency_s"):
        line[name] = round(line[name], 6)
    del line["error"]
    if line["meta"] is None:
        del line["meta"]
    for name in ("logprobs", "prompt_logprobs"):
        if line[name] is None:
            del line[name]
        else:
            line[name] = [None if each is None else each.to_json() for each in line[name]]
    return line


class Writer:
    """An output, this run's alone from the look at what is there to the last line. Each line is one write, so that a
    crash leaves at most the last one torn; the disk is told to keep them every few seconds and at the end.

    A stream (`is_stream`: a pipe, /dev/null) takes lines and nothing else: no files beside it, no earlier results.

    Raises:
      OutputError: it cannot be opened, or another run writes to it.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.stream = is_stream(path)
            self._file = _open_stream(path) if self.stream else _open_locked(path)
        except OSError as error:
            raise OutputError(f"{error.filename or path}: {error.strerror}") from error
        self._written = 0
        self._synced = time.monotonic()

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        try:
            self.sync()
        except OutputError:
            if kind is None:
                raise
        finally:
            self._file.close()

    @property
    def size(self) -> int:
        return os.fstat(self._file.fileno()).st_size

    def clear(self) -> None:
        self._file.truncate(0)

    def write(self, line: dict[str, Any]) -> None:
        """Raises OutputError when the disk does not take the whole line; the file then ends with the line before."""
        data = files.json_bytes(line)
        end = self.size
        try:
            write_all(self._file, data)
        except OSError as error:
            if self.stream:
                raise OutputError(f"{self.path}: {error.strerror}, after {self._written} lines") from error
            os.ftruncate(self._file.fileno(), end)
            raise OutputError(
                f"{self.path}: {error.strerror}; all {end} bytes before this result are whole, "
                "and the same command goes on from there"
            ) from error
        self._written += 1
        if time.monotonic() - self._synced > SYNC_SECONDS:
            self.sync()

    def sync(self) -> None:
        """Raises OutputError when the disk says that it does not have what it took."""
        self._synced = time.monotonic()
        if self.stream:
            return
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise OutputError(f"{self.path}: {error.strerror}; its last results may be lost") from error

    def note(self, kind: str, data: Any) -> None:
        """Writes ``OUT.<kind>.json``."""
        if not self.stream:
            write_json(beside(self.path, kind), data)

    def keep(self, spans: list[tuple[int, int]]) -> None:
        """Goes on with these parts (offset, size) alone, in a file that takes the other's place.

        Raises:
          OutputError: they cannot be written; the output stays as it was.
        """
        real = Path(os.path.realpath(self.path))  # a link stays one
        aside = real.with_name(real.name + ".partial")
        new = None
        try:
            new = open(aside, "ab", buffering=0)
            _lock(new, self.path)
            new.truncate(0)
            with open(self.path, "rb") as old:
                for start, size in spans:
                    old.seek(start)
                    write_all(new, old.read(size))
            os.fsync(new.fileno())
            os.replace(aside, real)
        except OSError as error:
            if new is not None:
                new.close()
            aside.unlink(missing_ok=True)
            raise OutputError(
                f"{self.path}: cannot be rewritten without its unfinished lines: {error.strerror}"
            ) from error
        self._file.close()
        self._file = new


def _open_locked(path: Path) -> IO[bytes]:
    while True:
        file = open(path, "ab", buffering=0)
        try:
            _lock(file, path)
            if _is_there(file, path):
                return file
        except BaseException:
            file.close()
            raise
        file.close()  # the run that had it put another in its place, or took it away


def _is_there(file: IO[bytes], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _open_stream(path: Path) -> IO[bytes]:
    began = time.monotonic()
    while True:
        try:
            # without a reader of the pipe, a plain open would wait for ever
            handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_NONBLOCK)
            break
        except OSError as error:
            if error.errno != errno.ENXIO or not path.is_fifo():
                raise
            if time.monotonic() - began > READER_SECONDS:
                raise OutputError(f"{path}: nobody reads from this pipe (bound {READER_SECONDS:g} s)") from None
            time.sleep(0.1)
    os.set_blocking(handle, True)
    return open(handle, "ab", buffering=0)


def _lock(file: IO[bytes], path: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise OutputError(f"{path}: another run is writing to it") from None
    except OSError:
        pass  # a file system without locks: then nobody guards against two runs at once


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
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
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


def prompt_hash(record: InputRecord) -> str:
    """Of all that makes a request's tokens, beside the settings of the run."""
    data = [record.kind, record.value, record.params.to_dict()]
    return xxhash.xxh3_64_hexdigest(json.dumps(data, sort_keys=True).encode())


def changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """The settings that differ, as ``name: before -> now``."""
    names = sorted(before.keys() | now.keys())
    return [f"{name}: {before.get(name)!r} -> {now.get(name)!r}" for name in names if before.get(name) != now.get(name)]


def prepare(
    writer: Writer,
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
    if writer.stream:
        return set()
    path = writer.path
    run_file = beside(path, "run")
    requests = {record.id: record for record in records if isinstance(record, InputRecord)}
    prompts = {name: prompt_hash(record) for name, record in requests.items()}
    found = Found()
    earlier: dict[str, Any] = {}
    try:
        if overwrite:
            writer.clear()
        if writer.size:
            found = find_finished(path, lambda name: requests[name].params.n if name in requests else 1)
            earlier = _read_run(run_file, path, anyway)
            if not anyway:
                _refuse_changes(path, earlier, settings, prompts, found.finished)
            if sum(size for _, size in found.keep) != found.size:
                writer.keep(found.keep)
        kept = {name: value for name, value in earlier.get("prompts", {}).items() if name in found.finished}
        runs = [*earlier.get("runs", []), run]
        writer.note("run", {"settings": settings, "runs": runs, "prompts": prompts | kept})
    except OSError as error:
        raise OutputError(f"{error.filename or path}: {error.strerror}") from error
    return found.finished & requests.keys()


def take_back(path: Path) -> None:
    """Removes an output with nothing in it, and what is beside it, unless a run is writing to it: a run that was
    refused leaves no file that looks like results."""
    if path.is_symlink() or not path.is_file() or is_stream(path):
        return
    try:
        with Writer(path) as writer:
            if writer.size == 0:
                for each in (path, beside(path, "run"), beside(path, "metrics")):
                    each.unlink(missing_ok=True)
                    each.with_name(f"{each.name}.partial").unlink(missing_ok=True)  # of a process that was killed
                for each in (merged_path(path), *part_files(path)):
                    each.unlink(missing_ok=True)
    except (OSError, OutputError):
        pass  # gone, or another run's by now


def _read_run(run_file: Path, output: Path, anyway: bool) -> dict[str, Any]:
    try:
        found = json.loads(run_file.read_bytes())
        shapes = {"settings": dict, "prompts": dict, "runs": list}
        if not isinstance(found, dict) or any(not isinstance(found.get(name), kind) for name, kind in shapes.items()):
            raise ValueError("not what a run writes")
        return found
    except (FileNotFoundError, ValueError, RecursionError) as error:
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
