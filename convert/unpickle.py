"""The plain data that a pickle describes. Its opcodes are read by the standard library and carried out here, on nothing
but what the pickle itself has made: no name is looked up or called, no object of ours is written to."""

import pickletools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_LITERALS = {
    "BINFLOAT", "BININT", "BININT1", "BININT2", "BINSTRING", "BINUNICODE", "BINUNICODE8", "FLOAT", "INT", "LONG",
    "LONG1", "LONG4", "SHORT_BINSTRING", "SHORT_BINUNICODE", "UNICODE",
}  # fmt: skip
_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_PUT, _GET = {"PUT", "BINPUT", "LONG_BINPUT"}, {"GET", "BINGET", "LONG_BINGET"}


class PickleError(ValueError):
    """A pickle that is damaged, or wants what plain data does not need."""


def unpickle(data: bytes, names: Mapping[str, Any], persistent: Callable[[Any], Any]) -> Any:
    """What the pickle describes, of numbers, texts, tuples, lists, dicts with texts as keys, and the values of `names`.

    names: ``module name`` to what stands for it; those that are functions may be called. persistent: makes something of
    a persistent id. Attributes that the pickle sets on its dicts are dropped.

    Raises:
      PickleError: says what was found, without a word of the pickle's own beyond names.
    """
    machine = _Machine(names)
    for name, argument in _opcodes(data):
        if name == "STOP":
            return machine.end()
        if name == "BINPERSID":
            machine.push(persistent(machine.pop()))
        else:
            machine.run(name, argument)
    raise PickleError("damaged: it has no end")


def _opcodes(data: bytes) -> Iterator[tuple[str, Any]]:
    place, found = 0, pickletools.genops(data)
    while True:
        try:
            opcode, argument, place = next(found)
        except StopIteration:
            return
        except Exception as error:  # the library's own words are about Python
            raise PickleError(f"damaged after byte {place}") from error
        yield opcode.name, argument


class _Machine:
    """`marks`: how long the stack was at each open mark; what lies below the last one is out of reach."""

    def __init__(self, names: Mapping[str, Any]):
        self.names = names
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self) -> Any:
        return self.take(1)[0]

    def take(self, count: int) -> list[Any]:
        if len(self.stack) - (self.marks[-1] if self.marks else 0) < count:
            raise PickleError("damaged: an opcode without its operands")
        start = len(self.stack) - count
        taken = self.stack[start:]
        del self.stack[start:]
        return taken

    def top(self, kind: type, what: str) -> Any:
        value = self.pop()
        if type(value) is not kind:
            raise PickleError(f"{what} what is no {kind.__name__}")
        self.push(value)
        return value

    def marked(self) -> list[Any]:
        if not self.marks:
            raise PickleError("damaged: no mark where one is needed")
        taken = self.take(len(self.stack) - self.marks[-1])
        self.marks.pop()
        return taken

    def end(self) -> Any:
        if self.marks or len(self.stack) != 1:
            raise PickleError("damaged: it ends in the middle")
        return self.pop()

    def run(self, name: str, argument: Any) -> None:
        if name in _LITERALS:
            self.push(argument)
        elif name in _CONSTANTS:
            self.push(_CONSTANTS[name])
        elif name in _PUT or name == "MEMOIZE":
            value = self.pop()
            self.push(value)
            self.memo[len(self.memo) if name == "MEMOIZE" else argument] = value
        elif name in _GET:
            if argument not in self.memo:
                raise PickleError("damaged: it takes up what it has not laid down")
            self.push(self.memo[argument])
        elif name == "MARK":
            self.marks.append(len(self.stack))
        elif name in _TUPLES:
            self.push(tuple(self.take(_TUPLES[name])))
        elif name == "TUPLE":
            self.push(tuple(self.marked()))
        elif name == "EMPTY_DICT":
            self.push({})
        elif name == "EMPTY_LIST":
            self.push([])
        elif name in ("SETITEM", "SETITEMS"):
            self.set_items(self.marked() if name == "SETITEMS" else self.take(2))
        elif name in ("APPEND", "APPENDS"):
            values = self.marked() if name == "APPENDS" else self.take(1)
            self.top(list, "it appends to").extend(values)
        elif name == "GLOBAL":
            self.push(self.named(argument))
        elif name == "STACK_GLOBAL":
            module, name = self.take(2)
            if type(module) is not str or type(name) is not str:
                raise PickleError("damaged: a name that is no text")
            self.push(self.named(f"{module} {name}"))
        elif name == "REDUCE":
            self.call()
        elif name == "BUILD":
            self.pop()
            self.top(dict, "it sets attributes of")
        elif name not in ("PROTO", "FRAME"):
            raise PickleError(f"it uses {name}, which plain weights do not need: refused, not run")

    def set_items(self, pairs: list[Any]) -> None:
        target, keys = self.top(dict, "it sets items of"), pairs[::2]
        if len(pairs) % 2:
            raise PickleError("damaged: a key without a value")
        # looked at before they are hashed: hashing a tuple nested deeply enough ends the process
        if not all(type(key) is str for key in keys):
            raise PickleError("a key that is no text: not a plain state dict")
        target.update(zip(keys, pairs[1::2]))

    def named(self, name: str) -> Any:
        if name not in self.names:
            said = name.replace(" ", ".", 1)[:100]
            raise PickleError(f"it names {said}, which plain weights do not need: refused, not run")
        return self.names[name]

    def call(self) -> None:
        function, arguments = self.take(2)
        if not callable(function) or type(arguments) is not tuple:
            raise PickleError("it calls what is no function")
        self.push(function(*arguments))
