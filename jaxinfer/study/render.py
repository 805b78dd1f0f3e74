"""How a table is written: CSV with all digits, Markdown with three and the definitions below."""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import attrs

from jaxinfer.study.columns import COLUMNS, NONE, SPREAD, Column
from jaxinfer.study.results import Spread, number

SHOWN_LETTERS, SHOWN_ROWS = 160, 20  # of a note, of a table besides
RANGES = (
    "A figure with brackets is the median of the repeats, with the least and the most; a ratio's range is what these "
    "allow. Phases are means of the processes. – was not measured."
)
COMPARED = ("speedup", "efficiency_percent", "weak_efficiency_percent", "scaled_speedup", "batch_efficiency_percent",
            "ratio", "of_best_percent")  # fmt: skip
REFUSED = {COLUMNS[name].head for name in COMPARED}


@attrs.frozen
class Table:
    """Rows of figures by the columns' names; `sections` are how Markdown cuts the columns, `notes` stand under it."""

    name: str
    title: str
    columns: Mapping[str, Column]
    rows: Sequence[Mapping[str, Any]]
    sections: Sequence[tuple[str, Sequence[str]]]
    csv_columns: Sequence[str]
    notes: Sequence[str] = ()


def as_csv(table: Table) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    names = []
    for name in table.csv_columns:
        names += [name, f"{name}_least", f"{name}_most"] if _has_range(table, name) else [name]
    writer.writerow([name.removeprefix("x_") for name in names])
    for row in table.rows:
        line: list[Any] = []
        for name in table.csv_columns:
            value = row.get(name)
            if _has_range(table, name):
                line += attrs.astuple(value) if isinstance(value, Spread) else (value, None, None)
            else:
                line.append(value)
        writer.writerow([_exact(each) for each in line])
    return text.getvalue()


def _has_range(table: Table, name: str) -> bool:
    return name in SPREAD and table.columns[name] is COLUMNS[name]


def _exact(value: Any) -> Any:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return format(value, ".12g") if isinstance(value, float) else value


def as_markdown(tables: Sequence[Table], measured_on: Sequence[str]) -> str:
    """A page of an experiment's table, with the others of it behind its figures."""
    main, *others = tables
    parts = [f"# {main.title} ({main.name})\n"]
    for title, names in main.sections:
        parts += [f"## {title}\n"] if title else []
        parts.append(_markdown(main, names, main.rows))
        if not title:
            parts += [bullets(main.notes)] if main.notes else []
            parts += [part for table in others for part in _second(table)]
    parts.append("## Definitions\n")
    parts.append(RANGES + "\n")
    shown = dict.fromkeys(name for _, names in main.sections for name in names)
    parts.append(bullets(_define(main.columns, shown)))
    parts.append("## Measured on\n")
    parts.append(bullets(measured_on))
    return "\n".join(parts)


def _second(table: Table) -> list[str]:
    if not table.rows:
        return [f"{table.title}: none.\n"]
    shown = table.rows[:SHOWN_ROWS]
    rest = len(table.rows) - len(shown)
    parts = [f"## {table.title}\n", _markdown(table, list(table.columns), shown)]
    parts += [f"and {rest:,} more in {table.name}.csv\n"] if rest else []
    return [*parts, bullets(_define(table.columns, table.columns))]


def _define(columns: Mapping[str, Column], names: Iterable[str]) -> list[str]:
    return [f"**{columns[name].head}**: {columns[name].text}" for name in names]


def _markdown(table: Table, names: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> str:
    columns = [table.columns[name] for name in names]
    lines = [[column.head for column in columns], ["---:" if _is_numeric(column) else "---" for column in columns]]
    lines += [[_shown(row.get(name), column, row) for name, column in zip(names, columns)] for row in rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _is_numeric(column: Column) -> bool:
    return column.form is not str


def _shown(value: Any, column: Column, row: Mapping[str, Any]) -> str:
    if column is COLUMNS["note"]:
        return plain(str(value or ""))
    if value is None or value == "":
        return "refused" if column.head in REFUSED and "refused" in str(row.get("note")) else NONE
    if isinstance(value, Spread):
        middle = column.form(value.median)
        if value.least is None or value.most is None:
            return middle
        return f"{middle} ({column.form(value.least)} to {column.form(value.most)})"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return plain(str(value)) if column.form is str or number(value) is None else column.form(value)


def plain(text: str) -> str:
    text = " ".join(text.split())
    text = text if len(text) <= SHOWN_LETTERS else text[: SHOWN_LETTERS - 1] + "…"
    return text.replace("|", "\\|")


def bullets(lines: Iterable[str]) -> str:
    return "".join(f"- {line}\n" for line in lines)
