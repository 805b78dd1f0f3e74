"""What Slurm's accounting (sacct) says of a job that has ended, as numbers with their units in their names."""

import re
import time
from collections.abc import Iterable, Iterator
from typing import Any

from jaxinfer.cluster.slurm import expand_hosts
from slurm.jobs import SlurmError, State, command, whole

TEXTS = {
    "id": "JobID", "name": "JobName", "state": "State", "exit_code": "ExitCode", "partition": "Partition",
    "account": "Account", "tres": "AllocTRES", "submit": "Submit", "start": "Start", "end": "End",
}  # fmt: skip
# CPU time is that of the tasks (user and system), allocated CPU time is elapsed time times cores
NUMBERS = {
    "elapsed_s": "ElapsedRaw", "cpu_s": "TotalCPU", "allocated_cpu_s": "CPUTimeRAW", "max_rss_bytes": "MaxRSS",
    "energy_j": "ConsumedEnergyRaw",
}  # fmt: skip
UNMEASURED_AT_0 = {"cpu_s", "max_rss_bytes", "energy_j"}  # Slurm's word for what it did not measure
FIELDS = [*TEXTS.values(), "NodeList", *NUMBERS.values()]
UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40, "P": 1 << 50}
SEPARATOR = "\x1f"  # a name may contain sacct's own
NONSENSE = 1 << 62  # Slurm's NO_VAL64, which some versions print

Record = dict[str, Any]


def account(job: str, tasks: int = 1, step: str | None = None, wait_s: float = 20.0) -> list[Record]:
    """A record for each attempt, task and step, once the last of the array's `tasks` has ended; of a step that is
    known by its name, its own alone. Slurm has them some seconds late.

    Raises:
      SlurmError: no sacct, no accounting, or no end there after `wait_s`.
    """
    until = time.monotonic() + wait_s
    options = ("--parsable2", f"--delimiter={SEPARATOR}", "--noconvert", "--duplicates", f"--format={','.join(FIELDS)}")
    while True:
        records = parse(command("sacct", "--jobs", job, *options))
        if step is not None:
            records = [record for record in records if record["name"] == step]
        known = {each for record in records if step or _is_job(record) for each in _job_ids(record["id"])}
        if len(known) >= tasks and all(record["end"] for record in records):
            return records
        if time.monotonic() > until:
            raise SlurmError(f"sacct has no end of job {job} after {wait_s:.0f} s")
        time.sleep(1)


def parse(text: str) -> list[Record]:
    """The lines of sacct, the first with the names of its columns."""
    names, *rows = [line.split(SEPARATOR) for line in text.splitlines()] or [[]]
    return [_record(dict(zip(names, row))) for row in rows]


def _record(row: dict[str, str]) -> Record:
    record: Record = {field: _text(row.get(name, "")) for field, name in TEXTS.items()}
    record["nodes"] = _nodes(row.get("NodeList", ""))
    for field, name in NUMBERS.items():
        number = _seconds(row.get(name, "")) if name == "TotalCPU" else _number(row.get(name, ""))
        record[field] = None if number == 0 and field in UNMEASURED_AT_0 else number
    return record


def _text(text: str) -> str | None:
    return None if text in ("", "Unknown", "None") else text


def _nodes(text: str) -> list[str]:
    return [] if text in ("", "None assigned") else expand_hosts(text)


def _number(text: str) -> int | None:
    """``1234K`` as a number; None where there is none."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([KMGTP]?)", text)
    number = round(float(found[1]) * UNITS[found[2]]) if found else None
    return None if number is None or number >= NONSENSE else number


def _seconds(text: str) -> float | None:
    """``[DAYS-][HOURS:]MINUTES:SECONDS[.MILLISECONDS]`` in seconds."""
    found = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+(?:\.\d+)?)", text)
    if not found:
        return None
    days, hours, minutes = (int(each or 0) for each in found.groups()[:3])
    return ((days * 24 + hours) * 60 + minutes) * 60 + float(found[4])


def summary(job: str, records: list[Record]) -> Record:
    """`records` with figures of the whole before them: of the last attempt; of an array the sum over its tasks, but the
    longest time elapsed and the most memory."""
    last = {group[0]["id"]: group for group in _attempts(records)}.values()
    return {
        "job": job,
        "state": last_state(records).name,
        "elapsed_s": _most(group[0]["elapsed_s"] for group in last),
        "cpu_s": _sum(_of(group, "cpu_s", _sum) for group in last),
        "allocated_cpu_s": _sum(group[0]["allocated_cpu_s"] for group in last),
        "max_rss_bytes": _most(record["max_rss_bytes"] for group in last for record in group),
        # each step's is that of its nodes, so those of steps beside each other are not to be added
        "energy_j": _sum(_of(group, "energy_j", _most) for group in last),
        "records": records,
    }


def last_state(records: list[Record]) -> State:
    """Of the last attempt."""
    last = {}
    for attempt, *_ in _attempts(records):
        last |= dict.fromkeys(_job_ids(attempt["id"]), State(attempt["state"].split()[0]))
    tasks = {int(job.partition("_")[2]): state for job, state in last.items() if "_" in job}
    return whole(tasks) if tasks else next(iter(last.values()))


def _attempts(records: list[Record]) -> Iterator[list[Record]]:
    """Each job's record with those of its steps, which come after it; a step without its job is one by itself."""
    group: list[Record] = []
    for record in records:
        if group and (_is_job(record) or not _is_job(group[0])):
            yield group
            group = []
        group.append(record)
    if group:
        yield group


def _is_job(record: Record) -> bool:
    return "." not in record["id"]


def _job_ids(text: str) -> list[str]:
    """``7_[2-4%2]``, tasks that never began, to 7_2, 7_3, 7_4; any other id alone."""
    return expand_hosts(re.sub(r"%\d+\]", "]", text))


def _of(group: list[Record], field: str, total) -> float | None:
    """A figure of a job, by its own record or, where that has none, by its steps'."""
    own = group[0][field]
    return total(record[field] for record in group[1:]) if own is None else own


def _sum(values: Iterable[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    return sum(there) if there else None


def _most(values: Iterable[float | None]) -> float | None:
    return max((value for value in values if value is not None), default=None)
