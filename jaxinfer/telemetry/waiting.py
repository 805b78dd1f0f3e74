"""What of a collective is transfer, and what is waiting for a device that comes late.

Every device runs the same program, so the i-th run of one collective is the same exchange on all who take part, and no
clocks are compared. Who comes last waits for nobody: the least duration of an exchange is its transfer, and what the
others took longer is waiting, ahead of their transfer.

Limits: a transfer that one link slows for one device alone counts as that device's waiting. Where neighbours hand on
(``send_stage``), a device may end while those further along still wait, so least is a lower bound of the transfer. A
device whose kernel cannot start, as its host waits for the others' hosts, is idle and not waiting.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from typing import Any

from jaxinfer.telemetry.hlo import OF_AXES
from jaxinfer.telemetry.xplane import Span

MESH = ("stage", "data", "tensor")
Durations = dict[str, list[int]]
Place = tuple[int, int, int]


def axes_of(scope: str) -> tuple[str, ...] | None:
    """The mesh axes over which a collective exchanges: its innermost scope of ours ends with them, as in
    ``all_reduce_stage_tensor`` (parallel/collectives.py). None where there is none."""
    for name in reversed(scope.split("/")):
        if OF_AXES.fullmatch(name):
            return tuple(axis for axis in MESH if axis in name.split("_"))
    return None


def durations(spans: Iterable[Span]) -> Durations:
    """Nanoseconds of each run of each collective, in order of time, by program and instruction."""
    found: defaultdict[str, list[int]] = defaultdict(list)
    for span in spans:
        if span.communicates and span.program:
            found[_key(span)].append(round(span.end - span.start))
    return dict(found)


def with_waiting(
    spans: Sequence[Span], place: Place, sizes: Mapping[str, int], everyone: Mapping[Place, Durations]
) -> list[Span]:
    """The spans of the device at `place` (stage, data, tensor) of a mesh of these sizes, with `waits` where the
    durations of `everyone` tell. Where one device has more runs than another, its trace began earlier."""
    partners: dict[str, list[list[int]] | None] = {}
    left = {name: len(found) for name, found in everyone[place].items()}
    told = []
    for span in spans:
        key = _key(span)
        if key in left:
            if key not in partners:
                partners[key] = _partners(key, axes_of(span.scope), place, sizes, everyone)
            others, back = partners[key], left[key]
            left[key] -= 1
            if others is not None and all(back <= len(each) for each in others):
                length = span.end - span.start
                span = span._replace(waits=max(0.0, length - min(each[-back] for each in others)))
        told.append(span)
    return told


def _partners(
    key: str,
    axes: tuple[str, ...] | None,
    place: Place,
    sizes: Mapping[str, int],
    everyone: Mapping[Place, Durations],
) -> list[list[int]] | None:
    """What each who takes part, this device too, took for each run; None where one of them is not known."""
    if axes is None:
        return None
    ranges = (range(sizes[axis]) if axis in axes else (at,) for axis, at in zip(MESH, place, strict=True))
    found = [everyone.get(each, {}).get(key) for each in product(*ranges)]
    return None if None in found else found


def _key(span: Span) -> str:
    return f"{span.program} {span.op}"


def to_json(everyone: Mapping[Place, Durations]) -> list[Any]:
    return [[list(place), found] for place, found in everyone.items()]


def from_json(parts: Iterable[list[Any]]) -> dict[Place, Durations]:
    """Of what `to_json` gave in each process."""
    return {tuple(place): found for part in parts for place, found in part}
