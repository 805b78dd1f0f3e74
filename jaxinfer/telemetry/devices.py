"""What a trace says of the devices of this process, as far as it takes the other processes' traces too."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from jaxinfer.telemetry.breakdown import breakdown, left_out
from jaxinfer.telemetry.waiting import Place, durations, from_json, to_json, with_waiting
from jaxinfer.telemetry.xplane import Trace, read


def own_devices(folder: Path, mesh: Any, rank: int, everyone: Callable[[Any], list[Any]]) -> list[dict[str, Any]]:
    """For each device of this process on `mesh` (stages, data shards, tensor): {"rank", "device", "stage", "programs":
    what `breakdown` gives, "left_out"}, of the newest trace in `folder`. `everyone` tells each process's value to all,
    here some ten bytes per run of a collective: call this in all of them."""
    trace = _newest(folder)
    own = {place: (device, trace.devices[number]) for place, device, number in _local(mesh) if number in trace.devices}
    told = from_json(everyone(to_json({place: durations(spans) for place, (_, spans) in own.items()})))
    sizes = dict(zip(mesh.axis_names, mesh.devices.shape, strict=True))
    found = []
    for place, (device, spans) in own.items():
        spans = with_waiting(spans, place, sizes, told)
        where = {"rank": rank, "device": device.local_hardware_id, "stage": place[0]}
        programs = breakdown(spans, sizes["stage"], trace.steps, place[0])
        found.append(where | {"programs": programs, "left_out": left_out(spans)})
    return found


def _newest(folder: Path) -> Trace:
    files = sorted(folder.rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)
    return read(files[-1]) if files else Trace({}, {})


def _local(mesh: Any) -> list[tuple[Place, Any, int]]:
    """Place, device, and the number that traces give it: of CPU devices over all processes, of GPUs on the node."""
    import jax

    return [
        (place, device, device.id if device.platform == "cpu" else device.local_hardware_id)
        for place, device in np.ndenumerate(mesh.devices)
        if device.process_index == jax.process_index()
    ]
