"""Samples of GPUs on disk: a CSV file per process while it runs, one for all at the end."""

import csv
import heapq
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

FLUSH_S = 5.0
UNKNOWN = "-"  # throttle reasons that nobody could tell: an empty cell says that there were none


class Sample(NamedTuple):
    """One look at one GPU; None is what was not measured. `time_s` counts from where process 0's run began, `energy_j`
    from the first look. `throttle`: what keeps the clocks low, joined by ``|``, empty for nothing. Traffic is what was
    since the look before."""

    time_s: float
    rank: int
    host: str
    gpu: int | None
    uuid: str
    utilization_percent: int | None = None
    memory_utilization_percent: int | None = None
    memory_used_bytes: int | None = None
    power_w: float | None = None
    energy_j: float | None = None
    temperature_c: int | None = None
    sm_clock_mhz: int | None = None
    memory_clock_mhz: int | None = None
    throttle: str | None = None
    ecc_corrected: int | None = None
    ecc_uncorrected: int | None = None
    pcie_tx_bytes_per_s: float | None = None
    pcie_rx_bytes_per_s: float | None = None
    nvlink_tx_bytes_per_s: float | None = None
    nvlink_rx_bytes_per_s: float | None = None


COLUMNS = Sample._fields
MEASURED = COLUMNS[5:]
DIGITS = {"time_s": 4, "power_w": 3, "energy_j": 3}
TEXTS = {"host", "uuid", "throttle"}
FLOATS = {"time_s", "power_w", "energy_j", *(name for name in COLUMNS if name.endswith("_per_s"))}


def merged_path(output: Path) -> Path:
    """``OUT.jsonl`` to ``OUT.gpu.csv``."""
    return output.with_name(f"{_stem(output)}.gpu.csv")


def part_path(output: Path, rank: int) -> Path:
    return output.with_name(f"{_stem(output)}.gpu.rank-{rank}.csv")


def part_files(output: Path) -> list[Path]:
    """What runs left that did not come to their end."""
    name = re.compile(re.escape(_stem(output)) + r"\.gpu(\.rank-\d+\.csv|\.csv\.partial)")
    return sorted(path for path in output.parent.glob("*.gpu.*") if name.fullmatch(path.name))


def _stem(output: Path) -> str:
    return output.name.removesuffix(".jsonl")


class Part:
    """Takes samples in order of time, and gives them to the file every few seconds, in one write of whole lines.

    Raises:
      OSError: the file cannot be written.
    """

    def __init__(self, path: Path):
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(path, "w", newline="", buffering=1 << 24)
        self._csv = csv.writer(self._file, lineterminator="\n")
        self._csv.writerow(COLUMNS)
        self._flushed = 0.0

    def add(self, samples: Iterable[Sample]) -> None:
        for sample in samples:
            self._csv.writerow(to_row(sample))
            if sample.time_s - self._flushed > FLUSH_S:
                self._file.flush()
                self._flushed = sample.time_s

    def close(self) -> None:
        with self._file:
            self._file.flush()
            os.fsync(self._file.fileno())


def to_row(sample: Sample) -> list[str]:
    return [_cell(name, value) for name, value in zip(COLUMNS, sample, strict=True)]


def _cell(name: str, value: Any) -> str:
    if value is None:
        return UNKNOWN if name == "throttle" else ""
    return f"{value:.{DIGITS.get(name, 0)}f}" if name in FLOATS else str(value)


def from_row(row: list[str]) -> Sample:
    """Raises ValueError for what no sample looks like."""
    if len(row) != len(COLUMNS):
        raise ValueError(f"found {len(row)} cells, legal is {len(COLUMNS)}")
    return Sample(*map(_value, COLUMNS, row))


def _value(name: str, cell: str) -> Any:
    if name in TEXTS:
        return None if name == "throttle" and cell == UNKNOWN else cell
    if not cell:
        return None
    return float(cell) if name in FLOATS else int(cell)


def read_samples(path: Path) -> Iterator[Sample]:
    """In order; a last line that a killed process left torn is passed over.

    Raises:
      OSError: it cannot be read.
    """
    with open(path, newline="") as file:
        for row in csv.reader(line for line in file if line.endswith("\n")):
            if row != list(COLUMNS):
                try:
                    yield from_row(row)
                except ValueError:
                    continue


def merge(parts: list[Path], output: Path) -> None:
    """Makes of the processes' files one, in order of time, whole or not at all, and removes them.

    Raises:
      OSError: it cannot be written; the parts stay.
    """
    aside = output.with_name(output.name + ".partial")
    try:
        with open(aside, "w", newline="") as file:
            file.write(",".join(COLUMNS) + "\n")
            file.writelines(line for *_, line in heapq.merge(*map(_lines, parts)))
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, output)
    except OSError:
        aside.unlink(missing_ok=True)
        raise
    for part in parts:
        part.unlink(missing_ok=True)


def _lines(path: Path) -> Iterator[tuple[float, int, int, str]]:
    """Time, rank, place and text of each sample's line; no more is read of it, since there may be millions."""
    with open(path, newline="") as file:
        next(file, None)
        for place, line in enumerate(file):
            if line.endswith("\n") and line.count(",") == len(COLUMNS) - 1:
                time_s, rank, _ = line.split(",", 2)
                yield float(time_s), int(rank), place, line
