"""What Slurm's own commands say of a job."""

import subprocess
import time
from collections import Counter
from pathlib import Path

import attrs

ENDED = frozenset(
    "BOOT_FAIL CANCELLED COMPLETED DEADLINE FAILED NODE_FAIL OUT_OF_MEMORY PREEMPTED REVOKED TIMEOUT".split()
)
FIELDS = (
    "JobID,JobName,State,ExitCode,Partition,Account,NodeList,AllocTRES,Submit,Start,End,Elapsed,ElapsedRaw,TotalCPU,"
    "CPUTimeRAW,MaxRSS,ConsumedEnergyRaw"
)
COMMAND_S = 60.0  # a busy controller answers late


class SlurmError(RuntimeError):
    """A command of Slurm's that failed; `status` is its exit status, the text what it said."""

    def __init__(self, text: str, status: int = 1):
        super().__init__(text)
        self.status = status


@attrs.frozen
class State:
    """Of a job, or of an array as a whole."""

    name: str
    reason: str = ""
    nodes: str = ""

    @property
    def ended(self) -> bool:
        return self.name in ENDED

    def __str__(self) -> str:
        return self.name + (f" on {self.nodes}" if self.nodes else f" ({self.reason})" if self.reason else "")


def submit(script: Path) -> str:
    """The job's id. SlurmError holds what sbatch said."""
    return _run("sbatch", "--parsable", str(script)).split(";")[0].strip()


def state(job: str) -> State | None:
    """None once the queue has forgotten the job."""
    try:
        answer = _run("squeue", "--noheader", "--jobs", job, "--states=all", "--format=%T|%r|%N")
    except SlurmError as error:
        if "Invalid job id" in str(error):
            return None
        raise
    rows = [State(*(part.strip() for part in line.split("|"))) for line in answer.splitlines()]
    if len(rows) < 2:
        return rows[0] if rows else None
    # an array has ended when all of its tasks have, and badly if one has
    names = Counter(row.name for row in rows)
    alive = [row for row in rows if not row.ended]
    if alive:
        return State(alive[0].name, ", ".join(f"{count} {name}" for name, count in names.items()))
    return next((row for row in rows if row.name != "COMPLETED"), rows[0])


def accounting(job: str, tasks: int = 1, wait_s: float = 20.0) -> list[dict[str, str]]:
    """A record for each attempt, task and step, once the last of the array's `tasks` has ended; they come some seconds
    late.

    Raises:
      SlurmError: no sacct, no accounting, or nothing there after `wait_s`.
    """
    until = time.monotonic() + wait_s
    while True:
        lines = _run("sacct", "--jobs", job, "--parsable2", "--duplicates", f"--format={FIELDS}").splitlines()
        names, *rows = [line.split("|") for line in lines] or [[]]
        records = [dict(zip(names, row)) for row in rows]
        known = {record["JobID"] for record in records if "." not in record["JobID"]}
        if len(known) >= tasks and all(record["End"] != "Unknown" for record in records):
            return records
        if time.monotonic() > until:
            raise SlurmError(f"sacct has no end of job {job} after {wait_s:.0f} s")
        time.sleep(1)


def last_state(records: list[dict[str, str]]) -> State:
    """Of the last attempt, by the accounting; of an array the first task that did not complete."""
    last = {record["JobID"]: record["State"].split()[0] for record in records if "." not in record["JobID"]}
    return State(next((name for name in last.values() if name != "COMPLETED"), "COMPLETED"))


def _run(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_S)
    except FileNotFoundError:
        raise SlurmError(f"{command[0]} is not here: this command runs on a login node") from None
    except subprocess.TimeoutExpired:
        raise SlurmError(f"{command[0]}: no answer in {COMMAND_S:.0f} s") from None
    if done.returncode:
        raise SlurmError(done.stderr.strip() or f"{command[0]} ended with {done.returncode}", done.returncode)
    return done.stdout
