"""``python -m jaxinfer.plot``: what a run's results and metrics look like, as one picture."""

import json
import sys
from os.path import commonpath
from pathlib import Path
from typing import Any

import attrs
import numpy as np

from jaxinfer import style
from jaxinfer.options import Parser, file_to_write
from jaxinfer.screen import escape_unencodable

PROGRAM = "jaxinfer.plot"
NAME_LETTERS = 24  # of a run, on one line beside its bar
PANEL, INCHES_PER_LINE = 2.2, 0.13  # heights of a panel at least, and of a line of text beside the bars
MOST_MARKERS = 8  # on a line


class PlotError(RuntimeError):
    """Nothing that can be drawn: one line that names the file."""


@attrs.frozen
class Run:
    """Seconds and counts of each result; `metrics` is None where the run has not ended."""

    name: str
    ttft: np.ndarray
    latency: np.ndarray
    tokens: np.ndarray
    errors: int
    metrics: dict[str, Any] | None


def read_run(path: Path, name: str) -> Run:
    """Raises PlotError for a file that cannot be read or has no result in it."""
    rows, errors, number = [], 0, 0
    try:
        with open(path, "rb") as file:
            for line in file:
                number += 1
                if not line.endswith(b"\n"):
                    break  # a run is writing it
                data = json.loads(line)
                if "error" in data:
                    errors += 1
                else:
                    rows.append([float(data[name]) for name in ("ttft_s", "latency_s", "completion_tokens")])
    except OSError as error:
        raise PlotError(f"{path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        raise PlotError(f"{path}, line {number}: not a result of jaxinfer.generate") from None
    if not rows:
        raise PlotError(f"{path}: no result in it")
    try:
        metrics = json.loads((path.parent / f"{path.name.removesuffix('.jsonl')}.metrics.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        metrics = {}
    ttft, latency, tokens = np.array(rows, np.float64).T
    # a run that was killed leaves the number of unfinished requests alone
    return Run(name, ttft, latency, tokens, errors, metrics if "wall_s" in metrics else None)


def phases(metrics: dict[str, Any]) -> dict[str, float]:
    """Seconds of each phase, mean of the processes. In outputs of versions that did not measure them, those that the
    engine counted: there loading comes before the wall time."""
    if processes := metrics.get("phases"):
        return {name: float(np.mean([each.get(name, 0.0) for each in processes])) for name in style.PHASES}
    engine = metrics["engine"]
    seconds = {name: float(engine[f"{name}_seconds"]) for name in ("load", "compile", "prefill", "decode")}
    inside = sum(seconds.values()) - seconds["load"]
    return seconds | {"other": max(0.0, metrics["wall_s"] - inside)}


def draw(paths: list[Path], output: Path) -> None:
    """Writes a picture (the type by the name) of one or several outputs.

    Raises:
      PlotError: an output without results, a picture that cannot be written, no matplotlib.
    """
    runs = [read_run(path, name) for path, name in zip(paths, _names(paths))]
    try:
        with style.paper():
            style.save(_figure(runs), output)
    except style.StyleError as error:
        raise PlotError(str(error)) from None


def _figure(runs: list[Run]) -> Any:
    lines = max(style.wrapped(run.name, NAME_LETTERS).count("\n") for run in runs) + 2
    heights = [PANEL, max(PANEL, INCHES_PER_LINE * lines * len(runs))]
    size, ratios = (style.PAGE, 0.8 + sum(heights)), {"height_ratios": heights}
    figure, ((first, whole), (length, time)) = style.canvas(*size, 2, 2, gridspec_kw=ratios)
    _shares(first, runs, "ttft", "Time to first token, from the request's arrival", "seconds")
    _shares(whole, runs, "latency", "Latency of a request", "seconds")
    if len(runs) > 1:
        _shares(length, runs, "tokens", "Output tokens of a result", "tokens")
    else:
        _tokens(length, runs[0])
    _times(time, runs)
    figure.suptitle(_title(runs), x=0.012, ha="left", fontsize=9, fontweight="bold")
    handles, labels = first.get_legend_handles_labels() if len(runs) > 1 else ([], [])
    bars, names = time.get_legend_handles_labels()
    if handles or bars:
        style.legend(figure, [*handles, *bars], [*labels, *names])
    return figure


def _names(paths: list[Path]) -> list[str]:
    """What tells the outputs apart: their names, else their folders without what is the same in all."""
    stems = [path.name.removesuffix(".jsonl") for path in paths]
    if len(set(stems)) == len(stems):
        return stems
    if len(set(stems)) == 1 and len({path.parent for path in paths}) == len(paths):
        folders = [path.parent.absolute() for path in paths]
        common = commonpath(folders)
        return [each.name if each == Path(common) else str(each.relative_to(common)) for each in folders]
    return [str(path.parent / stem) for path, stem in zip(paths, stems)]


def _title(runs: list[Run]) -> str:
    count, tokens = sum(len(run.tokens) for run in runs), sum(run.tokens.sum() for run in runs)
    parts = [f"{count:,} results", f"{tokens:,.0f} output tokens"]
    if rates := [run.metrics["output_tokens_per_s"] for run in runs if run.metrics and run.metrics["work_s"]]:
        low, high = f"{min(rates):,.0f}", f"{max(rates):,.0f}"
        parts.append(f"{low} tokens/s" if low == high else f"{low} to {high} tokens/s")
    if errors := sum(run.errors for run in runs):
        parts.append(f"{errors:,} bad lines")
    return f"{runs[0].name}: " * (len(runs) == 1) + ", ".join(parts)


def _shares(axes: Any, runs: list[Run], field: str, title: str, unit: str) -> None:
    """For each x the share of results that took no longer."""
    for place, run in enumerate(runs):
        values = np.sort(getattr(run, field))
        shares = np.arange(1, len(values) + 1) / len(values) * 100
        form = style.line(place)
        if len(runs) == 1:
            form["marker"] = ""
            for share in (50, 90, 99):
                value = np.percentile(values, share)
                axes.plot(value, share, "o", color=form["color"])
                axes.annotate(f"p{share} {_seconds(value)}", (value, share), (-6, 1), textcoords="offset points",
                              ha="right", va="bottom", fontsize=7)  # fmt: skip
        # markers at other places on each line: lines that lie on each other show both
        between = max(1.0, len(values) / MOST_MARKERS)
        at = (between * (place / len(runs) + np.arange(MOST_MARKERS))).astype(int)
        axes.step(np.r_[values[0], values], np.r_[0, shares], where="post", label=run.name,
                  markevery=np.unique(at[at <= len(values)]).tolist(), **form)  # fmt: skip
    axes.set(title=title, xlabel=unit, ylabel="% of results", ylim=(0, 104), xlim=(0, None), yticks=range(0, 101, 25))


def _tokens(axes: Any, run: Run) -> None:
    top = run.tokens.max()
    axes.hist(run.tokens, np.linspace(0, top + 1, int(min(top + 1, 30)) + 1), color=style.line(0)["color"])
    axes.set(title="Output tokens of a result", xlabel="tokens", ylabel="results", xlim=(0, None))
    axes.yaxis.get_major_locator().set_params(integer=True)


def _times(axes: Any, runs: list[Run]) -> None:
    measured = [run for run in runs if run.metrics]
    axes.set_title("Where the time went, in the last attempt")
    if not measured:
        axes.set_axis_off()
        axes.text(0.5, 0.5, "the run has not ended: no figures yet", ha="center", transform=axes.transAxes)
        return
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("seconds")
    parts = [phases(run.metrics) for run in measured]
    names = [name for name in style.PHASES if any(name in each for each in parts)]
    if len(parts) == 1:
        seconds = [parts[0][name] for name in names]
        for row, name in enumerate(names):
            axes.barh(row, parts[0][name], 0.62, **style.PHASES[name])
            axes.annotate(_seconds(parts[0][name]), (parts[0][name], row), (3, 0), textcoords="offset points",
                          va="center", fontsize=7)  # fmt: skip
        axes.set(yticks=range(len(names)), yticklabels=names, xlim=(0, 1.2 * max(seconds)))
    else:
        left = np.zeros(len(parts))
        for name in names:
            seconds = np.array([each.get(name, 0.0) for each in parts])
            axes.barh(range(len(parts)), seconds, 0.62, left, label=name, **style.PHASES[name])
            left += seconds
        axes.set(yticks=range(len(parts)), yticklabels=[style.wrapped(run.name, NAME_LETTERS) for run in measured])
    axes.tick_params(axis="y", length=0)
    axes.invert_yaxis()


def _seconds(value: float) -> str:
    return f"{value * 1e3:.0f} ms" if value < 1 else f"{value:.1f} s" if value < 100 else f"{value:,.0f} s"


def main() -> int:
    escape_unencodable()
    parser = Parser(
        prog=PROGRAM,
        description="Draws the latencies, lengths and times of one run, or of several to compare.",
        epilog="example: python -m jaxinfer.plot runs/first/out.jsonl --output first.png",
    )
    parser.add_argument("outputs", nargs="+", type=Path, metavar="OUT.jsonl", help="with OUT.metrics.json beside it")
    parser.add_argument("--output", type=file_to_write, required=True, metavar="FIG.png", help="or .pdf, .svg")
    args = parser.parse_args()
    try:
        draw(args.outputs, args.output)
    except PlotError as error:
        print(f"{PROGRAM}: error: {error}", file=sys.stderr)
        return 2
    print(args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
