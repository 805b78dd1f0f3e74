"""What is made of a job that has ended: its accounting, the merged results, a picture, and what is said of it."""

import json
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

from jaxinfer.checkpoint.files import write_json
from slurm import jobs, runs, shards
from slurm.accounting import account, last_state, summary

SHOWN_LINES = 20
ECHO = re.compile(r"^slurmstepd\S* error: \*\*\* STEP \S+ ON \S+ CANCELLED AT \S+ \*\*\*$")  # of another task's failure
SHOWN_TASKS = 3  # of an array, with their logs


def collect(run: Path, told: runs.Told, state: jobs.State) -> int:
    """`state` is the job's last. Exit status: 0 complete, 1 failed or results are missing."""
    outputs = runs.outputs(run, told)
    state = _account(run, told, state)
    missing = _merge(run, told, outputs) if told["shards"] else _missing(outputs[0], told["results"])
    _draw(run, outputs)
    if state.name not in ("COMPLETED", jobs.UNKNOWN) or missing:
        _show_failure(run, told, state, missing)
        return 1
    _show_success(run, told, outputs)
    return 0


def _account(run: Path, told: runs.Told, state: jobs.State) -> jobs.State:
    """Keeps the accounting; the state from there if the queue has forgotten the job."""
    try:
        records = account(told["job"], told["shards"] or 1, told.get("step"))
    except jobs.SlurmError as error:
        _warn(f"no accounting: {error}")
        return state
    with runs.usage():
        write_json(run / "sacct.json", summary(told["job"], records))
    return last_state(records) if state.name == jobs.UNKNOWN else state


def _merge(run: Path, told: runs.Told, parts: list[Path]) -> str:
    """Merges the shards' results; what is missing, "" if nothing is."""
    prompts = Path(told["prompts"])
    try:
        missing = shards.unfinished(prompts, parts)
        if missing:
            return f"results of shard{'s'[: len(missing) > 1]} {_listed(missing)} are missing"
        shards.merge(prompts, parts, run / "out.jsonl")
    except (ValueError, OSError) as error:
        return f"the results in parts/ cannot be merged: {error}"
    return ""


def _missing(output: Path, results: int) -> str:
    try:
        with open(output, "rb") as file:
            if sum(line.endswith(b"\n") for line in file) >= results:
                return ""
    except OSError:
        pass
    return "results are missing"


def _listed(tasks: Iterable[int]) -> str:
    tasks = list(tasks)
    shown = ", ".join(map(str, tasks[:SHOWN_LINES]))
    return shown + (f" and {len(tasks) - SHOWN_LINES} more" if len(tasks) > SHOWN_LINES else "")


def _draw(run: Path, outputs: list[Path]) -> None:
    """A picture of the outputs that have results; a job that failed may have left some without."""
    from jaxinfer.plot import PlotError, draw, read_run

    shown, refused = [], []
    for path in outputs:
        try:
            read_run(path, path.name)
            shown.append(path)
        except PlotError as error:
            refused.append(error)
    try:
        if not shown:
            raise refused[0]
        draw(shown, run / "out.png")
    except PlotError as error:
        _warn(f"no figure: {error}")
        return
    if refused:
        print(f"{runs.PROGRAM}: out.png shows the results of {len(shown)} of {len(outputs)} shards", file=sys.stderr)


def _show_failure(run: Path, told: runs.Told, state: jobs.State, missing: str) -> None:
    if state.tasks:
        _show_tasks(run, told["job"], state.failed)
    else:
        _show_logs(run / "logs", run / "job.log")
    what = f"{missing}; the same command continues" if missing else "all results are there"
    print(f"{runs.name(told)} ended: {state}; {what}; logs: {run / 'logs'} and {run}/job*.log", file=sys.stderr)


def _show_tasks(run: Path, job: str, failed: Mapping[int, jobs.State]) -> None:
    for task in list(failed)[:SHOWN_TASKS]:
        print(f"job {job}, task {task} ended: {failed[task]}", file=sys.stderr)
        _show_logs(run / "logs" / str(task), run / f"job-{task}.log")
    if more := list(failed)[SHOWN_TASKS:]:
        print(f"job {job}, tasks {_listed(more)} ended badly too", file=sys.stderr)


def _show_logs(folder: Path, job_log: Path) -> None:
    """The last lines of the job's log and then, since it says why, of rank 0's newest."""
    ranks = sorted(folder.glob("rank-0-*.log"), key=lambda path: path.stat().st_mtime)
    for path in (job_log, *ranks[-1:]):
        if path.exists() and path.stat().st_size:
            lines = [line for line in path.read_text("utf-8", errors="replace").splitlines() if not ECHO.search(line)]
            print(f"---- last lines of {path}", *lines[-SHOWN_LINES:], sep="\n", file=sys.stderr)


def _show_success(run: Path, told: runs.Told, outputs: list[Path]) -> None:
    tokens = seconds = 0.0
    for output in outputs:
        try:
            metrics = json.loads((output.parent / f"{output.stem}.metrics.json").read_bytes())
        except (OSError, ValueError):
            continue
        tokens, seconds = tokens + metrics.get("output_tokens", 0), max(seconds, metrics.get("work_s", 0))
    rate = f": {tokens:,.0f} tokens, {tokens / seconds:,.0f} per second in the last attempt" if seconds else ""
    print(f"{runs.name(told)} is complete{rate}\n{run}:", file=sys.stderr)
    for path in sorted(run.iterdir()):
        print(f"  {path.name}{'/' if path.is_dir() else ''}", file=sys.stderr)


def _warn(what: str) -> None:
    print(f"{runs.PROGRAM}: WARNING: {what}", file=sys.stderr)
