"""A run's folder: which job it is of, and how that stands."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jaxinfer.checkpoint.files import write_json
from slurm import jobs
from slurm.accounting import account, last_state
from slurm.follow import Results

PROGRAM = "slurm.submit"

Told = dict[str, Any]  # submit.json: job, step (of an allocation, by its name), prompts, results, shards, ...


class UsageError(Exception):
    """What the user can mend: one line."""


@contextmanager
def usage() -> Iterator[None]:
    """What is wrong with a file, as one line."""
    try:
        yield
    except OSError as error:
        raise UsageError(f"{error.filename}: {os.strerror(error.errno)}") from error
    except ValueError as error:
        raise UsageError(str(error)) from error


def write(run: Path, told: Told) -> None:
    with usage():
        write_json(run / "submit.json", told)


def read(run: Path) -> Told:
    """What was submitted for a folder. Where the command was killed before it had noted the job, the job is looked up.

    Raises:
      UsageError: nothing was, or submit.json cannot be read.
    """
    try:
        told = json.loads((run / "submit.json").read_bytes())
    except FileNotFoundError:
        raise UsageError(f"{run}: submit.json is missing: no job was submitted for this folder") from None
    except (OSError, ValueError) as error:
        raise UsageError(f"{run / 'submit.json'}: {error}") from None
    if told["job"] is None:
        told["job"] = _look_up(run, told["previous"]) or told["previous"]
        if told["job"] is None:
            raise UsageError(f"{run}: no job was submitted for this folder")
        write(run, told)
    return told


def previous(run: Path) -> str | None:
    """The job that was submitted last for a folder, if any was."""
    try:
        told = json.loads((run / "submit.json").read_bytes())
        return told["job"] or told["previous"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _look_up(run: Path, previous: str | None) -> str | None:
    """The newest job of the folder's script after `previous`, by the queue and by what jobs that began have left."""
    began = {path.read_text().strip() for path in (run / "logs").glob("**/started")}  # of slurm/step.sh
    ids = {int(job) for job in [*began, *jobs.of_script(run / "job.sh")] if job.isdigit()}
    newest = max(ids, default=0)
    return str(newest) if newest > int(previous or 0) else None


def name(told: Told) -> str:
    return f"job {told['job']}" if told.get("step") is None else f"step {told['step']} of job {told['job']}"


def outputs(run: Path, told: Told) -> list[Path]:
    shards = told["shards"]
    return [run / "out.jsonl"] if shards is None else [run / "parts" / f"{shard}.jsonl" for shard in range(shards)]


def state(told: Told) -> jobs.State:
    """By the queue, else by the accounting; UNKNOWN where neither knows the job."""
    job, step = told["job"], told.get("step")
    if step is not None:
        found = jobs.State("RUNNING") if jobs.step_runs(job, step) else None
    else:
        found = jobs.state(job)
    if found is None:
        try:
            found = last_state(account(job, told["shards"] or 1, step, wait_s=0))
        except jobs.SlurmError:
            found = jobs.State(jobs.UNKNOWN)
    return found


def status(run: Path) -> dict[str, Any]:
    """How the job of a folder stands, and how many of its results are there."""
    told = read(run)
    found = state(told)
    results = [Results(path) for path in outputs(run, told)]
    for each in results:
        each.read()
    return {
        "job": told["job"],
        "state": found.name,
        "ended": found.ended,
        "reason": found.reason or None,
        "nodes": found.nodes or None,
        "results": sum(each.lines for each in results),
        "expected": told["results"],
    }
