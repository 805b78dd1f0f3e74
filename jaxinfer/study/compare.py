"""What cells say beside each other: speed-ups, efficiencies, the knee, the ratio of two variants.

Each function takes the cells of one experiment and model and returns their rows (figure by name, `columns.COLUMNS`) in
the same order, with notes that stand under the table. A figure that would compare unequal work is left out, and the
row's note says so.
"""

from collections import Counter
from collections.abc import Sequence
from math import exp, log, sqrt
from typing import Any

import attrs
from scipy.special import stdtrit

from jaxinfer.study.columns import values
from jaxinfer.study.results import X_KNOWN, Cell, Spread, number

Rows = tuple[list[dict[str, Any]], list[str]]
CONFIDENCE = 0.95


def strong(cells: Sequence[Cell]) -> Rows:
    """Speed-up T(n0)/T(n) and efficiency of the same requests on more devices."""
    return _scaling(cells, per_device=False)


def weak(cells: Sequence[Cell]) -> Rows:
    """Efficiency T(n0)/T(n) and scaled speed-up of requests in proportion to the devices."""
    return _scaling(cells, per_device=True)


def _scaling(cells: Sequence[Cell], per_device: bool) -> Rows:
    rows = [values(cell) for cell in cells]
    base = baseline(cells)
    if base is None:
        return rows, ["no cell was measured, so there is no n0"]
    start = base.spread("work_s")
    for cell, row in zip(cells, rows):
        if not cell.measured:
            continue
        if said := _unequal(cell, base, per_device):
            _add_note(row, said)
            continue
        ratio = Spread(1.0) if cell is base else start.over(row["work_s"])
        share = cell.devices / base.devices
        if per_device:
            row |= {"weak_efficiency_percent": ratio.times(100), "scaled_speedup": ratio.times(share)}
        else:
            row |= {"speedup": ratio, "efficiency_percent": ratio.times(100 / share)}
    return rows, [_n0(cells, base), *_unequal_prompts(cells, per_device), *_shared_cores(cells)]


def baseline(cells: Sequence[Cell]) -> Cell | None:
    """The fastest of the measured cells with the fewest devices."""
    measured = [cell for cell in cells if cell.measured and cell.devices]
    return min(measured, key=lambda cell: (cell.devices, cell.spread("work_s").median), default=None)


def _n0(cells: Sequence[Cell], base: Cell) -> str:
    smaller = [f"{cell.mesh} {cell.note}" for cell in cells if 0 < cell.devices < base.devices]
    same = [cell for cell in cells if cell.measured and cell.devices == base.devices]
    text = f"n0 = {base.devices} ({base.mesh})"
    text += ", the faster of those with as many devices" * (len(same) > 1)
    return text + (f", the least that was measured: {'; '.join(smaller)}" if smaller else "")


def _work(cell: Cell, name: str, per_device: bool) -> float | None:
    value = cell.value(name)
    return None if value is None else value / (cell.devices if per_device else 1)


def _unequal(cell: Cell, base: Cell, per_device: bool) -> str:
    own, other = (_work(each, "output_tokens", per_device) for each in (cell, base))
    if own == other and own is not None:
        return ""
    unit = "output tokens per device" if per_device else "output tokens"
    return f"refused as a comparison: {_count(own)} {unit}, n0 has {_count(other)}"


def _count(value: float | None) -> str:
    return "an unknown number of" if value is None else f"{value:,.10g}"


def _unequal_prompts(cells: Sequence[Cell], per_device: bool) -> list[str]:
    found = sorted({_work(cell, "prompt_tokens", per_device) for cell in cells if cell.measured} - {None})
    if len(found) < 2:
        return []
    unit = "prompt tokens per device" if per_device else "prompt tokens"
    return [f"{unit} are not equal: {found[0]:,.4g} to {found[-1]:,.4g}"]


def _shared_cores(cells: Sequence[Cell]) -> list[str]:
    """Virtual devices of one host are no hardware of their own."""
    if any(
        cell.measured and cell.metrics.get("device_kind") == "cpu" and _hosts(cell) < cell.devices for cell in cells
    ):
        return ["virtual CPU devices of one host share its cores: these figures show that a mesh works, not its speed"]
    return []


def _hosts(cell: Cell) -> int:
    return int(number(cell.x.get("nodes")) or 1)


def _add_note(row: dict[str, Any], text: str) -> None:
    row["note"] = "; ".join(filter(None, [row["note"], text]))


def batch(cells: Sequence[Cell]) -> Rows:
    """Batch efficiency X(b) / (b/b0 X(b0)) and the knee: the greatest throughput per latency (Kleinrock's power)."""
    rows = [values(cell) for cell in cells]
    measured = [(cell, row) for cell, row in zip(cells, rows) if cell.measured and row["batch"]]
    if not measured:
        return rows, ["no cell was measured"]
    base, start = min(measured, key=lambda each: each[1]["batch"])
    compared = []
    for cell, row in measured:
        each, other = (_per_request(*pair) for pair in ((cell, row), (base, start)))
        if each is None or each != other:
            said = f"{_count(each)} output tokens per request, b = {start['batch']:,} has {_count(other)}"
            _add_note(row, f"refused as a comparison: {said}")
            continue
        compared.append(row)
        rate, grown = row["output_tokens_per_s"], row["batch"] / start["batch"]
        if rate and start["output_tokens_per_s"]:
            ratio = Spread(1.0) if row is start else rate.over(start["output_tokens_per_s"])
            row["batch_efficiency_percent"] = ratio.times(100 / grown)
        if rate and row["latency_s"] and row["latency_s"].median:
            row["power_tokens_per_s2"] = rate.median / row["latency_s"].median
    return rows, [f"b0 = {start['batch']:,}", *_mark_knee(compared)]


def _per_request(cell: Cell, row: dict[str, Any]) -> float | None:
    tokens, requests = cell.value("output_tokens"), row["requests"] or cell.value("requests")
    return tokens / requests if tokens is not None and requests else None


def _mark_knee(rows: list[dict[str, Any]]) -> list[str]:
    known = [row for row in rows if row.get("power_tokens_per_s2") is not None]
    if len(known) < 3:
        return ["no knee: that takes three batches with throughput and latency"]
    best = max(known, key=lambda row: row["power_tokens_per_s2"])
    if best["batch"] == max(row["batch"] for row in known):
        return [f"the knee is not reached: X/L still rises at b = {best['batch']:,}, the greatest measured"]
    if best["batch"] == min(row["batch"] for row in known):
        best["knee"] = "knee"
        return [f"the knee is at b = {best['batch']:,} or below, the least measured"]
    best["knee"] = "knee"
    return [f"the knee is at b = {best['batch']:,}"]


@attrs.frozen
class Ratio:
    """T(A)/T(B) over the rounds: geometric mean and the interval that holds it with 95 %; None with one round."""

    rounds: int
    mean: float
    low: float | None
    high: float | None

    @property
    def verdict(self) -> str:
        if self.low is None:
            return "one round: no interval"
        if self.low > 1:
            return "B is faster"
        return "A is faster" if self.high < 1 else "no difference shown: the interval holds 1"


def ratio(rounds: Sequence[float]) -> Ratio:
    """Of the ratios of the rounds: Student's interval of the mean of their logarithms."""
    logs = [log(each) for each in rounds]
    count, middle = len(logs), sum(logs) / len(logs)
    if count == 1:
        return Ratio(1, exp(middle), None, None)
    error = sqrt(sum((each - middle) ** 2 for each in logs) / (count - 1) / count)
    wide = float(stdtrit(count - 1, (1 + CONFIDENCE) / 2)) * error
    return Ratio(count, exp(middle), exp(middle - wide), exp(middle + wide))


def optimization(cells: Sequence[Cell]) -> tuple[list[dict[str, Any]], list[str], Ratio | None]:
    """The rows of A and B, T(A)/T(B) in each round's row of B, and the ratio over all rounds."""
    rows = [values(cell) for cell in cells]
    firsts = {row["round"]: (cell, row) for cell, row in zip(cells, rows) if row["role"] == "a" and cell.measured}
    found = []
    for cell, row in zip(cells, rows):
        if row["role"] != "b" or not cell.measured or row["round"] not in firsts:
            continue
        other, first_row = firsts[row["round"]]
        if cell.value("output_tokens") is None or cell.value("output_tokens") != other.value("output_tokens"):
            counts = [_count(each.value("output_tokens")) for each in (cell, other)]
            _add_note(row, f"refused as a comparison: {counts[0]} output tokens, A has {counts[1]}")
            continue
        row["ratio"] = first_row["work_s"].over(row["work_s"])
        found.append(row["ratio"].median)
    for row in rows:
        row["role"] = {"a": "A", "b": "B"}.get(row["role"], row["role"])
    if not found:
        return rows, ["no round has both A and B"], None
    return rows, _variants(cells), ratio(found)


def _variants(cells: Sequence[Cell]) -> list[str]:
    """What A and B have set differently."""
    settings = {cell.role: cell.settings for cell in cells}
    one, two = settings.get("a", {}), settings.get("b", {})
    names = sorted(name for name in one.keys() | two.keys() if one.get(name) != two.get(name))
    return [
        f"{variant}: " + ", ".join(f"{name} = {each.get(name, 'default')}" for name in names)
        for variant, each in (("A", one), ("B", two))
        if names
    ]


def grid(cells: Sequence[Cell]) -> tuple[list[dict[str, Any]], list[str], list[str]]:
    """The rows with their settings, notes, and the names of these settings; throughput against the best cell's."""
    rows = [values(cell) for cell in cells]
    names = list(dict.fromkeys(name for cell in cells for name in cell.x if name not in X_KNOWN))
    for cell, row in zip(cells, rows):
        row |= {f"x_{name}": cell.x.get(name) for name in names}
    measured = [(cell, row) for cell, row in zip(cells, rows) if cell.measured and row["output_tokens_per_s"]]
    if not measured:
        return rows, ["no cell was measured"], names
    counts = Counter(cell.value("output_tokens") for cell, _ in measured)
    usual = max(counts, key=lambda tokens: (counts[tokens], number(tokens) or 0))
    for cell, row in measured:
        if cell.value("output_tokens") != usual:
            said = f"{_count(cell.value('output_tokens'))} output tokens, the others have {_count(usual)}"
            _add_note(row, f"refused as a comparison: {said}")
    compared = [row for cell, row in measured if cell.value("output_tokens") == usual]
    best = max(row["output_tokens_per_s"].median for row in compared)
    for row in compared:
        row["of_best_percent"] = row["output_tokens_per_s"].median / best * 100
    return rows, [], names
