"""The doctor's answer: a table of ranks, then one line per finding, the worst last."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from jaxinfer.checkpoint.files import write_json
from jaxinfer.doctor.finding import ERROR, OK, WARNING, Finding, Report

GIB = 1 << 30
WIDTH = 140  # where the output is a file
STYLES = {OK: "green", WARNING: "yellow", ERROR: "bold red"}


@attrs.frozen
class Line:
    """A finding and the ranks that it holds for; no ranks: for the whole run."""

    finding: Finding
    ranks: tuple[int, ...] = ()


def merge(reports: Sequence[Report], common: Sequence[Finding]) -> list[Line]:
    """Equal findings become one line; of those that are ok, one line per name. The worst come last."""
    groups: dict[Any, list[tuple[int, Finding]]] = {}
    for report in reports:
        names: Counter[str] = Counter()
        for finding in report.findings:
            names[finding.name] += 1  # a rank may have several lines of one name
            key = (finding.name, names[finding.name], finding.fix) if finding.level == OK else finding
            groups.setdefault(key, []).append((report.rank, finding))
    lines = []
    for group in groups.values():
        texts, first = {finding.text for _, finding in group}, group[0][1]
        if len(texts) > 1:
            first = attrs.evolve(first, text=f"{first.text} (rank {group[0][0]}; others alike, --json has them)")
        lines.append(Line(first, tuple(rank for rank, _ in group)))
    lines += [Line(finding) for finding in common]
    order = (OK, WARNING, ERROR)
    return sorted(lines, key=lambda line: order.index(line.finding.level))


def print_answer(reports: Sequence[Report], lines: Sequence[Line], count: int) -> None:
    """`count`: of ranks that there should be."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=WIDTH)
    console.print(_table(reports))
    hosts = {report.rank: report.host for report in reports}
    for line in lines:
        finding = line.finding
        where = _where(line.ranks, hosts, count)
        text = f"[{STYLES[finding.level]}]{finding.level:7}[/] {escape(finding.name)}{where}: {escape(finding.text)}"
        console.print(text, soft_wrap=True)
        if finding.fix:
            console.print(f"          -> {escape(finding.fix)}", soft_wrap=True)
    errors, warnings = (sum(line.finding.level == level for line in lines) for level in (ERROR, WARNING))
    style = STYLES[ERROR if errors else WARNING if warnings else OK]
    console.print(
        f"[{style}]{_counted(errors, 'error')}, {_counted(warnings, 'warning')}[/] on {_counted(count, 'rank')}"
    )


def _counted(number: int, what: str) -> str:
    return f"{number or 'no'} {what}{'s'[: number != 1]}"


def _where(ranks: tuple[int, ...], hosts: Mapping[int, str], count: int) -> str:
    if not ranks or len(ranks) == count:
        return ""
    shown = ", ".join(f"rank {rank} on {hosts[rank]}" for rank in ranks[:4])
    return f" ({shown}{f' and {len(ranks) - 4} more' if len(ranks) > 4 else ''})"


def _table(reports: Sequence[Report]) -> Table:
    table = Table(title="jaxinfer.doctor", title_justify="left")
    names = (
        "rank",
        "host",
        "GPUs",
        "free GiB",
        "driver",
        "CUDA",
        "cores",
        "memory GiB",
        "jax",
        "clock ms",
        "read GB/s",
    )
    for name in names:
        table.add_column(name, justify="left" if name in ("host", "GPUs") else "right")
    for report in reports:
        facts = report.facts
        gpus, rate = facts.get("gpus", []), facts.get("read_bytes_per_s")
        kinds = sorted({gpu["name"].removeprefix("NVIDIA ") for gpu in gpus})
        free = [f"{gpu['free'] / GIB:.0f}" for gpu in gpus if gpu["free"] is not None]
        table.add_row(
            str(report.rank),
            report.host,
            f"{len(gpus)} {' + '.join(kinds)}" if gpus else "none",
            " ".join(free),
            gpus[0]["driver"] if gpus else "",
            facts.get("driver_cuda") or "",
            str(facts.get("cores", "")),
            f"{facts['memory_bytes'] / GIB:.0f}" if "memory_bytes" in facts else "",
            facts.get("versions", {}).get("jax", "none"),
            f"{facts.get('clock_s', 0.0) * 1000:+.1f}",
            f"{rate / 1e9:.2f}" if rate else "",
        )
    return table


def write_answer(path: Path, reports: Sequence[Report], lines: Sequence[Line], probes: Sequence[Any]) -> None:
    levels = [line.finding.level for line in lines]
    answer = {
        "errors": levels.count(ERROR),
        "warnings": levels.count(WARNING),
        "findings": [{**attrs.asdict(line.finding), "ranks": line.ranks} for line in lines],
        "ranks": [report.to_json() for report in reports],
        "collective": probes,
    }
    write_json(path, answer)
