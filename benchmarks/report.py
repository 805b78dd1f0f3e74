"""What a benchmark found: a table on the screen and a JSON file, each figure beside its floor, goal and peers."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs

from jaxinfer.checkpoint.files import write_json

GOALS = Path(__file__).with_name("goals.json")
HIGHER = ("tokens/s", "requests/s", "TFLOP/s", "GB/s")  # units of which more is better; of all others less is


@attrs.frozen
class Row:
    """One figure. `floor` is the best that could be (the ceiling, where more is better); `peers` are other programs'
    figures for the same work; both in the figure's own unit."""

    name: str
    unit: str
    value: float
    floor: float | None = None
    goal: float | None = None
    peers: Mapping[str, float] = attrs.field(factory=dict)

    @property
    def of_floor(self) -> float | None:
        """How near the floor the figure is: 1 is there."""
        return share(self.unit, self.value, self.floor)


def share(unit: str, value: float | None, floor: float | None) -> float | None:
    if not value or not floor:
        return None
    return value / floor if unit in HIGHER else floor / value


def with_goals(rows: list[Row], benchmark: str, model: str, mesh: str, device_kind: str) -> list[Row]:
    """Adds what goals.json has for this work on this kind of device."""
    known = {
        each["row"]: each
        for each in json.loads(GOALS.read_text())
        if (each["benchmark"], each["model"], each["mesh"]) == (benchmark, model, mesh)
        and each["device"] in device_kind
    }
    return [_with_goal(row, known[row.name]) if row.name in known else row for row in rows]


def _with_goal(row: Row, known: Mapping[str, Any]) -> Row:
    goal = known["goal"] if "goal" in known else known["goal_of_floor"] * row.floor
    return attrs.evolve(row, goal=goal, peers=known["peers"] | dict(row.peers))


def show(title: str, rows: list[Row], notes: Mapping[str, str]) -> None:
    from rich.console import Console
    from rich.table import Table

    names = list(dict.fromkeys(name for row in rows for name in row.peers))
    goals = any(row.goal is not None for row in rows)
    columns = ["measured", "floor", "of the floor", *(["goal"] if goals else []), *names]
    table = Table("", *columns)
    for row in rows:
        cells = [_number(row.value), _number(row.floor), "" if row.of_floor is None else f"{row.of_floor:.0%}"]
        cells += [_number(row.goal)] if goals else []
        table.add_row(
            f"{row.name} [{row.unit}]".replace("[", "\\["), *cells, *(_number(row.peers.get(n)) for n in names)
        )
    # a terminal's width would cut the names short in a job's log
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
    console.print(title, soft_wrap=True, markup=False)
    console.print(table)
    for name, text in notes.items():
        console.print(f"{name}: {text}", soft_wrap=True, markup=False)


def write(path: Path, report: Mapping[str, Any], rows: list[Row]) -> None:
    """Writes the report as JSON, aside and renamed; `rows` become its field of that name."""
    data = {**report, "rows": [attrs.asdict(row) | {"of_floor": row.of_floor} for row in rows]}
    write_json(path, data)


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
