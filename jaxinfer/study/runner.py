"""Runs the cells of a study that are not measured yet, one after the other or as jobs, and keeps what came of them."""

import errno
import os
import shutil
import time
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any

import attrs
from tqdm import tqdm

from jaxinfer.checkpoint.files import write_json, write_whole
from jaxinfer.study import jobs
from jaxinfer.study.command import PROFILE, command, environment, script
from jaxinfer.study.errors import StudyError
from jaxinfer.study.expand import Cell
from jaxinfer.study.file import Study
from jaxinfer.study.folder import (
    METRICS,
    Say,
    describe,
    has_job,
    is_done,
    mark_orphans,
    prepare,
    verdict,
    write_study,
)
from jaxinfer.study.place import Place
from jaxinfer.study.process import ended, run
from jaxinfer.study.state import locked, now, read_json, read_state, write_state

LOG = Path("logs") / "command.log"
FULL = 1 << 20  # bytes free below which a disk is full
QUIET = 5  # looks at the queue without an answer, one after another, before we give up
NO_JOB = 2  # exit status of slurm.submit --status


@attrs.define
class Runner:
    """`keep`: the lock's file descriptor; `bar`: of the cells that are to run."""

    root: Path
    place: Place
    keep: int
    say: Say
    poll_s: float
    bar: tqdm
    count: int = 0

    def run(self, cells: list[Cell]) -> None:
        """In their order; on a cluster, all cells of an experiment at once."""
        for _, group in groupby(cells, key=lambda cell: cell.experiment):
            together: list[Cell] = []
            for cell in group:
                if self.place.cluster is None or self.place.inside or cell.reference:
                    self._run_here(cell)
                elif cell.kind == "optimization":  # A and B in turn, and B by A's profile
                    self._run_jobs([cell])
                else:
                    together.append(cell)
            self._run_jobs(together)

    def _run_here(self, cell: Cell) -> None:
        folder, log = self.root / cell.folder, self.root / cell.folder / LOG
        if why := self._lacks(cell):
            self._end(cell, why)
            return
        if self.place.inside:
            self._wait_for_step(cell)
        state = self._begin(cell)
        self._tell(cell, f"runs, its output in {log}")
        self.bar.set_description(cell.label)
        words, variables = command(cell, self.root, self.place), environment(cell, self.place)
        try:
            status = run(words, variables, log, self.keep, self.bar.refresh, self.place.inside and not cell.reference)
        except KeyboardInterrupt:
            write_state(folder, state, state="waiting", why="interrupted", ended=now())
            raise
        self._end(cell, ended(status, log) if status else verdict(cell, folder))

    def _begin(self, cell: Cell) -> dict[str, Any]:
        """An empty folder, and a state that says whose attempt it is."""
        folder = self.root / cell.folder
        state = write_state(folder, read_state(folder), state="waiting", why=None, job=None)
        for path in folder.iterdir():
            if path.name in ("cell.json", "state.json"):
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
        words, variables = command(cell, self.root, self.place), environment(cell, self.place)
        write_json(folder / "cell.json", describe(cell, self.root, self.place))
        write_whole(folder / "command.sh", script(words, variables).encode())
        attempts = state["attempts"] + 1
        return write_state(folder, state, state="running", began=now(), ended=None, attempts=attempts)

    def _run_jobs(self, cells: list[Cell]) -> None:
        """Submits those that have no job, and follows all to their ends."""
        followed: dict[Cell, dict[str, Any]] = {}
        try:
            for cell in cells:
                if self._submit(cell):
                    followed[cell] = {}
            failures = 0
            while followed:
                time.sleep(self.poll_s)
                try:
                    found = jobs.status([self.root / cell.folder for cell in followed])
                    failures = 0
                except jobs.JobError as error:
                    failures += 1
                    self.say(f"Slurm: {error}")
                    if failures == QUIET:
                        raise StudyError(
                            "Slurm does not answer; the jobs go on, the same command follows them"
                        ) from None
                    continue
                for cell, told in zip(list(followed), found):
                    self._look(cell, followed.pop(cell), told)
                    if told["ended"]:
                        self._collect(cell, told)
                    else:
                        followed[cell] = told
        except KeyboardInterrupt:
            ids = [str(read_state(self.root / cell.folder)["job"]) for cell in followed]
            if ids:
                self.say(f"the jobs go on, and the same command follows them; scancel {' '.join(ids)} ends them")
            raise

    def _submit(self, cell: Cell) -> bool:
        """Whether there is a job to follow."""
        folder = self.root / cell.folder
        if told := self._job_of_before(folder):
            write_state(folder, read_state(folder), state="running", why=None, job=str(told["job"]))
            self._tell(cell, f"job {told['job']}, submitted before")
            return True
        if why := self._lacks(cell):
            self._end(cell, why)
            return False
        before = read_state(folder)
        state = self._begin(cell)
        try:
            job = jobs.submit(command(cell, self.root, self.place))
        except jobs.JobError as error:
            if error.silent:  # what is wrong is the place, and not this cell
                write_state(folder, before, state="waiting", why=None, job=None)
                raise _no_answer(error) from None
            self._end(cell, f"not submitted: {error}")
            return False
        write_state(folder, state, job=job)
        self._tell(cell, f"job {job}")
        return True

    def _job_of_before(self, folder: Path) -> dict[str, Any] | None:
        """The job of a study that was killed, interrupted or lost sight of it: it is followed and not run again."""
        if not (folder / "submit.json").exists():
            return None
        try:
            [told] = jobs.status([folder])
        except jobs.JobError as error:
            if error.status == NO_JOB:
                return None
            raise _no_answer(error) from None
        return told if has_job(folder) or not told["ended"] else None

    def _wait_for_step(self, cell: Cell) -> None:
        """A step of a study that was killed ends before the cell is measured anew."""
        folder, said = self.root / cell.folder, False
        while (told := self._job_of_before(folder)) and not told["ended"]:
            if not said:
                self._tell(cell, f"waits for the step of before in job {told['job']}")
            said = True
            time.sleep(self.poll_s)

    def _look(self, cell: Cell, before: dict[str, Any], told: dict[str, Any]) -> None:
        if told["state"] != before.get("state"):
            more = told.get("nodes") or told.get("reason")
            self._tell(cell, f"job {told['job']}: {told['state']}{f' ({more})' if more else ''}")
        self.bar.refresh()

    def _collect(self, cell: Cell, told: dict[str, Any]) -> None:
        folder, log = self.root / cell.folder, self.root / cell.folder / "logs" / "collect.log"
        try:
            status = jobs.collect(folder, log)
        except jobs.JobError as error:
            self._end(cell, str(error))
            return
        why = f"job {told['job']}: {told['state']}; {ended(status, log)}" if status else verdict(cell, folder)
        self._end(cell, why)

    def _lacks(self, cell: Cell) -> str:
        if cell.after is not None and not (self.root / cell.after.folder / PROFILE).exists():
            return f"{cell.after.label} left no {PROFILE}, by which stage_layers is measured"
        return ""

    def _end(self, cell: Cell, why: str) -> None:
        folder = self.root / cell.folder
        write_state(folder, read_state(folder), state="failed" if why else "done", why=why or None, ended=now())
        self.bar.update()
        self.count += 1  # the bar counts on a terminal alone
        self._tell(cell, f"FAILED: {why}" if why else f"measured{_figures(folder)}")
        if why and (os.strerror(errno.ENOSPC) in why or shutil.disk_usage(self.root).free < FULL):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.root))

    def _tell(self, cell: Cell, text: str) -> None:
        self.say(f"[{self.count}/{self.bar.total}] {cell.label}: {text}")


def run_study(
    study: Study,
    path: Path,
    cells: list[Cell],
    reasons: Callable[[list[Cell]], dict[str, str]],
    place: Place,
    root: Path,
    only: str | None,
    poll_s: float,
    say: Say,
) -> int:
    """The exit status: 0 where every cell that can be is measured, 1 where one failed or asks for what no device could
    give. `reasons`: of cells to the folders of those that do not fit, and why.

    Raises:
      StudyError: another study in the same folder; OSError: a disk that takes no more; KeyboardInterrupt.
    """
    wanted = [cell for cell in cells if only in (None, cell.experiment)]
    with locked(root, say) as keep:
        write_study(study, path, cells, place, root)
        measured = [cell for cell in wanted if is_done(cell, root)]
        left = [cell for cell in wanted if cell not in measured]
        why = reasons(left)
        for cell in left:
            prepare(cell, why.get(cell.folder, cell.why), place, root)
        mark_orphans(cells, root, say)
        skipped = [cell for cell in left if read_state(root / cell.folder)["state"] == "skipped"]
        say(_heading(study, wanted, measured, skipped, place))
        for cell in skipped:
            say(f"{cell.label}: skipped: {read_state(root / cell.folder)['why']}")
        todo = [cell for cell in left if cell not in skipped]
        with tqdm(total=len(todo), unit=" cell", dynamic_ncols=True, disable=None) as bar:
            Runner(root, place, keep, say, poll_s, bar).run(todo)
        return _conclude(wanted, root, say)


def _no_answer(error: jobs.JobError) -> StudyError:
    return StudyError(
        f"Slurm does not answer: {error}; run this on a login node where squeue works. Jobs that were submitted go on, "
        "and the same command follows them and submits the others"
    )


def _heading(study: Study, cells: list[Cell], measured: list[Cell], skipped: list[Cell], place: Place) -> str:
    left = len(cells) - len(measured) - len(skipped)
    parts = [f"{len(measured)} measured"] * bool(measured) + [f"{len(skipped)} skipped"] * bool(skipped)
    return f"{study.study}: {len(cells)} cells on {place}: {', '.join([*parts, f'{left} to run'])}"


def _conclude(cells: list[Cell], root: Path, say: Say) -> int:
    states = {cell.label: read_state(root / cell.folder) for cell in cells}
    counts = {name: sum(state["state"] == name for state in states.values()) for name in ("done", "skipped", "failed")}
    failed = {label: state["why"] for label, state in states.items() if state["state"] == "failed"}
    say(f"{counts['done']} measured, {counts['skipped']} skipped, {counts['failed']} failed; cells: {root / 'cells'}")
    for label, why in failed.items():
        say(f"FAILED: {label}: {why}")
    return 1 if failed or any(cell.refused for cell in cells) else 0


def _figures(folder: Path) -> str:
    rate = read_json(folder / METRICS).get("output_tokens_per_s")
    return f": {rate:,.1f} tokens/s" if isinstance(rate, int | float) else ""
