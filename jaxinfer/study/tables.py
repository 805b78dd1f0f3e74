"""A study's tables, as CSV and Markdown, from its cells alone: `write_tables`."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxinfer.checkpoint.files import write_whole
from jaxinfer.study import agreement, compare
from jaxinfer.study.columns import COLUMNS, CSV_ALONE, DEVICES, NONE, STEP, TIME, Column
from jaxinfer.study.render import Table, as_csv, as_markdown, bullets, plain
from jaxinfer.study.results import Cell, by_experiment, by_model, read_cells

PLACE = ["model", "devices", "nodes", "mesh"]
RESULTS = {
    "correctness": ["requests", "exact", "agreement_percent", "near_ties", "errors", "missing", "near_tie_nats",
                    "drift_nats", "work_s", "output_tokens_per_s"],
    "strong": ["work_s", "speedup", "efficiency_percent", "output_tokens_per_s", "ttft_s", "tpot_s"],
    "weak": ["requests", "work_s", "weak_efficiency_percent", "scaled_speedup", "output_tokens_per_s", "ttft_s",
             "tpot_s"],
    "batch": ["batch", "output_tokens_per_s", "batch_efficiency_percent", "latency_s", "ttft_s", "tpot_s",
              "device_memory_bytes", "power_tokens_per_s2", "knee", "work_s"],
    "optimization": ["round", "role", "work_s", "ratio", "output_tokens_per_s", "ttft_s", "tpot_s"],
    "grid": ["work_s", "output_tokens_per_s", "of_best_percent", "ttft_s", "tpot_s"],
}  # fmt: skip
KEYS = {"batch": ["batch"], "optimization": ["round", "role"]}  # what tells rows of one mesh apart
TITLES = {
    "correctness": "Correctness",
    "strong": "Strong scaling",
    "weak": "Weak scaling",
    "batch": "Batch size",
    "optimization": "Optimization: A against B",
    "grid": "Grid",
}
SECTIONS = (("Time of the whole process", TIME), ("Devices, memory and energy", DEVICES), ("Decode steps", STEP))
RATIO = {
    "model": COLUMNS["model"],
    "rounds": Column("rounds", "pairs of A and B", str),
    "ratio": Column("T(A) / T(B)", "geometric mean of the rounds"),
    "low": Column("least", "lower end of the 95 % interval: Student's, of the mean of the rounds' logarithms"),
    "high": Column("most", "upper end of it"),
    "verdict": Column("says", "which is faster, where the interval leaves out 1", str),
}
DIVERGENCE = {
    "model": COLUMNS["model"],
    "mesh": COLUMNS["mesh"],
    "id": Column("id", "the request", str),
    "index": Column("sample", "of the request", str),
    "position": Column("position", "of the first token that differs, from 0", str),
    "expected": Column("baseline", "its token there; – where its text had ended", str),
    "found": Column("found", "the cell's token; – where its text had ended", str),
    "margin_nats": Column("margin in nats", "how much likelier the baseline holds its own token than the cell's"),
    "at_least": Column("at least", "yes: the cell's token is not among those written down, the margin is greater", str),
    "kind": Column("kind", "near tie, or error", str),
}


def write_tables(folder: Path | str) -> list[Path]:
    """Writes tables/EXPERIMENT.csv and .md of a study's folder, and tables/README.md; returns their paths.

    Raises:
      ResultsError: there is no cell; OSError: a file that cannot be written.
    """
    folder = Path(folder)
    cells, left_out = read_cells(folder)
    written, listed = [], []
    for name, own in by_experiment(cells).items():
        tables = make_tables(name, own)
        for table in tables:
            written.append(_write(folder / "tables" / f"{table.name}.csv", as_csv(table)))
        written.append(_write(folder / "tables" / f"{name}.md", as_markdown(tables, measured_on(own))))
        listed.append((name, tables))
    written.append(_write(folder / "tables" / "README.md", _readme(listed, cells, left_out)))
    return written


def make_tables(name: str, cells: Sequence[Cell]) -> list[Table]:
    """The table of one experiment over all its models, and behind it what it has besides."""
    kind, models = cells[0].kind, by_model(cells)
    rows: list[Mapping[str, Any]] = []
    notes: list[str] = []
    more: list[Mapping[str, Any]] = []
    axes: list[str] = []
    for model, own in models.items():
        match kind:
            case "correctness":
                found, said, divergences = agreement.correctness(own)
                more += divergences
            case "optimization":
                found, said, ratio = compare.optimization(own)
                if ratio is not None:
                    more.append({"model": model, "rounds": ratio.rounds, "ratio": ratio.mean, "low": ratio.low,
                                 "high": ratio.high, "verdict": ratio.verdict})  # fmt: skip
            case "grid":
                found, said, axes = compare.grid(own)
            case _:
                found, said = {"strong": compare.strong, "weak": compare.weak, "batch": compare.batch}[kind](own)
        rows += found
        notes += [f"{model}: {each}" if len(models) > 1 else each for each in said]
    columns = COLUMNS | {f"x_{each}": Column(each, "a setting of the engine", str) for each in axes}
    tables = [_main(name, kind, columns, rows, [f"x_{each}" for each in axes], notes, len(models) > 1)]
    if kind == "correctness":
        tables.append(_extra(f"{name}-divergences", "Divergences", DIVERGENCE, more))
    if kind == "optimization":
        tables.append(_extra(f"{name}-ratio", "A against B over all rounds", RATIO, more))
    return tables


def _main(
    name: str,
    kind: str,
    columns: Mapping[str, Column],
    rows: Sequence[Mapping[str, Any]],
    axes: Sequence[str],
    notes: Sequence[str],
    several: bool,
) -> Table:
    place = PLACE if several else PLACE[1:]
    keys = ["model"] * several + ["mesh", *KEYS.get(kind, []), *axes]
    first = [*place, *axes, *RESULTS[kind]]
    sections = [("", [*first, "note"])]
    sections += [(title, [*keys, *(each for each in names if each not in keys)]) for title, names in SECTIONS]
    every = [*PLACE, *axes, *RESULTS[kind], *TIME, *DEVICES, *STEP, *CSV_ALONE, "state", "note"]
    return Table(name, TITLES[kind], columns, rows, sections, list(dict.fromkeys(every)), notes)


def _extra(name: str, title: str, columns: Mapping[str, Column], rows: Sequence[Mapping[str, Any]]) -> Table:
    return Table(name, title, columns, rows, [("", list(columns))], list(columns))


def _write(path: Path, text: str) -> Path:
    write_whole(path, text.encode(errors="backslashreplace"))
    return path


def measured_on(cells: Iterable[Cell]) -> list[str]:
    """Devices, versions and commits of the cells' runs; several where they differ."""
    questions: dict[str, Callable[[Mapping[str, Any]], Any]] = {
        "device": lambda run: _get(run, "devices", "kind"),
        "GPUs": lambda run: ", ".join(dict.fromkeys(map(str, run.get("gpus") or []))),
        "driver": lambda run: run.get("driver"),
        "CUDA": lambda run: run.get("cuda"),
        "NCCL": lambda run: run.get("nccl"),
        "jaxinfer": lambda run: _get(run, "versions", "jaxinfer"),
        "JAX": lambda run: _get(run, "versions", "jax"),
        "commit": lambda run: run.get("commit"),
    }
    runs = [cell.last_run for cell in cells if cell.last_run]
    found = {
        name: list(dict.fromkeys(str(value) for run in runs if (value := ask(run)))) for name, ask in questions.items()
    }
    days = sorted({str(run.get("started"))[:10] for run in runs if run.get("started")})
    lines = [f"{name}: {', '.join(values)}" for name, values in found.items() if values]
    lines += [f"{name} differs between the cells" for name in ("device", "commit") if len(found[name]) > 1]
    return (
        [*lines, f"days: {days[0]} to {days[-1]}" if len(days) > 1 else f"day: {days[0]}"] if days else lines or [NONE]
    )


def _get(data: Any, *path: str) -> Any:
    for name in path:
        data = data.get(name) if isinstance(data, Mapping) else None
    return data


def _readme(listed: Sequence[tuple[str, Sequence[Table]]], cells: Sequence[Cell], left_out: Sequence[str]) -> str:
    parts = ["# Tables of this study\n"]
    parts.append("Made from `cells/` alone by `python -m jaxinfer.study tables`, which writes them again.\n")
    for name, tables in listed:
        files = ", ".join(f"[{table.name}.csv]({table.name}.csv)" for table in tables)
        own = [cell for cell in cells if cell.experiment == name]
        done = sum(cell.state == "done" for cell in own)
        parts.append(f"- {tables[0].title}: [{name}.md]({name}.md), {files}; {done} of {len(own)} cells done")
    parts.append("")
    if missing := [f"{cell.experiment}, {cell.model}, {cell.name}: {cell.note}" for cell in cells if cell.note]:
        parts += ["## What is to be known of cells\n", bullets(map(plain, missing))]
    if left_out:
        parts += ["## Left out\n", bullets(map(plain, left_out))]
    parts.append("## Columns of the CSV files\n")
    parts.append(
        "An empty cell was not measured. Figures have the unit of their name (`_s` seconds, `_bytes`, `_j` joules, "
        "`_w` watts), `_least` and `_most` are those of the repeats, or what they allow of a ratio.\n"
    )
    for _, tables in listed:
        for table in tables:
            parts += [f"### {table.name}.csv\n", bullets(
                f"`{each.removeprefix('x_')}`: {table.columns[each].text}" for each in table.csv_columns
            )]  # fmt: skip
    return "\n".join(parts)
