"""How the project's figures look: the size of a paper's column or page, told apart by colour and by form.

Colours are Okabe's and Ito's (Color Universal Design, 2008, https://jfly.uni-koeln.de/color/), which readers with any
kind of colour vision tell apart; each series has a marker as well, each filled area a hatch, for print without colours.
Widths are in inches, sizes of type in points. matplotlib comes with the extra ``plot``.
"""

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jaxinfer.checkpoint.files import write_whole

COLUMN, PAGE = 3.4, 7.0  # widths of a column and of a page
BLACK, ORANGE, SKY, GREEN, YELLOW, BLUE, RED, PURPLE = (
    "#000000", "#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7"
)  # fmt: skip
GREY = "#8C8C8C"
LINES = (BLUE, RED, GREEN, PURPLE, ORANGE, SKY, BLACK)  # yellow is too pale for a line on white
MARKERS = "osD^vP*X<>hp"  # as many as do not divide the number of colours evenly
DASHES = ("-", (0, (5, 1.5)), (0, (1, 1)), (0, (4, 1, 1, 1)))
FILLS = (BLUE, SKY, GREEN, YELLOW, ORANGE, RED, PURPLE, BLACK)
HATCHES = ("", "////", "", "....", "\\\\\\\\", "", "xxxx", "")
PHASES = {  # of a run, in the order in which they come
    name: {"facecolor": colour, "hatch": hatch, "edgecolor": "#333333", "linewidth": 0.4}
    for name, colour, hatch in [
        ("start", GREY, ""), ("load", PURPLE, ""), ("preprocess", YELLOW, ""), ("compile", ORANGE, "////"),
        ("prefill", SKY, ""), ("decode", BLUE, ""), ("write", GREEN, "...."), ("other", "#ffffff", ""),
    ]
}  # fmt: skip
KINDS = (".png", ".pdf")
DPI = 300
MOST_COLUMNS, LEAST_LETTERS = 6, 8  # of a legend: columns, letters on a line
STYLE = {
    "font.size": 8, "axes.titlesize": 8, "axes.labelsize": 8, "legend.fontsize": 7, "xtick.labelsize": 7,
    "ytick.labelsize": 7, "axes.titlelocation": "left", "axes.linewidth": 0.6, "axes.spines.top": False,
    "axes.spines.right": False, "axes.grid": True, "axes.axisbelow": True, "grid.color": "#e4e4e4",
    "grid.linewidth": 0.5, "lines.linewidth": 1.2, "lines.markersize": 4, "hatch.linewidth": 0.4,
    "xtick.major.width": 0.6, "ytick.major.width": 0.6, "legend.frameon": False, "errorbar.capsize": 2,
    "pdf.fonttype": 42, "svg.hashsalt": "jaxinfer", "figure.dpi": DPI, "savefig.dpi": DPI,
}  # fmt: skip


class StyleError(RuntimeError):
    """No picture: one line that says why."""


@contextmanager
def paper() -> Iterator[None]:
    """Figures made and saved inside look as this file says.

    Raises:
      StyleError: there is no matplotlib.
    """
    try:
        import matplotlib
    except ImportError:
        raise StyleError("matplotlib is not installed: pip install -e '.[plot]' brings it") from None
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # no settings of the user's: figures of one study look alike everywhere
        matplotlib.rcParams.update(STYLE)
        yield


def canvas(width: float, height: float, rows: int = 1, columns: int = 1, **more: Any) -> tuple[Any, Any]:
    """A figure of so many inches, and its axes; nothing that is drawn lies outside."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure((width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, **more)


def line(place: int) -> dict[str, Any]:
    """Colour, marker and dashes of a series: no two of the first 84 look alike."""
    dashes = DASHES[place // len(LINES) % len(DASHES)]
    return {"color": LINES[place % len(LINES)], "marker": MARKERS[place % len(MARKERS)], "linestyle": dashes}


def fill(place: int) -> dict[str, Any]:
    """Colour and hatch of an area; of the ninth on the colours come again, with the next hatch."""
    hatch = HATCHES[(place + place // len(FILLS)) % len(HATCHES)]
    colour = FILLS[place % len(FILLS)]
    return {"facecolor": colour, "hatch": hatch, "edgecolor": "#ffffff" if colour == BLACK else "#333333"}


def wrapped(text: str, letters: int) -> str:
    """On lines of at most so many letters, broken after '/', ',' or '-' where there is one, with nothing left out."""
    lines = [""]
    for part in re.findall(r"[^/,\-\s]*[/,\-\s]*", text):
        if lines[-1] and len(lines[-1]) + len(part.rstrip()) > letters:
            lines.append("")
        lines[-1] += part
        while len(lines[-1].rstrip()) > letters:
            lines[-1:] = [lines[-1][:letters], lines[-1][letters:]]
    return "\n".join(each.rstrip() for each in lines)


def legend(figure: Any, handles: Sequence[Any], labels: Sequence[str]) -> Any:
    """A legend below all axes, whole: in as many columns as fit, long names on several lines, and the figure as much
    taller as the legend is. After everything else is drawn."""
    width = 0.98 * figure.bbox.width
    for columns in range(min(len(labels), MOST_COLUMNS), 0, -1):
        made = _legend(figure, handles, labels, columns)
        if (found := _size(figure, made).width) <= width:
            break
        made.remove()
    else:
        letters = int(max(map(len, labels)) * width / found)
        while True:
            made = _legend(figure, handles, [wrapped(each, letters) for each in labels], 1)
            if _size(figure, made).width <= width or letters <= LEAST_LETTERS:
                break
            made.remove()
            letters = max(LEAST_LETTERS, int(0.9 * letters))
    wide, high = figure.get_size_inches()
    figure.set_size_inches(wide, high + _size(figure, made).height / figure.dpi)
    return made


def _legend(figure: Any, handles: Sequence[Any], labels: Sequence[str], columns: int) -> Any:
    return figure.legend(handles, labels, loc="outside lower center", ncols=columns, handlelength=1.9,
                         columnspacing=1.0, handletextpad=0.5)  # fmt: skip


def _size(figure: Any, artist: Any) -> Any:
    return artist.get_window_extent(figure.canvas.get_renderer())


def save(figure: Any, path: Path) -> Path:
    """Writes a picture, of the type that its name ends with; the same figure is the same bytes again.

    Raises:
      StyleError: it cannot be written, or not as such a type.
    """
    kind = path.suffix.removeprefix(".").lower() or "png"
    picture = io.BytesIO()
    try:
        figure.savefig(picture, format=kind, metadata=_undated(kind))
        write_whole(path, picture.getvalue())
    except (OSError, ValueError) as error:
        raise StyleError(f"{path}: {getattr(error, 'strerror', None) or error}") from None
    return path


def save_all(figure: Any, stem: Path) -> list[Path]:
    """The picture as PNG to look at and as PDF for the paper, laid out once: they are the same."""
    written = []
    for kind in KINDS:
        written.append(save(figure, stem.with_name(stem.name + kind)))
        figure.set_layout_engine("none")
    return written


def _undated(kind: str) -> dict[str, Any] | None:
    if kind == "pdf":
        return {"CreationDate": None}
    return {"Date": None} if kind == "svg" else None


def points(axes: Any, x: Sequence[float], spreads: Sequence[Any], place: int) -> Any:
    """A series through the medians of `study.results.Spread`s, with bars from the least to the most."""
    bars = [[each.median - (each.median if each.least is None else each.least) for each in spreads],
            [(each.median if each.most is None else each.most) - each.median for each in spreads]]  # fmt: skip
    return axes.errorbar(x, [each.median for each in spreads], bars, elinewidth=0.8, **line(place))


def counts(axis: Any, values: Sequence[float]) -> None:
    """A logarithmic axis of whole numbers that has these as its ticks, or as many of them as can be read."""
    axis.axes.set_xscale("log", base=2)
    kept = [value for value in values if not any(value < 1.3 * other for other in values if other < value)]
    axis.set_ticks(kept, [f"{value:,.0f}" for value in kept])
    axis.set_ticks([], minor=True)


def plain_ticks(axis: Any) -> None:
    """Numbers as people write them on a logarithmic axis."""
    axis.set_major_formatter(lambda value, _: f"{value:,.10g}")
    axis.set_minor_formatter(lambda value, _: "")
