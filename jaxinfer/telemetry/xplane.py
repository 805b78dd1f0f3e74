"""Reads what the devices did out of a profiler's trace file (an XSpace protobuf)."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

COLLECTIVE = re.compile(r"all-(reduce|gather|to-all)|reduce-scatter|collective-|ragged-all|^send|^recv")
# kernels that communicate, by name: NCCL's, copies to another device, and our own
EXCHANGE = re.compile(r"nccl|MemcpyP2P|all_?reduce|all_?gather|peer_", re.I)
# steps that hold other steps, and copies between host and device
NO_WORK = re.compile(r"while|conditional|call$|.*MemcpyH2D|.*MemcpyD2H")


class Span(NamedTuple):
    """One kernel (or step of the CPU's program) on a device, in nanoseconds; `scope` is where the source made it."""

    start: float
    end: float
    program: str  # decode, prefill, or whatever JAX called it; "" when nothing says
    op: str
    scope: str
    communicates: bool


class _Instruction(NamedTuple):
    opcode: str
    scope: str


_Programs = dict[str, dict[str, _Instruction]]  # "jit_decode(4)" -> instruction's name -> what it is


def read(path: Path) -> dict[int, list[Span]]:
    """What each device of a process did, in order of time; by JAX's id of a CPU device, by the number of a GPU."""
    from jax.profiler import ProfileData

    described = _programs(memoryview(path.read_bytes()))
    events: list[tuple[int, _Event]] = []
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
                    events.append((device, _event(event, stats)))
    ops: dict[tuple[str, str], set[str]] = {}
    for _, event in events:
        ops.setdefault((event.module, event.program_id), set()).add(event.op)
    programs = {key: _best(described, *key, names) for key, names in ops.items()}
    devices: dict[int, list[Span]] = {}
    for device, event in events:
        span = _span(event, programs[event.module, event.program_id].get(event.op))
        if span is not None:
            devices.setdefault(device, []).append(span)
    return {device: sorted(devices[device]) for device in sorted(devices)}


class _Event(NamedTuple):
    start: float
    end: float
    name: str
    module: str
    program_id: str
    op: str
    scope: str


def _event(event: Any, stats: dict[str, Any]) -> _Event:
    op = re.split("::|/", str(stats.get("hlo_op", "")))[-1] or event.name
    scope = str(stats.get("name", stats.get("tf_op", "")))
    program = str(stats.get("hlo_module", "")), str(stats.get("program_id", ""))
    return _Event(event.start_ns, event.start_ns + event.duration_ns, event.name, *program, op, scope)


def _best(described: _Programs, module: str, program_id: str, ops: set[str]) -> dict[str, _Instruction]:
    """The description of a program. Out of the compile cache it has the number of the run that compiled it, so what
    counts are the instructions; there may be one per shape."""
    same = {name: program for name, program in described.items() if name.startswith(f"{module}(")}
    if not same:
        return {}
    return same[max(same, key=lambda name: (len(ops & same[name].keys()), name == f"{module}({program_id})"))]


def _span(event: _Event, instruction: _Instruction | None) -> Span | None:
    opcode = instruction.opcode if instruction else event.op
    if NO_WORK.match(opcode) or NO_WORK.match(event.name):
        return None
    scope = (instruction.scope if instruction else "") or event.scope
    communicates = bool(COLLECTIVE.search(opcode) or EXCHANGE.search(event.name))
    program = event.module.removeprefix("jit_").partition("(")[0]
    return Span(event.start, event.end, program, event.op, scope, communicates)


def _programs(space: memoryview) -> _Programs:
    """The programs that the trace describes; JAX's reader leaves this part of the file out. Numbers are those of the
    fields in xplane.proto and hlo.proto."""
    found = {}
    for plane in _all(space, 1):
        if _text(plane, 2) != "/host:metadata":
            continue
        for entry in _all(plane, 4):
            for metadata in _all(entry, 2):
                modules = [module for stat in _all(metadata, 5) for hlo in _all(stat, 6) for module in _all(hlo, 1)]
                found[_text(metadata, 2)] = {
                    _text(each, 1): _Instruction(_text(each, 2), "".join(_text(meta, 2) for meta in _all(each, 7)))
                    for module in modules
                    for computation in _all(module, 3)
                    for each in _all(computation, 2)
                }
    return found


def _text(message: memoryview, number: int) -> str:
    return "".join(bytes(each).decode() for each in _all(message, number))


def _all(message: memoryview, number: int) -> Iterator[memoryview]:
    """The fields `number` of a protobuf message that are themselves bytes."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        kind = key & 7
        if kind == 2:
            size, at = _varint(message, at)
            if key >> 3 == number:
                yield message[at : at + size]
            at += size
        elif kind == 0:
            _, at = _varint(message, at)
        else:
            at += 8 if kind == 1 else 4


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
