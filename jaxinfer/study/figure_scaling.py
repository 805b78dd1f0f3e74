"""Strong and weak scaling: how much faster, or how much more work, on how many devices."""

from collections.abc import Sequence
from typing import Any

from jaxinfer import style
from jaxinfer.parallel.axes import LayoutError, parse_mesh
from jaxinfer.study import compare
from jaxinfer.study.results import Cell, Spread, by_model

Point = tuple[int, Spread, Spread]  # devices, speed-up, efficiency in %


def strong(cells: Sequence[Cell]) -> tuple[Any, str]:
    """The figure and its caption; no figure, and why, where nothing can be compared."""
    lines, starts = _series(cells, compare.strong, "speedup", "efficiency_percent")
    caption = "Strong scaling: speed-up T(n0) / T(n) of the same requests, and efficiency, speed-up × n0 / n."
    return _draw(lines, starts, "speed-up"), caption


def weak(cells: Sequence[Cell]) -> tuple[Any, str]:
    lines, starts = _series(cells, compare.weak, "scaled_speedup", "weak_efficiency_percent")
    caption = "Weak scaling, requests in proportion to the devices: scaled speed-up n / n0 × T(n0) / T(n), and " \
        "efficiency T(n0) / T(n)."  # fmt: skip
    return _draw(lines, starts, "scaled speed-up"), caption


def _series(cells: Sequence[Cell], rows: Any, first: str, second: str) -> tuple[dict[str, list[Point]], set[int]]:
    """Points of each model and kind of mesh, and the n0 that there are."""
    lines: dict[str, list[Point]] = {}
    starts = set()
    models = by_model(cells)
    for model, own in models.items():
        found, _ = rows(own)
        points: dict[str, list[Point]] = {}
        for cell, row in zip(own, found):
            if isinstance(row.get(first), Spread):
                points.setdefault(_axes(cell.mesh), []).append((cell.devices, row[first], row[second]))
        if not points:
            continue
        starts.add(compare.baseline(own).devices)
        points = _joined(points)
        for axes, each in points.items():
            parts = [model] * (len(models) > 1) + [axes] * (len(points) > 1)
            lines[", ".join(parts) or model] = each
    return lines, starts


def _joined(points: dict[str, list[Point]]) -> dict[str, list[Point]]:
    """A single mesh whose axes other meshes cut further, and so the one device, is where their series begin."""

    def cut_further(axes: str) -> list[str]:
        return [other for other in points if other != axes and set(axes.split()) <= set(other.split())]

    single = {axes for axes, each in points.items() if len(each) == 1 and cut_further(axes)}
    found = {}
    for axes, each in points.items():
        if axes not in single:
            begin = [points[other][0] for other in single if axes in cut_further(other)]
            found[axes] = sorted([*begin, *each], key=lambda point: point[0])
    return found


def _axes(mesh: str) -> str:
    """The axes that cut the model, ``stage × tensor`` say."""
    try:
        return " × ".join(axis for axis, size in parse_mesh(mesh).items() if size > 1)
    except LayoutError:
        return mesh


def _draw(lines: dict[str, list[Point]], starts: set[int], name: str) -> Any:
    counts = sorted({point[0] for each in lines.values() for point in each})
    if len(counts) < 2:
        return None
    figure, (upper, lower) = style.canvas(
        style.COLUMN, 3.4, 2, 1, sharex=True, gridspec_kw={"height_ratios": [1.7, 1]}
    )  # fmt: skip
    for start in sorted(starts):
        ends = [count for count in counts if count >= start]
        ideal = upper.plot(ends, [count / start for count in ends], color=style.GREY, linestyle="--", label="ideal")
    lower.axhline(100, color=style.GREY, linestyle="--", linewidth=1.2)
    handles = {}
    for place, (label, points) in enumerate(lines.items()):
        handles[label] = style.points(upper, [each[0] for each in points], [each[1] for each in points], place)
        style.points(lower, [each[0] for each in points], [each[2] for each in points], place)
    handles["ideal"] = ideal[0]
    upper.set_yscale("log", base=2)
    style.plain_ticks(upper.yaxis)
    upper.set(ylabel=name)
    style.counts(lower.xaxis, counts)
    highest = max(point[2].most or point[2].median for each in lines.values() for point in each)
    lower.set(xlabel="devices", ylabel="efficiency in %", ylim=(0, 1.1 * max(highest, 100)))
    style.legend(figure, list(handles.values()), list(handles))
    return figure
