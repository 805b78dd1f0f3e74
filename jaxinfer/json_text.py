"""JSON that others wrote: parsed within bounds, refused in one line."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

DEEPEST = 64  # what is done with the values later may recurse
LONGEST = 32 << 20  # of a file: its values may take thirty times as much


def parse(data: bytes | str, pairs: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """`json.loads`; `pairs` makes what stands for an object of its names and values.

    Raises:
      json.JSONDecodeError: not JSON, with the place.
      ValueError: not UTF-8, nested deeper than `DEEPEST`, or a number of thousands of digits.
    """
    try:
        value = json.loads(data, object_pairs_hook=pairs)
    except RecursionError:
        raise ValueError(_DEEP) from None
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8: byte 0x{error.object[error.start]:02x} at byte {error.start + 1}") from None
    except ValueError as error:
        if type(error) is not ValueError:
            raise
        raise ValueError(f"a number of more than {sys.get_int_max_str_digits()} digits") from None
    openings = ("[", "{") if isinstance(data, str) else (b"[", b"{")
    if sum(data.count(each) for each in openings) > DEEPEST:
        _refuse_deep(value)
    return value


def read_object(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds.

    Raises:
      ValueError: another kind of value, longer than `LONGEST`, or as `parse`; names the file.
    """
    with open(path, "rb") as file:
        data = file.read(LONGEST + 1)
    if len(data) > LONGEST:
        raise ValueError(f"{path}: longer than {LONGEST >> 20} MiB, which no such file is")
    try:
        value = parse(data)
    except ValueError as error:
        raise ValueError(f"{path}: damaged, not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: found {type(value).__name__}, legal is an object")
    return value


_DEEP = f"nested too deeply, legal is {DEEPEST} deep"


def _refuse_deep(value: Any) -> None:
    level = [value]
    for _ in range(DEEPEST + 1):
        inner = (each.values() if isinstance(each, dict) else each for each in level)
        level = [child for each in inner for child in each if isinstance(child, dict | list)]
        if not level:
            return
    raise ValueError(_DEEP)
