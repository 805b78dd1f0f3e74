"""What a study's folder says of its cells, and whose it is while a study runs."""

import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import psutil

from jaxinfer.checkpoint.files import write_json
from jaxinfer.study.errors import StudyError

STATES = ("waiting", "running", "done", "failed", "skipped")
FRESH = {"state": "waiting", "why": None, "began": None, "ended": None, "attempts": 0, "job": None}
LOCK = ".lock"
SURVIVOR_S = 60.0  # that a cell's process, which a study left behind, may take to end


def now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


def read_json(path: Path) -> dict[str, Any]:
    """{} where there is none, or half of one."""
    try:
        found = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def read_state(folder: Path) -> dict[str, Any]:
    found = FRESH | read_json(folder / "state.json")
    return found if found["state"] in STATES else dict(FRESH)


def write_state(folder: Path, before: dict[str, Any], **changes: Any) -> dict[str, Any]:
    state = before | changes
    write_json(folder / "state.json", state)
    return state


def cells_there(root: Path) -> list[Path]:
    """Folders of cells, of this study file or of an earlier one."""
    return sorted(path.parent for path in root.glob("cells/*/*/cell.json"))


def holder(root: Path) -> dict[str, Any]:
    """Who has the folder now: {"pid", "host", "began"}; {} if nobody."""
    try:
        with open(root / LOCK, "rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                return {}
            except BlockingIOError:
                return read_json(root / LOCK) or {"pid": None, "host": "?", "began": "?"}
    except OSError:
        return {}


@contextmanager
def locked(root: Path, say: Any) -> Iterator[int]:
    """The folder as this process's alone; gives the lock's file descriptor. Cells that inherit it hold the lock as
    well, so that none of a killed study measures beside the next one.

    Raises:
      StudyError: another study runs in it, with its process, host and start.
    """
    root.mkdir(parents=True, exist_ok=True)
    with open(root / LOCK, "a+b", buffering=0) as file:
        _take(file, root, say)
        file.truncate(0)
        file.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "began": now()}).encode() + b"\n")
        yield file.fileno()


def _take(file: IO[bytes], root: Path, say: Any) -> None:
    until, told = time.monotonic() + SURVIVOR_S, False
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            pass
        except OSError:
            return  # a file system without locks: then nobody guards against two studies at once
        who = read_json(root / LOCK)
        if who.get("host") != socket.gethostname() or _lives(who.get("pid")) or time.monotonic() > until:
            what = f"process {who.get('pid')} on {who.get('host')}, since {who.get('began')}"
            raise StudyError(f"{root}: another study runs in it ({what}); wait for it, or choose another --output")
        if not told:
            say("a cell of a study that was killed still runs; waiting for its end")
            told = True
        time.sleep(0.2)


def _lives(pid: Any) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except (psutil.Error, TypeError, ValueError):
        return False
