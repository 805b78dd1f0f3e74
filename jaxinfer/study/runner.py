"""Runs the cells of a study that are not measured yet, one after the other or as jobs, and keeps what came of them."""

import os
import shlex
import shutil
import sys
import time
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any

import attrs

from jaxinfer import __version__
from jaxinfer.checkpoint.files import write_json, write_whole
from jaxinfer.study import jobs
from jaxinfer.study.command import OUTPUT, PROFILE, command, environment, script
from jaxinfer.study.errors import StudyError
from jaxinfer.study.expand import Cell
from jaxinfer.study.file import Study
from jaxinfer.study.identity import code, differences
from jaxinfer.study.place import Place
from jaxinfer.study.process import ended, run
from jaxinfer.study.prompts import encoded
from jaxinfer.study.state import cells_there, locked, now, read_json, read_state, write_state

METRICS = "out.metrics.json"
LOG = Path("logs") / "command.log"
FULL = 1 << 20  # bytes free below which a disk is full
QUIET = 5  # looks at the queue without an answer, one after another, before we give up

Say = Callable[[str], None]


@attrs.frozen
class Runner:
    """`why`: cell to the reason it is not run; `keep`: the lock's file descriptor."""

    root: Path
    place: Place
    keep: int
    say: Say
    poll_s: float
    total: int

    def run(self, cells: list[Cell]) -> None:
        """All that are not done, in their order."""
        here = [cell for cell in cells if self._state(cell)["state"] not in ("done", "skipped")]
        for _, group in groupby(here, key=lambda cell: cell.experiment):
            together: list[Cell] = []
            for cell in group:
                if self.place.cluster is None or self.place.inside or cell.reference:
                    self._run_here(cell)
                elif cell.kind == "optimization":  # A and B in turn, and B by A's profile
                    self._run_jobs([cell])
                else:
                    together.append(cell)
            self._run_jobs(together)

    def _state(self, cell: Cell) -> dict[str, Any]:
        return read_state(self.root / cell.folder)

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

    def _run_here(self, cell: Cell) -> None:
        folder, log = self.root / cell.folder, self.root / cell.folder / LOG
        if why := self._lacks(cell):
            self._end(cell, why)
            return
        state = self._begin(cell)
        self.say(f"{cell.label}: {shlex.quote(str(folder))}")
        try:
            status = run(
                command(cell, self.root, self.place), environment(cell, self.place), log, self.keep,
                step=self.place.inside and not cell.reference,
            )  # fmt: skip
        except KeyboardInterrupt:
            write_state(folder, state, state="waiting", why="interrupted", ended=now())
            raise
        self._end(cell, ended(status, log) if status else verdict(cell, folder))

    def _run_jobs(self, cells: list[Cell]) -> None:
        """Submits those without a job, follows all until they have ended."""
        followed = [cell for cell in cells if self._submitted(cell)]
        failures = 0
        while followed:
            time.sleep(self.poll_s)
            for cell in list(followed):
                try:
                    told, failures = jobs.status(self.root / cell.folder), 0
                except jobs.JobError as error:
                    failures += 1
                    self.say(f"{cell.label}: {error}")
                    if failures >= QUIET * len(followed):
                        raise StudyError(f"Slurm does not answer; the jobs go on, {AGAIN} follows them") from None
                    continue
                if told is None or told["ended"]:
                    followed.remove(cell)
                    self._collect(cell, told)

    def _submitted(self, cell: Cell) -> bool:
        folder = self.root / cell.folder
        try:
            # the job of a study that was killed or interrupted goes on: it is followed, not run again
            told = jobs.status(folder) if self._state(cell)["state"] != "failed" else None
            if told is not None:
                write_state(folder, read_state(folder), state="running", job=str(told["job"]))
                self.say(f"{cell.label}: job {told['job']} of before, {told['state']}")
                return True
            if why := self._lacks(cell):
                self._end(cell, why)
                return False
            state = self._begin(cell)
            job = jobs.submit(command(cell, self.root, self.place))
        except jobs.JobError as error:
            self._end(cell, f"not submitted: {error}")
            return False
        write_state(folder, state, job=job)
        self.say(f"{cell.label}: job {job}")
        return True

    def _collect(self, cell: Cell, told: dict[str, Any] | None) -> None:
        folder, log = self.root / cell.folder, self.root / cell.folder / "logs" / "collect.log"
        try:
            status = jobs.collect(folder, log)
        except jobs.JobError as error:
            self._end(cell, str(error))
            return
        if status:
            state = told["state"] if told else "no job"
            self._end(cell, f"job {told['job'] if told else '?'}: {state}; {ended(status, log)}")
        else:
            self._end(cell, verdict(cell, folder))

    def _lacks(self, cell: Cell) -> str:
        if cell.after is not None and not (self.root / cell.after.folder / PROFILE).exists():
            return f"{cell.after.label} left no {PROFILE} for stage_layers: measured"
        return ""

    def _end(self, cell: Cell, why: str) -> None:
        folder = self.root / cell.folder
        state = read_state(folder)
        write_state(folder, state, state="failed" if why else "done", why=why or None, ended=now())
        self.say(f"{cell.label}: {f'FAILED: {why}' if why else f'measured{_figures(folder)}'}")
        if why and shutil.disk_usage(self.root).free < FULL:
            raise OSError(28, os.strerror(28), str(self.root))


AGAIN = "the same command"


def verdict(cell: Cell, folder: Path) -> str:
    """Why what a command left is no measurement, after it ended well; "" if it is one."""
    if cell.reference:
        try:
            with open(folder / OUTPUT, "rb") as file:
                lines = sum(line.endswith(b"\n") for line in file)
        except OSError:
            lines = 0
        return "" if lines >= len(cell.lines) else f"{lines} of {len(cell.lines)} results are there"
    found = read_json(folder / METRICS)
    if not found:
        return f"{METRICS} is not there"
    if found.get("unfinished"):
        return f"{found['unfinished']} requests are unfinished"
    if found.get("failed"):
        return f"{found['failed']} samples ended with an error: {found.get('first_failure')}"
    return ""


def describe(cell: Cell, root: Path, place: Place) -> dict[str, Any]:
    """cell.json. A cell without seats has no command."""
    return {
        "experiment": cell.experiment,
        "kind": cell.kind,
        "model": cell.model.name,
        "cell": cell.name,
        "hash": cell.hash,
        "role": cell.role,
        "x": cell.x,
        "settings": cell.settings,
        "command": command(cell, root, place) if cell.seats else None,
        "environment": environment(cell, place) if cell.seats else {},
        "device_kind": cell.device_kind,
        "identity": cell.identity,
    }


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
    """The exit status: 0 where every cell that can be is measured, 1 where one failed. `reasons`: of cells to the
    folders of those that do not fit, and why.

    Raises:
      StudyError: another study in the same folder; OSError: a disk that takes no more; KeyboardInterrupt.
    """
    wanted = [cell for cell in cells if only in (None, cell.experiment)]
    with locked(root, say) as keep:
        _write_study(study, path, cells, place, root)
        measured = [cell for cell in wanted if is_done(cell, root)]
        left = [cell for cell in wanted if cell not in measured]
        why = reasons(left)
        for cell in left:
            _prepare(cell, why.get(cell.folder, cell.why), place, root)
        _mark_orphans(cells, root, say)
        skipped = [cell for cell in left if read_state(root / cell.folder)["state"] == "skipped"]
        say(_heading(study, wanted, measured, skipped, place))
        for cell in skipped:
            say(f"{cell.label}: skipped: {read_state(root / cell.folder)['why']}")
        Runner(root, place, keep, say, poll_s, len(wanted)).run(left)
        return _conclude(wanted, root, say)


def is_done(cell: Cell, root: Path) -> bool:
    folder = root / cell.folder
    return read_state(folder)["state"] == "done" and not verdict(cell, folder)


def _write_study(study: Study, path: Path, cells: list[Cell], place: Place, root: Path) -> None:
    from jaxinfer.telemetry.manifest import git_commit

    write_whole(root / "study.yaml", path.read_bytes())
    for name in {cell.prompts: cell for cell in cells if cell.seats}:
        if not (root / name).exists():
            cell = next(each for each in cells if each.prompts == name)
            write_whole(root / name, encoded(cell.lines))
    models = {cell.model.name: cell.model for cell in cells}
    write_json(root / "lock.json", {
        "study": study.study,
        "file": str(path),
        "run": now(),
        "command": sys.argv,
        "versions": {"jaxinfer": __version__, "python": sys.version.split()[0], **_versions()},
        "commit": git_commit(Path(__file__).parent),
        "code": code(),
        "cluster": place.cluster,
        "device_kind": place.device_kind,
        "models": {name: attrs.asdict(each.declared) | {"identity": each.identity} for name, each in models.items()},
        "prompts": sorted({cell.prompts for cell in cells}),
        "cells": [cell.folder for cell in cells],
    })  # fmt: skip


def _versions() -> dict[str, str]:
    import importlib.metadata

    from jaxinfer.telemetry.manifest import PACKAGES

    return {name: importlib.metadata.version(name) for name in PACKAGES}


def _prepare(cell: Cell, why: str, place: Place, root: Path) -> None:
    """Writes what the cell is; its state becomes waiting or skipped, but for one that failed and is tried again."""
    folder = root / cell.folder
    state = read_state(folder)
    write_json(folder / "cell.json", describe(cell, root, place))
    if why:
        write_state(folder, state, state="skipped", why=why)
    elif state["state"] == "done":
        write_state(folder, state, state="waiting", why=f"it was measured, but {verdict(cell, folder)}")
    elif state["state"] in ("skipped", "running"):
        write_state(folder, state, state="waiting", why=None if state["state"] == "skipped" else "interrupted")
    elif not (folder / "state.json").exists():
        write_state(folder, state)


def _mark_orphans(cells: list[Cell], root: Path, say: Say) -> None:
    """Says which cells of the folder are none of this study file's, and why; they stay, and say it themselves."""
    mine = {cell.folder: cell for cell in cells}
    for folder in cells_there(root):
        name, state = str(folder.relative_to(root)), read_state(folder)
        orphan = name not in mine
        if state.get("orphan", False) != orphan:
            write_state(folder, state, orphan=orphan)
        if orphan:
            told = read_json(folder / "cell.json")
            place = folder.parent.name, told.get("cell")
            near = next((each for each in cells if (each.experiment, each.name) == place), None)
            changed = differences(told.get("identity", {}), near.identity) if near else []
            what = f"changed: {', '.join(changed)}" if changed else "the study file has no such cell any more"
            say(f"{name}: an orphan, which stays ({what})")


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
    return 1 if failed else 0


def _figures(folder: Path) -> str:
    rate = read_json(folder / METRICS).get("output_tokens_per_s")
    return f": {rate:,.1f} tokens/s" if isinstance(rate, int | float) else ""
