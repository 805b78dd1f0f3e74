"""Where a device's time went: computing, communicating, between launches, or with nothing to do; and in which part."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jaxinfer.telemetry.xplane import Span

LAUNCH_GAP_NS = 20_000  # a longer gap is no launch: the device had nothing to do
PARTS = ("embed", "decode_layers", "attention", "paged_attention", "mlp", "head", "sample")
SHOWN_DEVICES = 16
PROGRAMS = {"decode": "decode step", "prefill": "prefill tick"}


def breakdown(spans: Sequence[Span], stages: int, counted: Mapping[str, int]) -> dict[str, dict[str, Any]]:
    """The time of one device by program, in ms per decode step or prefill tick; `counted` has how many of them there
    were. Where it has none, what most instructions did counts.

    Times that overlap count once: `communication` is what no computing hides, `hidden` what some does. `launch` are
    gaps of less than 20 us inside a program, `idle` all others; a gap belongs to the program that comes after it, and
    to none beside what is in no program: the device waited for a compiler.
    `parts` has [computing, communicating] of each part of the model, here with every kernel's full time.
    """
    found = {}
    launch, idle = _gaps(spans)
    for program in sorted({span.program for span in spans} & PROGRAMS.keys()):
        own = [span for span in spans if span.program == program]
        ticks = _repeats(own)
        steps = counted.get(program) or max(1.0, ticks / stages if program == "decode" else ticks)
        busy = _covered(own)
        computing = _covered(span for span in own if not span.communicates)
        communicating = _covered(span for span in own if span.communicates)
        parts: dict[str, list[float]] = {}
        for span in own:
            times = parts.setdefault(_part(span.scope), [0.0, 0.0])
            times[span.communicates] += (span.end - span.start) / steps / 1e6
        times = {
            "compute": computing,
            "communication": busy - computing,
            "hidden": communicating - (busy - computing),
            "launch": launch[program],
            "idle": idle[program],
        }
        per_step = {name: time / steps / 1e6 for name, time in times.items()}
        found[program] = per_step | {"steps": steps, "kernels": len(own) / steps, "parts": parts}
    return found


def left_out(spans: Sequence[Span]) -> float:
    """Milliseconds in what is neither a decode step nor a prefill tick."""
    return _covered(span for span in spans if span.program not in PROGRAMS) / 1e6


def _part(scope: str) -> str:
    return next((each for each in reversed(scope.split("/")) if each in PARTS), "other")


def _repeats(spans: Iterable[Span]) -> int:
    """How often the program's body ran: most of its operations did so often."""
    return Counter(Counter(span.op for span in spans).values()).most_common(1)[0][0]


def _covered(spans: Iterable[Span]) -> float:
    """Length of the union of spans that are in order of time."""
    total, reached = 0.0, float("-inf")
    for span in spans:
        total += max(0.0, span.end - max(span.start, reached))
        reached = max(reached, span.end)
    return total


def _gaps(spans: Sequence[Span]) -> tuple[Counter[str], Counter[str]]:
    """Nanoseconds between launches and without work, by the program that comes after."""
    launch: Counter[str] = Counter()
    idle: Counter[str] = Counter()
    last = None
    for span in spans:
        if last is not None and last.program and span.start > last.end:
            inside = span.program == last.program and span.start - last.end < LAUNCH_GAP_NS
            (launch if inside else idle)[span.program] += span.start - last.end
        if last is None or span.end > last.end:
            last = span
    return launch, idle


def show(devices: Sequence[Mapping[str, Any]], title: str) -> None:
    """Tables on standard error of {"rank", "device", "stage", "programs": what `breakdown` gives}, one per device."""
    from rich.console import Console

    console = Console(stderr=True, highlight=False)
    if not any(each["programs"] for each in devices):
        console.print(f"{title}: the trace has no decode step or prefill tick of a device")
    for program, unit in PROGRAMS.items():
        having = [{**each, **each["programs"][program]} for each in devices if program in each["programs"]]
        if having:
            console.print(f"{title}: ms per {unit}, mean of {_mean(each['steps'] for each in having):,.0f}")
            console.print(_times(having))
            console.print(_parts(having))
    rest = _mean(each["left_out"] for each in devices)
    if rest >= 0.01:
        console.print(f"left out: {_ms(rest)} ms of neither, as tuning while compiling; mean of the devices")


def _times(devices: list[dict[str, Any]]) -> Any:
    by_stage = len(devices) > SHOWN_DEVICES
    groups: dict[Any, list[dict[str, Any]]] = {}
    for each in devices:
        place = (each["stage"],) if by_stage else (each["stage"], each["rank"], each["device"])
        groups.setdefault(place, []).append(each)
    times = ["compute", "communication", "launch", "idle"]
    heads = ["stage", "devs"] if by_stage else ["stage", "rank", "dev"]
    table = _table(*heads, "all", "compute", "comm.", "launch", "idle", "hidden", "kern.")
    for place, group in sorted(groups.items()):
        mean = {name: _mean(each[name] for each in group) for name in (*times, "hidden", "kernels")}
        cells = [sum(mean[name] for name in times), *(mean[name] for name in (*times, "hidden"))]
        first = (*place, len(group)) if by_stage else place
        table.add_row(*map(str, first), *map(_ms, cells), f"{mean['kernels']:,.0f}")
    return table


def _parts(devices: list[dict[str, Any]]) -> Any:
    table = _table("part", "compute", "comm.")
    means = {
        name: [_mean(each["parts"].get(name, (0, 0))[kind] for each in devices) for kind in (0, 1)]
        for name in {name for each in devices for name in each["parts"]}
    }
    for name in sorted(means, key=lambda name: -sum(means[name])):
        table.add_row(name, *(_ms(time) if time else "" for time in means[name]))
    return table


def _ms(time: float) -> str:
    return f"{time:,.3f}" if time < 100 else f"{time:,.1f}"


def _table(*columns: str) -> Any:
    from rich import box
    from rich.table import Table

    table = Table(*columns, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in table.columns:
        column.justify = "right"
    return table


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values)
