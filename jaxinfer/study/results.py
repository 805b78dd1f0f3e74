"""The cells of a study's folder, read as they are. What a cell lacks is None, never 0; what is wrong is said.

Tables and figures are made of this alone, so that they can be made again wherever the folder's `cells/` are.
"""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import attrs

from jaxinfer.json_text import read_object
from jaxinfer.study.errors import StudyError

KINDS = ("correctness", "strong", "weak", "batch", "optimization", "grid")
DONE = "done"
X_KNOWN = ("mesh", "devices", "nodes", "batch", "requests", "round")  # of a cell's x; the others are a grid's own


class ResultsError(StudyError):
    """A folder without a study's cells, or no way to draw them: one line that says so."""


@attrs.frozen
class Spread:
    """Median, least and most of the repeats; of one run there is no range."""

    median: float
    least: float | None = None
    most: float | None = None

    def over(self, other: "Spread") -> "Spread":
        """The ratio of the medians, from the least that the ranges allow to the most."""
        if None in (self.least, self.most, other.most) or not other.least:
            return Spread(self.median / other.median)
        return Spread(self.median / other.median, self.least / other.most, self.most / other.least)

    def times(self, factor: float) -> "Spread":
        return Spread(*(None if each is None else each * factor for each in attrs.astuple(self)))


@attrs.frozen
class Cell:
    """One command of a study and what it left. `x` is where it stands in its experiment, `problems` what could not be
    read."""

    folder: Path
    experiment: str
    kind: str
    model: str
    name: str
    hash: str
    role: str
    x: Mapping[str, Any]
    settings: Mapping[str, Any]
    against: str  # what a baseline that is not ours is: transformers and its version
    state: str
    why: str
    ended: str
    metrics: Mapping[str, Any] | None
    profile: Mapping[str, Any] | None
    run: Mapping[str, Any] | None
    sacct: Mapping[str, Any] | None
    problems: tuple[str, ...] = ()

    @property
    def measured(self) -> bool:
        work = self.spread("work_s")
        return self.state == DONE and work is not None and work.median > 0

    @property
    def devices(self) -> int:
        return int(number(self.x.get("devices")) or 0)

    @property
    def mesh(self) -> str:
        return str(self.x.get("mesh") or "")

    @property
    def label(self) -> str:
        """What tells it from the others of its experiment and model."""
        match self.kind:
            case "batch":
                return f"b = {self.x.get('batch')}"
            case "optimization":
                return f"{self.role.upper()}, round {self.x.get('round')}"
            case "grid":
                return ", ".join(f"{name}={value}" for name, value in self.x.items() if name not in X_KNOWN)
        return self.mesh or self.name

    @property
    def note(self) -> str:
        """Why there are no figures, or what is wrong with those that there are."""
        if self.state != DONE:
            return f"{self.state}: {self.why}" if self.why else self.state
        said = list(self.problems)
        metrics = self.metrics or {}
        if self.metrics is not None and not self.measured and self.role != "baseline":
            said.append("out.metrics.json has no work_s")
        if metrics.get("unfinished"):
            said.append(f"{metrics['unfinished']:,} requests unfinished")
        if metrics.get("failed"):
            said.append(f"{metrics['failed']:,} samples failed")
        repeats = metrics["repeats"] if isinstance(metrics.get("repeats"), dict) else {}
        if repeats.get("same_tokens") is False:
            said.append("the repeats' tokens differ")
        if (number(repeats.get("count")) or 0) < (number(repeats.get("asked")) or 0):
            said.append(f"{repeats['count']} of {repeats['asked']} repeats")
        return "; ".join(said)

    def value(self, path: str) -> float | None:
        """A number of the metrics by its path, ``ttft_s.p50`` say."""
        return number(_within(self.metrics, path))

    def spread(self, path: str) -> Spread | None:
        """A number of the metrics with the range of its repeats."""
        known = _within(self.metrics, "repeats.figures")
        found = known.get(path) if isinstance(known, Mapping) else None
        if isinstance(found, Mapping) and number(found.get("median")) is not None:
            return Spread(*(number(found.get(name)) for name in ("median", "least", "most")))
        value = self.value(path)
        return None if value is None else Spread(value)

    @property
    def last_run(self) -> Mapping[str, Any]:
        runs = (self.run or {}).get("runs")
        return runs[-1] if isinstance(runs, list) and runs and isinstance(runs[-1], Mapping) else {}


def by_model(cells: Iterable[Cell]) -> dict[str, list[Cell]]:
    return _grouped(cells, "model")


def by_experiment(cells: Iterable[Cell]) -> dict[str, list[Cell]]:
    return _grouped(cells, "experiment")


def _grouped(cells: Iterable[Cell], field: str) -> dict[str, list[Cell]]:
    found: dict[str, list[Cell]] = {}
    for cell in cells:
        found.setdefault(getattr(cell, field), []).append(cell)
    return found


def number(value: Any) -> float | None:
    """A finite number; None of all else."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return value


def mean(values: Iterable[Any]) -> float | None:
    known = [each for each in map(number, values) if each is not None]
    return sum(known) / len(known) if known else None


def most(values: Iterable[Any]) -> float | None:
    return max((each for each in map(number, values) if each is not None), default=None)


def total(values: Iterable[Any]) -> float | None:
    """Of values that are all known."""
    found = list(map(number, values))
    return sum(found) if found and None not in found else None


def _within(data: Any, path: str) -> Any:
    for name in path.split("."):
        data = data.get(name) if isinstance(data, Mapping) else None
    return data


def read_cells(folder: Path) -> tuple[list[Cell], list[str]]:
    """The cells by kind, experiment, model and place in it; and what was left out, in words.

    Raises:
      ResultsError: there is no cell.
    """
    cells, left_out = [], []
    for path in sorted((folder / "cells").glob("*/*/cell.json")):
        try:
            cells.append(_read_cell(path.parent))
        except (OSError, ValueError) as error:
            left_out.append(f"{path.parent.relative_to(folder)}: {error}")
    if not cells and not left_out:
        raise ResultsError(f"{folder / 'cells'}: no cell of a study in it")
    kept: dict[Any, Cell] = {}
    for cell in sorted(cells, key=lambda each: (each.state == DONE, each.ended, each.hash)):
        key = cell.experiment, cell.model, cell.name, cell.role, cell.x.get("round")
        if older := kept.get(key):
            where = older.folder.relative_to(folder)
            left_out.append(f"{where}: the same cell was measured again, with other code or settings ({cell.hash})")
        kept[key] = cell
    return sorted(kept.values(), key=_order), sorted(left_out)


def _order(cell: Cell) -> Any:
    batch, again = (number(cell.x.get(name)) or 0 for name in ("batch", "round"))
    return KINDS.index(cell.kind), cell.experiment, cell.model, cell.devices, batch, again, cell.role, cell.name


def _read_cell(folder: Path) -> Cell:
    about = read_object(folder / "cell.json")
    if about.get("kind") not in KINDS:
        raise ValueError(f"cell.json: kind: found {about.get('kind')!r}, legal: {', '.join(KINDS)}")
    for name in ("experiment", "model", "cell", "hash"):
        if not isinstance(about.get(name), str):
            raise ValueError(f"cell.json: {name}: found {about.get(name)!r}, legal is a text")
    problems: list[str] = []
    state = _read(folder / "state.json", problems, needed=True) or {}
    if state.get("orphan") is True:  # however new: the study file has another in its place, or none
        raise ValueError("an orphan: no longer in the study file")
    done = state.get("state") == DONE
    metrics = _read(folder / "out.metrics.json", problems, needed=done and about.get("role") != "baseline")
    others = [_read(folder / name, problems) for name in ("out.profile.json", "out.run.json", "sacct.json")]
    if done and others[0] is None and not problems and "--profile" in (about.get("command") or []):
        problems.append("nothing was traced (no out.profile.json)")
    x, settings, identity = (
        each if isinstance(each := about.get(name), dict) else {} for name in ("x", "settings", "identity")
    )
    return Cell(
        folder, about["experiment"], about["kind"], about["model"], about["cell"], about["hash"],
        str(about.get("role") or "point"), x, settings, str(identity.get("against") or ""),
        str(state.get("state") or "waiting"),
        " ".join(str(state.get("why") or "").split()), str(state.get("ended") or ""), metrics, *others, tuple(problems),
    )  # fmt: skip


def _read(path: Path, problems: list[str], needed: bool = False) -> dict[str, Any] | None:
    try:
        return read_object(path)
    except FileNotFoundError:
        if needed:
            problems.append(f"{path.name} is missing")
    except OSError as error:
        problems.append(f"{path.name}: {error.strerror}")
    except ValueError as error:
        problems.append(str(error).replace(f"{path}:", f"{path.name}:"))
    return None
