"""``python -m jaxinfer.plot``: what a run's results and metrics look like, as one picture."""

import io
import json
import sys
from pathlib import Path
from typing import Any

import attrs
import numpy as np

from jaxinfer.checkpoint.files import write_whole
from jaxinfer.options import Parser, file_to_write
from jaxinfer.screen import escape_unencodable

PROGRAM = "jaxinfer.plot"
PHASES = {"load": "#7d5ba6", "compile": "#e3a857", "prefill": "#5b8db8", "decode": "#2f5d50", "other": "#d0d0d0"}
COLOURS = ("#2f5d50", "#c8553d", "#5b8db8", "#e3a857", "#7d5ba6", "#6b705c", "#d88c9a", "#3d405b")
MOST_LABELS = 8


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
    """Seconds of each phase; loading comes before the wall time that the metrics count."""
    engine = metrics["engine"]
    seconds = {name: float(engine[f"{name}_seconds"]) for name in PHASES if name != "other"}
    inside = sum(seconds.values()) - seconds["load"]
    return seconds | {"other": max(0.0, metrics["wall_s"] - inside)}


def draw(paths: list[Path], output: Path) -> None:
    """Writes a picture (the type by the name) of one or several outputs.

    Raises:
      PlotError: an output without results, a picture that cannot be written, no matplotlib.
    """
    try:
        import matplotlib
    except ImportError:
        raise PlotError("matplotlib is not installed: pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    runs = [read_run(path, name) for path, name in zip(paths, _names(paths))]
    style = {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": "#ececec",
             "axes.axisbelow": True, "font.size": 10, "axes.titlesize": 11, "axes.titlelocation": "left"}  # fmt: skip
    with pyplot.rc_context(style):
        figure, ((first, whole), (length, time)) = pyplot.subplots(2, 2, figsize=(11, 7.2), layout="constrained")
        _shares(first, runs, "ttft", "Time to first token, from the arrival of a request")
        _shares(whole, runs, "latency", "Latency of a request")
        _tokens(length, runs)
        _times(time, runs)
        figure.suptitle(_title(runs), x=0.012, ha="left", fontsize=13, fontweight="bold")
        figure.get_layout_engine().set(w_pad=0.12, h_pad=0.1, wspace=0.04, hspace=0.04)
        if len(runs) > 1:
            handles, labels = first.get_legend_handles_labels()
            length.legend(handles[:MOST_LABELS], labels[:MOST_LABELS], loc="upper center", ncols=4, frameon=False,
                          bbox_to_anchor=(0.5, -0.16))  # fmt: skip
        try:
            picture = io.BytesIO()
            figure.savefig(picture, format=output.suffix.removeprefix(".") or "png", dpi=130)
            write_whole(output, picture.getvalue())
        except (OSError, ValueError) as error:
            raise PlotError(f"{output}: {getattr(error, 'strerror', None) or error}") from None
        finally:
            pyplot.close(figure)


def _names(paths: list[Path]) -> list[str]:
    stems = [path.name.removesuffix(".jsonl") for path in paths]
    return stems if len(set(stems)) == len(stems) else [str(path.parent / stem) for path, stem in zip(paths, stems)]


def _title(runs: list[Run]) -> str:
    count, tokens = sum(len(run.tokens) for run in runs), sum(run.tokens.sum() for run in runs)
    parts = [f"{count:,} results", f"{tokens:,.0f} output tokens"]
    if rates := [run.metrics["output_tokens_per_s"] for run in runs if run.metrics]:
        low, high = f"{min(rates):,.0f}", f"{max(rates):,.0f}"
        parts.append(f"{low} tokens/s" if low == high else f"{low} to {high} tokens/s")
    if errors := sum(run.errors for run in runs):
        parts.append(f"{errors:,} bad lines")
    return f"{runs[0].name}: " * (len(runs) == 1) + ", ".join(parts)


def _shares(axes: Any, runs: list[Run], field: str, title: str) -> None:
    """For each x the share of results that took no longer."""
    for place, run in enumerate(runs):
        values = np.sort(getattr(run, field))
        shares = np.arange(1, len(values) + 1) / len(values) * 100
        colour = COLOURS[place % len(COLOURS)]
        axes.step(np.r_[values[0], values], np.r_[0, shares], where="post", color=colour, label=run.name, linewidth=1.8)
        if len(runs) == 1:
            for share in (50, 90, 99):
                value = np.percentile(values, share)
                axes.plot(value, share, "o", color=colour, markersize=5)
                axes.annotate(f"p{share} {_seconds(value)}", (value, share), (-8, 2), textcoords="offset points",
                              ha="right", va="bottom", fontsize=9)  # fmt: skip
    axes.set(
        title=title, xlabel="seconds", ylabel="% of results", ylim=(0, 104), xlim=(0, None), yticks=range(0, 101, 25)
    )


def _tokens(axes: Any, runs: list[Run]) -> None:
    top = max(run.tokens.max() for run in runs)
    bins = np.linspace(0, top + 1, int(min(top + 1, 30)) + 1)
    for place, run in enumerate(runs):
        form = {"histtype": "stepfilled", "alpha": 0.85} if len(runs) == 1 else {"histtype": "step", "linewidth": 1.8}
        axes.hist(run.tokens, bins, color=COLOURS[place % len(COLOURS)], **form)
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
    if len(parts) == 1:
        seconds = list(parts[0].values())
        bars = axes.barh(range(len(PHASES)), seconds, 0.62, color=list(PHASES.values()))
        axes.bar_label(bars, [_seconds(each) for each in seconds], padding=4)
        axes.set(yticks=range(len(PHASES)), yticklabels=list(PHASES), xlim=(0, 1.15 * max(seconds)))
    else:
        left = np.zeros(len(parts))
        for name, colour in PHASES.items():
            seconds = np.array([each[name] for each in parts])
            axes.barh(range(len(parts)), seconds, 0.62, left, color=colour, label=name)
            left += seconds
        axes.set(yticks=range(len(parts)), yticklabels=[run.name for run in measured])
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=5, frameon=False, handlelength=1)
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
