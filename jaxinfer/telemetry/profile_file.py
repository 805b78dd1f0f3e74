"""``OUT.profile.json``: what the traces of a run say, for tables, figures and ``--stage-layers measured:FILE``."""

from collections.abc import Mapping, Sequence
from statistics import mean, median
from typing import Any

from jaxinfer.telemetry.breakdown import PROGRAMS, TIMES

Devices = Sequence[Mapping[str, Any]]
TOGETHER = "one launch did all layers of a stage (up to 4 rows at once): profile more rows, or --kernels off"


def report(head: Mapping[str, Any], windows: Mapping[str, Devices], empty_ticks: float | None) -> dict[str, Any]:
    """The file as JSON. `head` has what ran (``mesh`` and ``stage_layers`` among it); `windows` the devices of each
    window, see `devices.own_devices`, and `empty_ticks` the share of stage-ticks without work.

    Times are of the steps as they ran; the layers too, where kernels have their names there. All are in ms per decode
    step or prefill tick, means over the devices of a stage:
    - ``bubble``: ``empty_ticks`` counts ticks in which a stage had no microbatch; ``time`` is the share of decode in
      which a device waited for another or had nothing to do.
    - ``imbalance``: 1 - mean / max of the stages' computing.
    - ``layers``: computing, unhidden transfer and the gaps between kernels, of each layer; ``ends`` of a stage is that
      of all else: embedding, head, sampling, what passes between stages.
    - ``uneven_slot_ms``: what a slot that not every stage fills costs beside its layer, as the host decides there.
    """
    devices = next(iter(windows.values()), ())
    stages = {stage: [each for each in devices if each["stage"] == stage] for stage in range(head["mesh"]["stage"])}
    by_stage = [{"stage": stage} | {name: _times(own, name) for name in PROGRAMS} for stage, own in stages.items()]
    layers = {name: _layers(windows, name, head["stage_layers"]) for name in PROGRAMS}
    decode = [each["decode"] for each in by_stage if each["decode"]]
    everything = sum(sum(each[name] for name in TIMES) for each in decode)
    lost = sum(each["waiting"] + each["idle"] for each in decode)
    found = {
        "bubble": {"empty_ticks": empty_ticks, "time": lost / everything if everything else None},
        "imbalance": {name: imbalance([each[name]["compute"] for each in by_stage if each[name]]) for name in PROGRAMS},
        "step_ms": {name: _step(devices, name) for name in PROGRAMS},
        **{what: {name: layers[name][what] for name in PROGRAMS} for what in ("layers", "ends", "uneven_slot_ms")},
        "layers_why": layers["decode"]["why"],
    }
    rows = [{name: each[name] for name in ("rank", "host", "device", "stage", "programs")} for each in devices]
    return {**head, "devices": rows, "stages": by_stage, **found}


def imbalance(compute: Sequence[float]) -> float | None:
    """Of the stages' times: 0 where all are equal."""
    return 1 - mean(compute) / max(compute) if compute and max(compute) else None


def _having(devices: Devices, program: str) -> list[Mapping[str, Any]]:
    return [each["programs"][program] for each in devices if program in each["programs"]]


def _times(devices: Devices, program: str) -> dict[str, float] | None:
    having = _having(devices, program)
    return {name: mean(each[name] for each in having) for name in TIMES} if having else None


def _step(devices: Devices, program: str) -> float | None:
    having = _having(devices, program)
    return mean(sum(each[name] for name in TIMES) for each in having) if having else None


def _layers(windows: Mapping[str, Devices], program: str, stage_layers: Sequence[int]) -> dict[str, Any]:
    """Of the first window that has them."""
    why = "nothing of it was traced"
    for devices in windows.values():
        having = [(each["stage"], each["programs"][program]) for each in devices if program in each["programs"]]
        if any(own["layers"] is None for _, own in having):
            why = TOGETHER
        elif {stage for stage, _ in having} == set(range(len(stage_layers))):
            found = _of_layers(having, stage_layers)
            if None not in found["layers"]:
                return found | {"why": None}
            why = f"no kernel in the trace has the name of layer {found['layers'].index(None)}"
    return {"layers": None, "ends": None, "uneven_slot_ms": None, "why": why}


def _of_layers(having: list[tuple[int, Mapping[str, Any]]], stage_layers: Sequence[int]) -> dict[str, Any]:
    """Ahead of a slot that some stage leaves empty, the host looks whether there is a layer: what this takes longer
    than elsewhere belongs to the cut and not to the layer."""
    slot_of = [slot for count in stage_layers for slot in range(count)]
    full = min(stage_layers)
    times: dict[int, list[tuple[float, float]]] = {}
    for _, own in having:
        for layer, busy, before in own["layers"]:
            times.setdefault(layer, []).append((busy, before))
    gap = median([before for layer in times for _, before in times[layer] if slot_of[layer] < full] or [0.0])
    uneven = [max(0.0, before - gap) for layer in times for _, before in times[layer] if slot_of[layer] >= full]
    return {
        "layers": [
            mean(busy + min(before, gap) for busy, before in times[layer]) if layer in times else None
            for layer in range(sum(stage_layers))
        ],
        "ends": [mean(own["ends"] for at, own in having if at == stage) for stage in range(len(stage_layers))],
        "uneven_slot_ms": mean(uneven) if uneven else None,
    }


def show_balance(found: Mapping[str, Any]) -> None:
    """Lines on standard error that say how well the stages are in balance, of what `report` gives."""
    from rich.console import Console

    console = Console(stderr=True, highlight=False, soft_wrap=True)
    if len(found["stage_layers"]) == 1:
        return
    empty, time = found["bubble"]["empty_ticks"], found["bubble"]["time"]
    console.print(f"stages of {','.join(map(str, found['stage_layers']))} layers:")
    console.print(f"  bubble in ticks  {_percent(empty)} of the run's stage-ticks had no microbatch")
    console.print(f"  bubble in time   {_percent(time)} of decode a device waited or had nothing to do")
    for name, unit in PROGRAMS.items():
        if found["imbalance"][name] is not None:
            what = f"of computing in a {unit}: 1 - mean / max of the stages"
            console.print(f"  imbalance        {_percent(found['imbalance'][name])} {what}")


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{share:.1%}"
