"""Where the time went: the phases of each process, and the parts of a decode step on each stage."""

from collections.abc import Mapping, Sequence
from typing import Any

from jaxinfer import style
from jaxinfer.study.columns import STEP_TIMES, values
from jaxinfer.study.results import Cell, number

LETTERS, INCHES_PER_BAR, HIGHEST = 22, 0.17, 8.0  # of a label on one line; inches, of all bars at most
MOST_STAGES = 64  # on one figure
KINDS_OF_TIME = {
    name: {"facecolor": colour, "hatch": hatch, "edgecolor": "#333333", "linewidth": 0.4}
    for name, colour, hatch in zip(
        STEP_TIMES, (style.BLUE, style.ORANGE, style.RED, style.PURPLE, "#ffffff"), ("", "////", "....", "", "")
    )
}


def phases(cells: Sequence[Cell]) -> tuple[Any, str]:
    """Stacked seconds of each cell's phases, mean of its processes; None where no cell has any."""
    text = "Phases of the whole process, mean of the processes: warm-up, all repeats and traced steps included."
    several = len({cell.model for cell in cells}) > 1
    rows = []
    for cell in cells:
        found = values(cell)
        known = {name: found.get(f"{name}_s") for name in style.PHASES}
        if any(known.values()):
            rows.append((f"{cell.model}, {cell.label}" if several else cell.label, known))
    if not rows:
        return None, text
    return _bars(rows, style.PHASES, "seconds"), text


def stages(cells: Sequence[Cell]) -> tuple[Any, str]:
    """Milliseconds of a decode step on each stage of each cell of one model; None without profiles."""
    text = "A decode step on each stage: computing, transfers that no computing hides, waiting for another device, " \
        "gaps between launches, idle; mean of the traced steps and of the stage's devices."  # fmt: skip
    rows = []
    firsts = min((cell.x.get("round") or 0 for cell in cells), default=0)
    for cell in cells:
        if (cell.x.get("round") or 0) != firsts:
            continue
        own = _of_stages(cell)
        if rows and len(rows) + len(own) > MOST_STAGES:
            text += f" {cell.label} is left out: too many stages for one figure."
            continue
        rows += own
    if not rows:
        return None, text
    return _bars(rows, KINDS_OF_TIME, "ms per decode step", "stage"), text


def _of_stages(cell: Cell) -> list[tuple[str, Mapping[str, Any]]]:
    found = (cell.profile or {}).get("stages")
    known = []
    for each in found if isinstance(found, list) else []:
        decode = each.get("decode") if isinstance(each, dict) else None
        if isinstance(decode, dict) and number(decode.get("compute")) is not None:
            known.append((f"{each.get('stage')}", decode))
    if not known:
        return []
    return [(f"{cell.label}:  {known[0][0]}", known[0][1]), *known[1:]]


def _bars(rows: Sequence[tuple[str, Mapping[str, Any]]], kinds: Mapping[str, Any], unit: str, name: str = "") -> Any:
    labels = [style.wrapped(label, LETTERS) for label, _ in rows]
    places, at = [], 0.0
    for place, label in enumerate(labels):
        if name and ":" in label and place:
            at += 0.5  # a gap before the next cell
        more = 0.35 * label.count("\n")
        places.append(at + more)
        at += 1 + 2 * more
    figure, axes = style.canvas(style.COLUMN, 0.6 + min(INCHES_PER_BAR * at, HIGHEST))
    handles, longest = {}, 0.0
    for place, (_, times) in zip(places, rows):
        left = 0.0
        for kind, form in kinds.items():
            if (length := number(times.get(kind))) is not None:
                handles[kind] = axes.barh(place, length, 0.78, left, **form)
                left += length
        longest = max(longest, left)
    axes.set(yticks=places, yticklabels=labels, ylim=(at - 0.4, -0.6), xlabel=unit, ylabel=name)
    axes.set_xlim(0, 1.03 * longest or 1)
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)
    kept = [kind for kind in kinds if kind in handles]
    style.legend(figure, [handles[kind] for kind in kept], kept)
    return figure
