"""Reads what the devices did out of a profiler's trace file (an XSpace protobuf)."""

import re
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from jaxinfer.telemetry.hlo import EXCHANGE, Instruction, Program, kernel_name, programs

# steps that hold other steps, and copies between host and device
NO_WORK = re.compile(r"while|conditional|call$|.*MemcpyH2D|.*MemcpyD2H")


class Span(NamedTuple):
    """One kernel (or step of the CPU's program) on a device, in nanoseconds; `scope` is where the source made it.
    `waits`: of a communicating one, how long it waited for others before anything moved; None: nobody knows."""

    start: float
    end: float
    program: str  # decode, prefill, or whatever JAX called it; "" for what is in none, as tuning while compiling
    op: str
    scope: str
    communicates: bool
    waits: float | None = None


class Trace(NamedTuple):
    """What each device of a process did, in order of time; by JAX's id of a CPU device, by the number of a GPU.
    `steps` has how many of each kind the host enqueued meanwhile, see `ranges.step`."""

    devices: dict[int, list[Span]]
    steps: dict[str, int]


def read(path: Path) -> Trace:
    from jax.profiler import ProfileData

    described = programs(memoryview(path.read_bytes()))
    events: dict[tuple[int, str, str], list[_Event]] = {}
    steps: Counter[str] = Counter()
    for plane in ProfileData.from_file(str(path)).planes:
        gpu = re.fullmatch(r"/device:GPU:(\d+)", plane.name)
        if gpu is None and not plane.name.startswith("/host:CPU"):
            continue
        for line in plane.lines:
            if gpu and not line.name.startswith("Stream"):  # other lines repeat what the streams have
                continue
            for event in line.events:
                stats = dict(event.stats)
                if gpu or ("hlo_op" in stats and "device_ordinal" in stats):
                    device = int(gpu[1]) if gpu else int(stats["device_ordinal"])
                    program = str(stats.get("hlo_module", "")), str(stats.get("program_id", ""))
                    events.setdefault((device, *program), []).append(_event(event, stats))
                elif "step_num" in stats:
                    steps[event.name] += int(stats.get("steps", 0))
    devices: dict[int, list[Span]] = {}
    for (device, module, program_id), own in events.items():
        own.sort()
        program = _best(described, module, program_id, {name for each in own for name in (each.kernel, each.op)})
        found = program.attribute((each.kernel, each.op) for each in own)
        spans = [_span(module, event, *each) for event, each in zip(own, found, strict=True)]
        devices.setdefault(device, []).extend(span for span in spans if span is not None)
    return Trace({device: sorted(devices[device]) for device in sorted(devices)}, +steps)


class _Event(NamedTuple):
    start: float
    end: float
    kernel: str
    op: str
    scope: str


def _event(event: Any, stats: dict[str, Any]) -> _Event:
    op = re.split("::|/", str(stats.get("hlo_op", "")))[-1]
    scope = str(stats.get("name", stats.get("tf_op", "")))
    return _Event(event.start_ns, event.start_ns + event.duration_ns, event.name, op, scope)


def _best(described: dict[str, Program], module: str, program_id: str, names: set[str]) -> Program:
    """The description of a program. Out of the compile cache it has the number of the run that compiled it, so what
    counts are the instructions; there may be one per shape."""
    same = {name: program for name, program in described.items() if name.startswith(f"{module}(")}
    if not same:
        return Program({}, [])
    names = set(map(kernel_name, names))
    return same[max(same, key=lambda name: (len(names & same[name].kernels), name == f"{module}({program_id})"))]


def _span(module: str, event: _Event, op: str, instruction: Instruction) -> Span | None:
    opcode = instruction.opcode
    if NO_WORK.match(opcode) or NO_WORK.match(event.kernel):
        return None
    communicates = instruction.exchanges or bool(EXCHANGE.search(event.kernel))
    program = module.removeprefix("jit_").partition("(")[0] if module.startswith("jit_") else ""
    return Span(event.start, event.end, program, op, instruction.scope or event.scope, communicates)
