"""The programs that a trace describes, and which of their instructions a kernel is."""

import re
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from functools import cached_property
from itertools import takewhile
from typing import NamedTuple

COLLECTIVE = re.compile(r"all-(reduce|gather|to-all)|reduce-scatter|collective-|ragged-all|^send|^recv")
# the scopes of parallel/collectives.py, kind and mesh axes, around what exchanges there: XLA fuses some into kernels of
# its own, and some are ours
OF_AXES = re.compile(r"(all_reduce|all_gather|all_to_all|send)(_(stage|data|tensor))+")
_PRIMITIVE = re.compile(r"psum|ppermute|all_gather|all_to_all|ffi_call")
# kernels that communicate, by name: NCCL's, copies to another device, and our own
EXCHANGE = re.compile(r"nccl|MemcpyP2P|all_?reduce|all_?gather|peer_", re.I)
_NO_KERNEL = re.compile(
    r"(parameter|constant|tuple|get-tuple-element|bitcast|while|conditional|call|partition-id|.*-done)$"
)


class Instruction(NamedTuple):
    """`kernel` is the name of its kernel but for a number at the end, "" if a library or the driver names that."""

    opcode: str
    scope: str
    kernel: str

    @property
    def exchanges(self) -> bool:
        *_, inside, last = ["", *self.scope.split("/")]
        ours = OF_AXES.fullmatch(inside) and _PRIMITIVE.match(last)
        return bool(COLLECTIVE.search(self.opcode) or ours)


class Program:
    """Instructions by name, and `order`, in which those that launch something do so."""

    def __init__(self, instructions: dict[str, Instruction], order: list[str]):
        self.instructions, self.order = instructions, order

    @cached_property
    def kernels(self) -> set[str]:
        return set(map(kernel_name, self.instructions))

    def attribute(self, events: Iterable[tuple[str, str]]) -> Iterator[tuple[str, Instruction]]:
        """The instruction, with its name, of each (kernel, instruction or "") of a device in order of time.

        A CUDA graph says nothing of instructions. Equal ones share a kernel, named after any of them; so the next
        with such a name counts, round and round. What a library launches belongs to a call of it right there, or else
        to the instruction before.
        """
        at: dict[str, list[int]] = {}
        for place, name in enumerate(self.order):
            instruction = self.instructions[name]
            at.setdefault(instruction.kernel, []).append(place)
        place_of = {name: place for place, name in enumerate(self.order)}
        after = 0  # the place after the last kernel with a name
        for kernel, op in events:
            places = at.get(_without_number(kernel))
            if op in self.instructions:
                after = place_of.get(op, after - 1) + 1
                yield op, self.instructions[op]
            elif places:
                found = bisect_left(places, after)
                after = places[found % len(places)] + 1
                name = self.order[after - 1]
                yield name, self.instructions[name]
            else:
                yield self._unnamed(kernel, op, after)

    def _unnamed(self, kernel: str, op: str, after: int) -> tuple[str, Instruction]:
        exchanges = bool(EXCHANGE.search(kernel))
        for name in takewhile(lambda name: not self.instructions[name].kernel, self.order[after:]):
            if self.instructions[name].exchanges == exchanges:
                return name, self.instructions[name]
        scope = self.instructions[self.order[after - 1]].scope if self.order else ""
        return kernel, Instruction(op or kernel, scope, "")


def kernel_name(name: str) -> str:
    """What XLA calls the kernel of an instruction."""
    return re.sub("[.-]", "_", name)


def _without_number(kernel: str) -> str:
    return kernel.rstrip("_0123456789")


def programs(space: memoryview) -> dict[str, Program]:
    """The programs in a trace, an XSpace protobuf, by names like "jit_decode(4)"; JAX's reader leaves this part out.
    Numbers are those of the fields in xplane.proto and hlo.proto."""
    return {
        _text(metadata, 2): _program(module)
        for plane in _all(space, 1)
        if _text(plane, 2) == "/host:metadata"
        for entry in _all(plane, 4)
        for metadata in _all(entry, 2)
        for stat in _all(metadata, 5)
        for hlo in _all(stat, 6)
        for module in _all(hlo, 1)
    }


def _program(module: memoryview) -> Program:
    names, found, calls = {}, {}, {}
    for computation in _all(module, 3):
        scopes: dict[int, str] = {}  # of who reads it, by an instruction's number
        for each in reversed(list(_all(computation, 2))):  # whoever reads comes later
            name, opcode = _text(each, 1), _text(each, 2)
            scope = "".join(_text(metadata, 2) for metadata in _all(each, 7))
            if "/" not in scope:  # what XLA puts in, as conversions and padding, belongs to what it is made for
                scope = scopes.get(next(_numbers(each, 35), 0), scope)
            scopes.update(dict.fromkeys(_numbers(each, 36), scope))
            found[name] = Instruction(opcode, scope, _kernel(name, opcode, scope))
            names[next(_numbers(each, 35), 0)] = name
            calls[name] = list(_numbers(each, 38))
    sequences = {
        next(_numbers(entry, 1), 0): [names[number] for each in _all(entry, 2) for number in _numbers(each, 1)]
        for schedule in _all(module, 7)
        for entry in _all(schedule, 1)
    }
    called = {callee for name in found for callee in calls.get(name, ())}
    scheduled = [name for number in sequences if number not in called for name in _inlined(number, sequences, calls)]
    return Program(found, [name for name in scheduled if not _NO_KERNEL.match(found[name].opcode)])


def _inlined(number: int, sequences: dict[int, list[str]], calls: dict[str, list[int]]) -> Iterator[str]:
    """The instructions of a computation in the order in which they run, those of its loops and branches in their
    place."""
    for name in sequences[number]:
        yield name
        for callee in calls.get(name, ()):
            if callee in sequences:
                yield from _inlined(callee, sequences, calls)


def _kernel(name: str, opcode: str, scope: str) -> str:
    if opcode == "custom-call" and scope.endswith("/pallas_call"):
        return _without_number(scope.split("/")[-2])
    if opcode in ("custom-call", "copy") or COLLECTIVE.search(opcode):
        return ""
    return _without_number(kernel_name(name))


def _text(message: memoryview, number: int) -> str:
    return "".join(bytes(each).decode() for each in _all(message, number))


def _all(message: memoryview, number: int) -> Iterator[memoryview]:
    """The fields `number` of a protobuf message that are themselves bytes."""
    return (value for each, value in _fields(message) if each == number and not isinstance(value, int))


def _numbers(message: memoryview, number: int) -> Iterator[int]:
    """The integers in fields `number`, packed or not."""
    for each, value in _fields(message):
        if each == number and isinstance(value, int):
            yield value
        elif each == number:
            at = 0
            while at < len(value):
                one, at = _varint(value, at)
                yield one


def _fields(message: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        kind = key & 7
        if kind == 2:
            size, at = _varint(message, at)
            yield key >> 3, message[at : at + size]
            at += size
        elif kind == 0:
            value, at = _varint(message, at)
            yield key >> 3, value
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
