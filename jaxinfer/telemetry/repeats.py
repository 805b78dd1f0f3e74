"""The figures of a run that was repeated: of each its median, least and most."""

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any


def flat(figures: Mapping[str, Any], before: str = "") -> dict[str, float]:
    """The numbers in a summary by their paths, ``ttft_s.p50`` say; what was not measured is left out."""
    found: dict[str, float] = {}
    for name, value in figures.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{before}{name}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found[before + name] = value
    return found


def over(runs: Sequence[Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Of figures that all runs have: ``median``, ``least`` and ``most``."""
    names = [name for name in runs[0] if all(name in run for run in runs)] if runs else []
    columns = {name: [run[name] for run in runs] for name in names}
    return {
        name: {
            "median": values[0] if len(set(values)) == 1 else median(values),
            "least": min(values),
            "most": max(values),
        }
        for name, values in columns.items()
    }


def with_medians(summary: Mapping[str, Any], figures: Mapping[str, Mapping[str, float]], before: str = "") -> Any:
    """A summary whose numbers are the medians of `over`."""
    replaced: dict[str, Any] = {}
    for name, value in summary.items():
        if isinstance(value, Mapping):
            replaced[name] = with_medians(value, figures, f"{before}{name}.")
        else:
            replaced[name] = figures[before + name]["median"] if before + name in figures else value
    return replaced
