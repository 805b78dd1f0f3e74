"""What Slurm's own commands say of a job."""

import re
import subprocess
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import attrs

from jaxinfer.cluster.slurm import expand_hosts

ENDED = frozenset(
    "BOOT_FAIL CANCELLED COMPLETED DEADLINE FAILED NODE_FAIL OUT_OF_MEMORY PREEMPTED REVOKED TIMEOUT".split()
)
FIELDS = (
    "JobID,JobName,State,ExitCode,Partition,Account,NodeList,AllocTRES,Submit,Start,End,Elapsed,ElapsedRaw,TotalCPU,"
    "CPUTimeRAW,MaxRSS,ConsumedEnergyRaw"
)
NUMBERS = ("ElapsedRaw", "CPUTimeRAW", "MaxRSS", "ConsumedEnergyRaw")  # seconds, seconds, bytes, joules
UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
COMMAND_S = 60.0  # a busy controller answers late


class SlurmError(RuntimeError):
    """A command of Slurm's that failed; `status` is its exit status, the text what it said."""

    def __init__(self, text: str, status: int = 1):
        super().__init__(text)
        self.status = status


@attrs.frozen
class State:
    """Of a job, or of an array as a whole and of each of its tasks."""

    name: str
    reason: str = ""
    nodes: str = ""
    tasks: Mapping[int, "State"] = attrs.field(factory=dict, eq=False)

    @property
    def ended(self) -> bool:
        return self.name in ENDED

    @property
    def failed(self) -> dict[int, "State"]:
        """The tasks of an array that ended in another way than well."""
        return {task: state for task, state in self.tasks.items() if state.ended and state.name != "COMPLETED"}

    def __str__(self) -> str:
        return self.name + (f" on {self.nodes}" if self.nodes else f" ({self.reason})" if self.reason else "")


def submit(script: Path) -> str:
    """The job's id. SlurmError holds what sbatch said."""
    return _run("sbatch", "--parsable", str(script)).split(";")[0].strip()


def state(job: str) -> State | None:
    """None once the queue has forgotten the job."""
    try:
        answer = _run("squeue", "--noheader", "--array", "--jobs", job, "--states=all", "--format=%K|%T|%N|%r")
    except SlurmError as error:
        if "Invalid job id" in str(error):
            return None
        raise
    tasks, rows = {}, []
    for line in answer.splitlines():
        task, name, nodes, reason = (part.strip() for part in line.split("|", 3))
        rows.append(State(name, reason, nodes))
        if task.isdigit():
            tasks[int(task)] = rows[-1]
    return _whole(tasks) if tasks else rows[0] if rows else None


def _whole(tasks: dict[int, State]) -> State:
    """An array has ended when all of its tasks have, and badly if one has."""
    tasks = dict(sorted(tasks.items()))
    states = list(tasks.values())
    alive = [each for each in states if not each.ended]
    # what failed says more than what was cancelled, because of it perhaps
    bad = sorted((each for each in states if each.name != "COMPLETED"), key=lambda each: each.name == "CANCELLED")
    name = next(iter(alive or bad or states)).name
    if len(states) == 1:
        return attrs.evolve(states[0], tasks=tasks)
    counts = Counter(each.name for each in states)
    reason = "" if len(counts) == 1 else ", ".join(f"{count} {name}" for name, count in counts.items())
    return State(name, reason, tasks=tasks)


def accounting(job: str, tasks: int = 1, wait_s: float = 20.0) -> list[dict[str, str | int | None]]:
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
        known = {each for record in records if "." not in record["JobID"] for each in _job_ids(record["JobID"])}
        if len(known) >= tasks and all(record["End"] != "Unknown" for record in records):
            return [record | {name: _number(record[name]) for name in NUMBERS} for record in records]
        if time.monotonic() > until:
            raise SlurmError(f"sacct has no end of job {job} after {wait_s:.0f} s")
        time.sleep(1)


def last_state(records: list[dict[str, str | int | None]]) -> State:
    """Of the last attempt, by the accounting."""
    last = {}
    for record in records:
        if "." not in record["JobID"]:
            last |= dict.fromkeys(_job_ids(record["JobID"]), State(record["State"].split()[0]))
    tasks = {int(job.partition("_")[2]): state for job, state in last.items() if "_" in job}
    return _whole(tasks) if tasks else next(iter(last.values()))


def _job_ids(text: str) -> list[str]:
    """``7_[2-4%2]``, tasks that never began, to 7_2, 7_3, 7_4; any other id alone."""
    return expand_hosts(re.sub(r"%\d+\]", "]", text))


def _number(text: str) -> str | int | None:
    """``1234K`` as a number; None where there is nothing, the text where it is no number."""
    found = re.fullmatch(r"([0-9.]+)([KMGT]?)", text)
    return round(float(found[1]) * UNITS[found[2]]) if found else text or None


def _run(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=COMMAND_S)
    except FileNotFoundError:
        raise SlurmError(f"{command[0]} is not here: this command runs on a login node") from None
    except subprocess.TimeoutExpired:
        raise SlurmError(f"{command[0]}: no answer in {COMMAND_S:.0f} s") from None
    if done.returncode:
        raise SlurmError(done.stderr.strip() or f"{command[0]} ended with {done.returncode}", done.returncode)
    return done.stdout
