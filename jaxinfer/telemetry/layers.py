"""What each layer of a device takes of a step."""

import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from jaxinfer.telemetry.xplane import Span

LAYER = re.compile(r"layer((_(\d+|x))+)")
TOGETHER = "decode_layers"  # all layers of a stage in one launch


class Layers(NamedTuple):
    """Nanoseconds of one device in one program: `busy` computes and transfers, what is hidden counted once and waiting
    left out, and `gap` is without work ahead of it; both by layer, None for what is in no layer. `together`: some ran
    in one launch, which is in neither."""

    busy: Counter[int | None]
    gap: Counter[int | None]
    together: bool


def layer_of(scope: str, stage: int) -> int | None:
    """A slot of one program holds a layer of each stage: ``layer_03_19`` is layer 19 on the second of two."""
    for name in scope.split("/"):
        if LAYER.fullmatch(name):
            layers = name.split("_")[1:]
            return int(layers[stage]) if stage < len(layers) and layers[stage] != "x" else None
    return None


def layers(spans: Sequence[Span], program: str, stage: int) -> Layers:
    """`spans` are all of a device, in order of time."""
    found = Layers(Counter(), Counter(), any(TOGETHER in each.scope.split("/") for each in spans))
    computing = union((each.start, each.end) for each in spans if each.program == program and not each.communicates)
    starts = [start for start, _ in computing]
    reached, before = float("-inf"), ""
    computed = float("-inf")
    for span in spans:
        if span.program == program and TOGETHER not in span.scope.split("/"):
            layer = layer_of(span.scope, stage)
            if span.communicates:
                begin = span.start + (span.waits or 0.0)
                found.busy[layer] += span.end - begin - _overlap(computing, starts, begin, span.end)
            else:
                found.busy[layer] += max(0.0, span.end - max(span.start, computed))
                computed = max(computed, span.end)
            if before == program and span.start > reached:
                found.gap[layer] += span.start - reached
        if span.end > reached:
            reached, before = span.end, span.program
    return found


def union(intervals: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Disjoint and in order."""
    found: list[tuple[float, float]] = []
    for start, end in sorted(intervals):
        if found and start <= found[-1][1]:
            found[-1] = found[-1][0], max(end, found[-1][1])
        else:
            found.append((start, end))
    return found


def _overlap(covered: list[tuple[float, float]], starts: list[float], start: float, end: float) -> float:
    total = 0.0
    for at in range(max(0, bisect_right(starts, start) - 1), len(covered)):
        if covered[at][0] >= end:
            break
        total += max(0.0, min(end, covered[at][1]) - max(start, covered[at][0]))
    return total
