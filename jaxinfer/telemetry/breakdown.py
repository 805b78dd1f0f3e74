"""Where a device's time went: computing, transfers, waiting, launches, with nothing to do; and in which part."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jaxinfer.telemetry.layers import layers, union
from jaxinfer.telemetry.xplane import Span

LAUNCH_GAP_NS = 20_000  # a longer gap is no launch: the device had nothing to do
PARTS = ("embed", "decode_layers", "attention", "paged_attention", "mlp", "head", "sample")
SHOWN_DEVICES = 16
TIMES = ("compute", "transfer", "waiting", "launch", "idle")  # they add up to a step
PROGRAMS = {"decode": "decode step", "prefill": "prefill tick"}


def breakdown(spans: Sequence[Span], stages: int, counted: Mapping[str, int], stage: int = 0) -> dict[str, Any]:
    """The time of one device by program, in ms per decode step or prefill tick; `counted` has how many of them there
    were. Where it has none, what most instructions did counts.

    Times that overlap count once: `transfer` and `waiting` (for a device that comes later, see waiting.py) are what no
    computing hides, together `unhidden`; `hidden` is communication beside computing. `unmatched` is that of `transfer`
    of which nobody knows how much was waiting. `launch` are gaps of less than 20 us inside a program, `idle` all
    others; a gap belongs to the program that comes after it, and to none beside what is in no program: the device
    waited for a compiler.
    `parts` has `compute` and `communication` of each part of the model, here with every kernel's full time. `layers` is
    a list of layer, what it took (see layers.py), and the gaps ahead of its kernels; `ends` is what all but the layers
    took. Both are None where layers ran in one launch. The device is of `stage`.
    """
    found = {}
    launch, idle = _gaps(spans)
    for program in sorted({span.program for span in spans} & PROGRAMS.keys()):
        own = [span for span in spans if span.program == program]
        ticks = _repeats(own)
        steps = counted.get(program) or max(1.0, ticks / stages if program == "decode" else ticks)
        computing = [(span.start, span.end) for span in own if not span.communicates]
        communicating = [span for span in own if span.communicates]
        moving = [(span.start + (span.waits or 0.0), span.end) for span in communicating]
        compute = length(computing)
        moved, all_busy = length(computing + moving), length([(span.start, span.end) for span in own])
        times = {
            "compute": compute,
            "transfer": moved - compute,
            "waiting": all_busy - moved,
            "launch": launch[program],
            "idle": idle[program],
            "hidden": length([(span.start, span.end) for span in communicating]) - (all_busy - compute),
            "unhidden": all_busy - compute,
            "unmatched": sum(span.end - span.start for span in communicating if span.waits is None),
        }
        per_step = {name: time / steps / 1e6 for name, time in times.items()}
        parts: dict[str, dict[str, float]] = {}
        for span in own:
            part = parts.setdefault(_part(span.scope), {"compute": 0.0, "communication": 0.0})
            part["communication" if span.communicates else "compute"] += (span.end - span.start) / steps / 1e6
        more = {"steps": steps, "kernels": len(own) / steps, "parts": parts}
        found[program] = per_step | more | _layers(spans, program, stage, steps)
    return found


def _layers(spans: Sequence[Span], program: str, stage: int, steps: float) -> dict[str, Any]:
    busy, gap, together = layers(spans, program, stage)
    if together:
        return {"layers": None, "ends": None}
    numbers = sorted(layer for layer in busy if layer is not None)
    times = {layer: (busy[layer] / steps / 1e6, gap[layer] / steps / 1e6) for layer in numbers}
    return {"layers": [[layer, *both] for layer, both in times.items()], "ends": busy[None] / steps / 1e6}


def left_out(spans: Sequence[Span]) -> float:
    """Milliseconds in what is neither a decode step nor a prefill tick."""
    return length((span.start, span.end) for span in spans if span.program not in PROGRAMS) / 1e6


def length(intervals: Iterable[tuple[float, float]]) -> float:
    """Of their union."""
    return sum(end - start for start, end in union(intervals))


def _part(scope: str) -> str:
    return next((each for each in reversed(scope.split("/")) if each in PARTS), "other")


def _repeats(spans: Iterable[Span]) -> int:
    """How often the program's body ran: most of its operations did so often."""
    return Counter(Counter(span.op for span in spans).values()).most_common(1)[0][0]


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
    heads = ["stage", "devs"] if by_stage else ["stage", "rank", "dev"]
    table = _table(*heads, "all", "comp.", "transf", "wait", "launch", "idle", "hidden", "kern.")
    for place, group in sorted(groups.items()):
        mean = {name: _mean(each[name] for each in group) for name in (*TIMES, "hidden", "kernels")}
        cells = [sum(mean[name] for name in TIMES), *(mean[name] for name in (*TIMES, "hidden"))]
        first = (*place, len(group)) if by_stage else place
        table.add_row(*map(str, first), *map(_ms, cells), f"{mean['kernels']:,.0f}")
    return table


def _parts(devices: list[dict[str, Any]]) -> Any:
    table = _table("part", "compute", "comm.")
    names = {name for each in devices for name in each["parts"]}
    kinds = "compute", "communication"
    means = {
        name: [_mean(each["parts"].get(name, {}).get(kind, 0) for each in devices) for kind in kinds] for name in names
    }
    for name in sorted(means, key=lambda name: -sum(means[name])):
        table.add_row(name, *(_ms(time) if time else "" for time in means[name]))
    return table


def _ms(time: float) -> str:
    return f"{time:,.3f}" if time < 100 else f"{time:,.1f}"


def _table(*columns: str) -> Any:
    from rich import box
    from rich.table import Table

    table = Table(*columns, box=box.SIMPLE_HEAD, padding=0)
    for column in table.columns:
        column.justify = "right"
    return table


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values)
