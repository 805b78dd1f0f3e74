"""What a screen cannot show."""

import io
import sys


def escape_unencodable() -> None:
    """Standard output escapes the characters that its encoding lacks, as Python's standard error does, and does not
    end the program; every command calls it first."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
