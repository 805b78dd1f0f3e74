"""Cells as Slurm jobs: submitted, followed and collected through `python -m slurm.submit`."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

ANSWER_S = 180.0  # a busy controller answers late, and slurm.submit waits for sacct
# what Slurm's commands say where no controller answers, and what slurm.submit says of commands that say nothing
SILENT = re.compile(
    r"could not establish a configuration source|unable to contact slurm controller|socket timed out|: no answer in ",
    re.IGNORECASE,
)


class JobError(RuntimeError):
    """What slurm.submit said, in one line; `status` is its exit status, `silent`: it found no controller."""

    def __init__(self, text: str, status: int = 1, silent: bool = False):
        super().__init__(text)
        self.status = status
        self.silent = silent


def submit(words: list[str]) -> str:
    """The job's id. Raises JobError."""
    return str(_answers(words)[-1]["job"])


def status(folders: list[Path]) -> list[dict[str, Any]]:
    """Of each: {"job", "state", "ended", "reason", "nodes", "results", "expected"}.

    Raises:
      JobError: Slurm does not answer (status 1), or no job was submitted for a folder (2).
    """
    found = _answers([sys.executable, "-m", "slurm.submit", "--status", *map(str, folders)])
    if len(found) != len(folders):
        raise JobError(f"slurm.submit: {len(found)} answers for {len(folders)} folders")
    return found


def collect(folder: Path, log: Path) -> int:
    """Brings the accounting; the exit status, 0 where all results are there. Raises JobError."""
    done = _run([sys.executable, "-m", "slurm.submit", "--collect", str(folder)])
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_text(done.stdout + done.stderr, "utf-8")
    return done.returncode


def _answers(words: list[str]) -> list[dict[str, Any]]:
    done = _run(words)
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"{words[2]} ended with {done.returncode}"]
        raise JobError(said[-1], done.returncode, SILENT.search(done.stderr) is not None)
    try:
        return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    except ValueError:
        raise JobError(f"{words[2]}: no answer in {done.stdout.strip()[-200:]!r}") from None


def _run(words: list[str]) -> subprocess.CompletedProcess:
    try:
        return subprocess.run(words, capture_output=True, text=True, errors="replace", timeout=ANSWER_S)
    except subprocess.TimeoutExpired:
        raise JobError(f"{words[2]}: no answer in {ANSWER_S:.0f} s", silent=True) from None
    except OSError as error:
        raise JobError(f"{words[0]}: {error.strerror}") from None
