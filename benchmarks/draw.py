"""One picture of several benchmarks' JSON files: how near the floor each figure is, beside peers and goals.

    python -m benchmarks.draw build/bench/*.json --output build/bench/bench.png

A bar of 100 % is the floor (benchmarks/floor.py, from what was measured in the same run); where a figure has none, the
goal is 100 %, else the best peer. On a CPU no floor is drawn: a small model stays in the processor's cache, and is
faster than the memory that the floor is made of. Figures without anything to compare with are left out. The number
beside a bar is the figure itself.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import attrs

from benchmarks.report import share
from jaxinfer import style
from jaxinfer.options import Parser, file_to_write
from jaxinfer.screen import escape_unencodable

OURS = "jaxinfer"
INCHES_PER_BAR = 0.15
TITLE_LETTERS = 36  # of a figure's name, on one line
BEHIND_TEXT = {"facecolor": "white", "edgecolor": "none", "pad": 0.4}  # lines do not cross it
FLOOR, GOAL, PEER = "the floor", "the goal", "the best peer"


class DrawError(ValueError):
    """Nothing that can be drawn: one line that names the file."""


@attrs.frozen
class Group:
    """The bars of one figure: name to (share of the reference, text); `goal` as such a share too; `of` names the
    reference."""

    title: str
    of: str
    bars: dict[str, tuple[float, str]]
    goal: float | None


def read(paths: list[Path]) -> list[Group]:
    """Raises DrawError for a file that is not a benchmark's, or when no figure can be compared with anything."""
    groups = []
    for path in paths:
        try:
            data = json.loads(path.read_bytes())
            # a row that is as near its floor as one before is the same figure in another unit
            rows = {_key(row): row for row in reversed(data["rows"])}
            groups += [group for row in reversed(rows.values()) if (group := _group(data, row)) is not None]
        except OSError as error:
            raise DrawError(f"{path}: {error.strerror}") from None
        except (ValueError, KeyError, TypeError):
            raise DrawError(f"{path}: not the JSON of a benchmark") from None
    if not groups:
        raise DrawError(f"{paths[0]}: no figure with a floor (none is drawn on a CPU), a goal or a peer (--peer)")
    return groups


def _key(row: dict[str, Any]) -> Any:
    return row["name"] if row["of_floor"] is None else round(row["of_floor"], 9)


def _group(data: dict[str, Any], row: dict[str, Any]) -> Group | None:
    unit, peers = row["unit"], row["peers"]
    on_cpu = str(data.get("devices", {}).get("kind")).lower() == "cpu"
    of, reference = (FLOOR, row["floor"]) if row["floor"] and not on_cpu else (GOAL, row["goal"])
    if reference is None and peers:
        of, reference = PEER, max(peers.values(), key=lambda value: share(unit, value, 1.0))
    if reference is None:
        return None
    values = {OURS: row["value"], **peers}
    bars = {name: (share(unit, value, reference) or 0.0, _text(value, unit)) for name, value in values.items()}
    title = ", ".join(filter(None, [data["model"], data["mesh_text"], f"{data['benchmark']}: {row['name']}"]))
    return Group(title, of, bars, share(unit, row["goal"], reference))


def _text(value: float, unit: str) -> str:
    return f"{value:,.0f} {unit}" if value >= 1000 else f"{value:.3g} {unit}"


def draw(groups: list[Group], output: Path) -> None:
    """Writes the picture (the type by the name).

    Raises:
      DrawError: it cannot be written, or there is no matplotlib.
    """
    try:
        with style.paper():
            style.save(_figure(groups), output)
    except style.StyleError as error:
        raise DrawError(str(error)) from None


def _figure(groups: list[Group]) -> Any:
    names = list(dict.fromkeys(name for group in groups for name in group.bars))
    heights = [max(len(group.bars), _title(group, groups).count("\n") + 1) for group in groups]
    figure, axes = style.canvas(style.PAGE, 0.8 + INCHES_PER_BAR * sum(each + 1 for each in heights))
    place, widest, handles = 0.0, 100.0, {}
    ticks: list[tuple[float, str]] = []
    for group, height in zip(groups, heights):
        top = place
        place += (height - len(group.bars)) / 2
        for name, (part, text) in group.bars.items():
            bar = axes.barh(place, part * 100, 0.82, linewidth=0.4, **style.fill(names.index(name)))
            handles.setdefault(name, bar)
            axes.bar_label(bar, [text], padding=4, fontsize=7, bbox=BEHIND_TEXT)
            widest = max(widest, part * 100)
            place += 1
        if group.goal is not None and group.of != GOAL:
            ends = [top - 0.5, top + height - 0.5]
            handles["goal"] = axes.plot([group.goal * 100] * 2, ends, color=style.RED, linewidth=1.6)[0]
        ticks.append((top + (height - 1) / 2, _title(group, groups)))
        place = top + height + 1
    axes.axvline(100, color=style.GREY, linewidth=0.8, linestyle="--")
    axes.set(yticks=[at for at, _ in ticks], yticklabels=[text for _, text in ticks], ylim=(place - 1.3, -0.8))
    axes.set(xlim=(0, 1.2 * widest), xlabel=_axis(groups))
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)
    style.legend(figure, list(handles.values()), list(handles))
    return figure


def _title(group: Group, groups: list[Group]) -> str:
    """Says what 100 % is where that is not the same for all."""
    mixed = len({each.of for each in groups}) > 1
    return style.wrapped(f"{group.title} (of {group.of})" if mixed else group.title, TITLE_LETTERS)


def _axis(groups: list[Group]) -> str:
    if len(found := {group.of for group in groups}) > 1:
        return "% of what stands in brackets"
    (of,) = found
    return f"% of {of}" + " (what the device was measured to be able to do)" * (of == FLOOR)


def main() -> None:
    escape_unencodable()
    made = Parser(
        prog="python -m benchmarks.draw",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("files", nargs="+", type=Path, metavar="FILE.json")
    made.add_argument("--output", type=file_to_write, required=True, metavar="FIG.png", help="or .pdf, .svg")
    args = made.parse_args()
    try:
        draw(read(args.files), args.output)
    except DrawError as error:
        print(f"python -m benchmarks.draw: error: {error}", file=sys.stderr)
        sys.exit(2)
    print(args.output)


if __name__ == "__main__":
    main()
