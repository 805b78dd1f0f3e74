"""A job from the queue to its end: its state, and the results as they come into its output."""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import attrs
from tqdm import tqdm

from jaxinfer.telemetry.progress import Progress
from slurm import jobs

QUIET = 5  # failed looks at the queue, one after another, before we give up


@attrs.define
class Results:
    """Whole lines of an output that grows. One that was rewritten is read from its start."""

    path: Path
    lines: int = 0
    tokens: int = 0
    _offset: int = 0
    _inode: int = 0

    def read(self) -> None:
        try:
            file = open(self.path, "rb")
        except FileNotFoundError:
            return
        with file:
            info = self.path.stat()
            if info.st_ino != self._inode or info.st_size < self._offset:
                self.lines = self.tokens = self._offset = 0
                self._inode = info.st_ino
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                self._offset += len(line)
                self.lines += 1
                self.tokens += _tokens(line)


def _tokens(line: bytes) -> int:
    try:
        return json.loads(line).get("completion_tokens", 0)
    except (ValueError, AttributeError):
        return 0


def follow(what: str, look: Callable[[], jobs.State], outputs: list[Path], total: int, poll_s: float) -> jobs.State:
    """Shows how `what`, a job, gets on, by looking at it every `poll_s` seconds; returns its last state."""
    results = [Results(path) for path in outputs]
    bar: Progress | None = None
    last, failures = jobs.State(""), 0
    done = tokens = 0
    try:
        while True:
            try:
                state, failures = look(), 0
            except jobs.SlurmError as error:
                state, failures = last, failures + 1
                if failures == QUIET:
                    raise
                print(f"{what}: {error}", file=sys.stderr)
            for each in results:
                each.read()
            before = done, tokens
            done, tokens = sum(each.lines for each in results), sum(each.tokens for each in results)
            if bar is not None:
                bar.update(done - before[0], tokens - before[1])
            if state != last:
                if bar is not None and state.name != "RUNNING":
                    bar.close()
                    bar = None
                tqdm.write(f"{what}: {state}", file=sys.stderr)
                sys.stderr.flush()
                last = state
            if bar is None and state.name == "RUNNING":
                bar = Progress("results", "lines", total)
                bar.update(done)
            if state.ended:
                return state
            time.sleep(poll_s)
    finally:
        if bar is not None:
            bar.close()
