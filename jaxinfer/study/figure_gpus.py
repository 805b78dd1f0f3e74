"""What the GPUs of a run did over its time, from the monitor's samples."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxinfer import style
from jaxinfer.study.columns import GIB
from jaxinfer.study.results import Cell, number

PANELS = {
    "utilization_percent": ("utilization\nin %", 1.0),
    "power_w": ("power in W", 1.0),
    "memory_used_bytes": ("memory\nin GiB", 1 / GIB),
}
MOST_LINES, MOST_POINTS = 8, 600
Samples = dict[tuple[str, str], dict[str, np.ndarray]]  # of each host and GPU: time_s and the columns


def timeline(cells: Sequence[Cell]) -> tuple[Any, str]:
    """Of the cell with the most devices and the greatest batch that has samples; None where there are none."""
    text = "GPUs over the time of one run"
    for cell in sorted(cells, key=lambda each: (each.devices, number(each.x.get("batch")) or 0), reverse=True):
        if samples := read_samples(cell.folder / "out.gpu.csv"):
            return _draw(samples), f"{text}: {cell.model}, {cell.label}, sampled at 10 Hz by NVML." + (
                ""
                if len(samples) <= MOST_LINES
                else f" Mean of {len(samples)} GPUs; the band is the least to the most."
            )
    return None, text


def read_samples(path: Path) -> Samples:
    """Empty without a file of samples; what was not measured is NaN."""
    found: dict[tuple[str, str], list[list[float]]] = {}
    try:
        with open(path, newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                values = [_number(row.get(name)) for name in ("time_s", *PANELS)]
                if not np.isnan(values[0]):
                    found.setdefault((row.get("host") or "", row.get("gpu") or ""), []).append(values)
    except (OSError, ValueError, csv.Error):
        return {}
    return {key: dict(zip(("time_s", *PANELS), np.array(rows).T)) for key, rows in sorted(found.items())}


def _number(text: str | None) -> float:
    try:
        return float(text or "nan")
    except ValueError:
        return float("nan")


def _draw(samples: Samples) -> Any:
    known = [name for name in PANELS if any(not np.isnan(each[name]).all() for each in samples.values())]
    if not known:
        return None
    figure, axes = style.canvas(style.COLUMN, 1.1 * len(known) + 0.3, len(known), 1, sharex=True, squeeze=False)
    ends = max(each["time_s"].max() for each in samples.values())
    grid = np.linspace(0, ends, min(MOST_POINTS, max(len(each["time_s"]) for each in samples.values())) + 1)
    handles = {}
    for name, panel in zip(known, axes[:, 0]):
        title, factor = PANELS[name]
        lines = {key: _binned(each["time_s"], each[name] * factor, grid) for key, each in samples.items()}
        centres = (grid[1:] + grid[:-1]) / 2
        if len(lines) <= MOST_LINES:
            hosts = {host for host, _ in lines}
            for place, ((host, gpu), values) in enumerate(lines.items()):
                form = style.line(place) | {"marker": ""}
                label = f"{host} GPU {gpu}" if len(hosts) > 1 else f"GPU {gpu}"
                handles[label] = panel.plot(centres, values, linewidth=0.9, **form)[0]
        else:
            every = np.ma.masked_invalid(list(lines.values()))
            handles["least to most"] = panel.fill_between(
                centres, every.min(axis=0), every.max(axis=0), color=style.SKY, linewidth=0
            )
            handles["mean"] = panel.plot(centres, every.mean(axis=0), color=style.BLUE)[0]
        panel.set(ylabel=title, ylim=(0, None))
    axes[-1, 0].set(xlabel="seconds since the run began", xlim=(0, ends))
    style.legend(figure, list(handles.values()), list(handles))
    return figure


def _binned(times: np.ndarray, values: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """Mean of the values in each bin; NaN where there is none."""
    known = ~np.isnan(values)
    places = np.clip(np.digitize(times[known], grid) - 1, 0, len(grid) - 2)
    sums = np.bincount(places, values[known], len(grid) - 1)
    counts = np.bincount(places, minlength=len(grid) - 1)
    return np.divide(sums, counts, out=np.full(len(grid) - 1, np.nan), where=counts > 0)
