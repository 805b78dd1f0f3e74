"""What Slurm's own commands say of a job."""

import os
import subprocess
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import attrs

ENDED = frozenset(
    "BOOT_FAIL CANCELLED COMPLETED DEADLINE FAILED NODE_FAIL OUT_OF_MEMORY PREEMPTED REVOKED TIMEOUT".split()
)
UNKNOWN = "UNKNOWN"  # ours, of a job that neither queue nor accounting knows: it is over, however it ended
ALIVE = "pending,running,suspended,completing,configuring"
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
        return self.name in ENDED or self.name == UNKNOWN

    @property
    def failed(self) -> dict[int, "State"]:
        """The tasks of an array that ended in another way than well."""
        return {task: state for task, state in self.tasks.items() if state.ended and state.name != "COMPLETED"}

    def __str__(self) -> str:
        return self.name + (f" on {self.nodes}" if self.nodes else f" ({self.reason})" if self.reason else "")


def submit(script: Path) -> str:
    """The job's id. SlurmError holds what sbatch said."""
    return command("sbatch", "--parsable", str(script)).split(";")[0].strip()


def state(job: str) -> State | None:
    """None once the queue has forgotten the job."""
    try:
        answer = command("squeue", "--noheader", "--array", "--jobs", job, "--states=all", "--format=%K|%T|%N|%r")
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
    return whole(tasks) if tasks else rows[0] if rows else None


def whole(tasks: dict[int, State]) -> State:
    """Of an array by its tasks: it has ended when all of its tasks have, and badly if one has."""
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


def of_script(script: Path, states: str = "all") -> set[str]:
    """Ids of this user's jobs of a job script that are in the queue."""
    answer = command("squeue", f"--user={os.getuid()}", "--noheader", f"--states={states}", "--format=%F|%o")
    return {job for job, _, path in (line.partition("|") for line in answer.splitlines()) if path == str(script)}


def step_runs(job: str, name: str) -> bool:
    """Whether a step of that name runs in a job."""
    answer = command("squeue", "--steps", "--noheader", "--format=%i|%j")
    return any(line.startswith(f"{job}.") and line.partition("|")[2] == name for line in answer.splitlines())


def command(*words: str) -> str:
    """What a command of Slurm's says; SlurmError where it fails or is not here."""
    try:
        done = subprocess.run(words, capture_output=True, text=True, errors="replace", timeout=COMMAND_S)
    except FileNotFoundError:
        raise SlurmError(f"{words[0]} is not here: this command runs on a login node") from None
    except subprocess.TimeoutExpired:
        raise SlurmError(f"{words[0]}: no answer in {COMMAND_S:.0f} s") from None
    if done.returncode:
        raise SlurmError(done.stderr.strip() or f"{words[0]} ended with {done.returncode}", done.returncode)
    return done.stdout
