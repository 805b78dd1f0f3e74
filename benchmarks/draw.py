"""One picture of several benchmarks' JSON files: how near the floor each figure is, beside peers and goals.

    python -m benchmarks.draw build/bench/*.json --output build/bench/bench.png

A bar of 100 % is the floor (benchmarks/floor.py, from what was measured in the same run); where a figure has none, the
goal is 100 %, else the best peer. Figures without anything to compare with are left out. The number beside a bar is the
figure itself.
"""

import argparse
import io
import json
import sys
from pathlib import Path
from typing import Any

import attrs

from benchmarks.report import share
from jaxinfer.checkpoint.files import write_whole
from jaxinfer.options import Parser, file_to_write
from jaxinfer.plot import COLOURS
from jaxinfer.screen import escape_unencodable

OURS = "jaxinfer"
INCHES_PER_BAR = 0.22


class DrawError(ValueError):
    """Nothing that can be drawn: one line that names the file."""


@attrs.frozen
class Group:
    """The bars of one figure: name to (share of the reference, text); `goal` as such a share too."""

    title: str
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
        raise DrawError(f"{paths[0]}: no figure with a floor, a goal or a peer")
    return groups


def _key(row: dict[str, Any]) -> Any:
    return row["name"] if row["of_floor"] is None else round(row["of_floor"], 9)


def _group(data: dict[str, Any], row: dict[str, Any]) -> Group | None:
    unit, peers = row["unit"], row["peers"]
    reference = row["floor"] or row["goal"]
    if reference is None and peers:
        reference = max(peers.values(), key=lambda value: share(unit, value, 1.0))
    if reference is None:
        return None
    values = {OURS: row["value"], **peers}
    bars = {name: (share(unit, value, reference) or 0.0, _text(value, unit)) for name, value in values.items()}
    title = ", ".join(filter(None, [data["model"], data["mesh_text"], f"{data['benchmark']}: {row['name']}"]))
    return Group(title, bars, share(unit, row["goal"], reference))


def _text(value: float, unit: str) -> str:
    return f"{value:,.0f} {unit}" if value >= 1000 else f"{value:.3g} {unit}"


def draw(groups: list[Group], output: Path) -> None:
    """Writes the picture (the type by the name).

    Raises:
      DrawError: it cannot be written, or there is no matplotlib.
    """
    try:
        import matplotlib
    except ImportError:
        raise DrawError("matplotlib is not installed: pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(dict.fromkeys(name for group in groups for name in group.bars))
    colours = {name: COLOURS[place % len(COLOURS)] for place, name in enumerate(names)}
    rows = sum(len(group.bars) + 1 for group in groups)
    style = {"axes.spines.top": False, "axes.spines.right": False, "axes.grid.axis": "x", "axes.grid": True,
             "grid.color": "#ececec", "axes.axisbelow": True, "font.size": 9}  # fmt: skip
    with pyplot.rc_context(style):
        figure, axes = pyplot.subplots(figsize=(11, 1.4 + INCHES_PER_BAR * rows), layout="constrained")
        place, labelled, widest = 0, set(), 100.0
        ticks: list[tuple[float, str]] = []
        for group in groups:
            top = place
            for name, (part, text) in group.bars.items():
                label = None if name in labelled else name
                labelled.add(name)
                bar = axes.barh(place, part * 100, 0.82, color=colours[name], label=label)
                axes.bar_label(bar, [text], padding=4, fontsize=8)
                widest = max(widest, part * 100)
                place += 1
            if group.goal is not None:
                label = None if "goal" in labelled else "goal"
                labelled.add("goal")
                axes.plot([group.goal * 100] * 2, [top - 0.5, place - 0.5], color="black", linewidth=2, label=label)
            ticks.append(((top + place - 1) / 2, group.title))
            place += 1
        axes.axvline(100, color="#999999", linewidth=1, linestyle="--")
        axes.set(yticks=[at for at, _ in ticks], yticklabels=[text for _, text in ticks], ylim=(place - 0.5, -0.8))
        axes.set(xlim=(0, 1.18 * widest), xlabel="% of the floor (what the device was measured to be able to do)")
        axes.tick_params(axis="y", length=0)
        figure.legend(loc="outside upper left", ncols=6, frameon=False)
        try:
            picture = io.BytesIO()
            figure.savefig(picture, format=output.suffix.removeprefix(".") or "png", dpi=130)
            write_whole(output, picture.getvalue())
        except (OSError, ValueError) as error:
            raise DrawError(f"{output}: {getattr(error, 'strerror', None) or error}") from None
        finally:
            pyplot.close(figure)


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
