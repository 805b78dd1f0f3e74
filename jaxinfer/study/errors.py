"""What is shown of bad input, and how."""

import difflib
import reprlib
from collections.abc import Iterable
from typing import Any


class StudyError(ValueError):
    """What the user can mend, in one line: the file, field or folder, what was found, what is legal."""


def shown(value: Any) -> str:
    """A value from a file, however large it is."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = 80
    return short.repr(value)


def unknown(what: str, name: Any, legal: Iterable[str]) -> str:
    """``unknown field 'mehses'; did you mean 'meshes'? legal: ...``"""
    legal = list(legal)
    near = difflib.get_close_matches(str(name), legal, 1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"unknown {what} {shown(name)}; {hint}legal: {', '.join(legal)}"
