"""What a prompt may be made of, however its caller holds it: JSON's types, NumPy's, or none that makes sense."""

import operator
from collections.abc import Mapping
from numbers import Number
from typing import Any


def whole_numbers(name: str, value: Any) -> list[int]:
    """Token ids: of a list, or of anything else that is ordered and holds whole numbers alone; `name` is its field.

    Raises:
      ValueError: what it is instead.
    """
    try:
        if isinstance(value, str | bytes | bytearray | Mapping):
            raise TypeError
        len(value)  # a generator has none, and would be empty the second time
        items = list(value)
    except TypeError:
        raise ValueError(f"{name}: found {kind(value)}, legal is a list of whole numbers") from None
    ids = []
    for item in items:
        try:
            if isinstance(item, bool):  # an int to Python; but whoever says true means no token
                raise TypeError
            ids.append(operator.index(item))
        except TypeError:
            raise ValueError(f"{name}: found {shown(item)} in the list, legal are whole numbers") from None
    return ids


def check_unicode(name: str, value: Any) -> None:
    """Raises ValueError for a string, in lists and mappings of any depth too, that is no Unicode text: with half of a
    surrogate pair alone in it, which Python has for bytes that it could not decode as well."""
    left, seen = [value], set()
    while left:
        each = left.pop()
        if isinstance(each, str):
            try:
                each.encode()
            except UnicodeEncodeError as error:
                found = each[error.start]
                byte = f" (byte 0x{ord(found) - 0xDC00:02x}, not UTF-8)" if "\udc80" <= found <= "\udcff" else ""
                raise ValueError(
                    f"{name}: half of a surrogate pair, {found!r}{byte}, stands alone at character "
                    f"{error.start + 1} of {shown(each)}; legal is Unicode text"
                ) from None
        elif isinstance(each, Mapping | list | tuple) and id(each) not in seen:
            seen.add(id(each))
            left += [*each.keys(), *each.values()] if isinstance(each, Mapping) else each


def kind(value: Any) -> str:
    """What a value is, in the words of JSON where it has one."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true or false"
    for types, name in ((Number, "a number"), (str, "a string"), (Mapping, "an object")):
        if isinstance(value, types):
            return name
    if isinstance(value, list | tuple):
        return "a list" if value else "an empty list"
    return type(value).__name__


def shown(value: Any) -> str:
    """The value itself, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
