"""Validators of fields that people write in files."""

from collections.abc import Callable
from typing import Any

import attrs


def check(legal: str, holds: Callable[[Any], bool]) -> Callable[[Any, attrs.Attribute, Any], None]:
    """A validator for `attrs.field` that says what is legal."""

    def validate(instance: Any, field: attrs.Attribute, value: Any) -> None:
        if not holds(value):
            raise ValueError(f"{field.name}: found {value!r}, legal is {legal}")

    return validate
