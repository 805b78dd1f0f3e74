"""Cells as Slurm jobs: submitted, followed and collected through `python -m slurm.submit`."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ANSWER_S = 180.0  # a busy controller answers late, and slurm.submit waits for sacct


class JobError(RuntimeError):
    """What slurm.submit said, in one line."""


def submit(words: list[str]) -> str:
    """The job's id. Raises JobError."""
    return str(_json(words, words)["job"])


def status(folder: Path) -> dict[str, Any] | None:
    """{"job", "state", "ended", ...}; None where no job was submitted for the folder. Raises JobError."""
    if not (folder / "submit.json").exists():
        return None
    words = [sys.executable, "-m", "slurm.submit", "--status", str(folder)]
    return _json(words, words)


def collect(folder: Path, log: Path) -> int:
    """Brings the accounting; the exit status, 0 where all results are there. Raises JobError."""
    done = _run([sys.executable, "-m", "slurm.submit", "--collect", str(folder)])
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_text(done.stdout + done.stderr, "utf-8")
    return done.returncode


def _json(words: list[str], shown: list[str]) -> dict[str, Any]:
    done = _run(words)
    if done.returncode:
        raise JobError((done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1])
    try:
        return json.loads(done.stdout.strip().splitlines()[-1])
    except (ValueError, IndexError):
        raise JobError(f"slurm.submit: no answer in {done.stdout.strip()[-200:]!r}") from None


def _run(words: list[str]) -> subprocess.CompletedProcess:
    try:
        return subprocess.run(words, capture_output=True, text=True, errors="replace", timeout=ANSWER_S)
    except subprocess.TimeoutExpired:
        raise JobError(f"slurm.submit: no answer in {ANSWER_S:.0f} s") from None
    except OSError as error:
        raise JobError(f"{words[0]}: {error.strerror}") from None
