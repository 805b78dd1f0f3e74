"""What the samples of a window of time say about each GPU, as JSON."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jaxinfer.telemetry.energy import LEAST_WINDOW_S, Energy
from jaxinfer.telemetry.samples import MEASURED, Sample

NOTE = "GPUs only"


class _Figure:
    """Of what was measured, and of nothing else."""

    def __init__(self) -> None:
        self.count, self.total = 0, 0.0
        self.least: float | None = None
        self.most: float | None = None

    def add(self, value: float | None) -> None:
        if value is not None:
            self.count += 1
            self.total += value
            self.least = value if self.least is None else min(self.least, value)
            self.most = value if self.most is None else max(self.most, value)

    @property
    def mean(self) -> float | None:
        return self.total / self.count if self.count else None


class _Window:
    """One GPU's."""

    def __init__(self, sample: Sample, began: float, ended: float):
        self._place = {name: getattr(sample, name) for name in ("rank", "host", "gpu", "uuid")}
        self._began, self._ended = began, ended
        self._samples = 0
        self._figures: dict[str, _Figure] = {}
        self._told, self._reasons = 0, dict[str, int]()
        self._energy = Energy(began, ended)

    def add(self, sample: Sample) -> None:
        self._energy.add(sample.time_s, sample.energy_j, sample.power_w)
        if not self._began <= sample.time_s <= self._ended:
            return
        self._samples += 1
        for name, value in zip(MEASURED, sample[-len(MEASURED) :]):
            if name != "throttle":
                self._figures.setdefault(name, _Figure()).add(value)
        if sample.throttle is not None:
            self._told += 1
            for reason in filter(None, sample.throttle.split("|")):
                self._reasons[reason] = self._reasons.get(reason, 0) + 1

    def summary(self, name: str) -> dict[str, Any]:
        figures = {each: self._figures.get(each, _Figure()) for each in MEASURED}
        utilization, power, clock = (figures[each] for each in ("utilization_percent", "power_w", "sm_clock_mhz"))
        joules = self._energy.joules()
        return self._place | {
            "name": name,
            "samples": self._samples,
            "window_s": self._ended - self._began,
            "utilization_percent": _both("mean", utilization.mean, "max", utilization.most),
            "memory_peak_bytes": figures["memory_used_bytes"].most,
            "power_w": _both("mean", power.mean, "max", power.most),
            "temperature_c": _only("max", figures["temperature_c"].most),
            "sm_clock_mhz": _both("mean", clock.mean, "min", clock.least),
            "throttle": {each: count / self._told for each, count in self._reasons.items()} if self._told else None,
            "ecc_uncorrected": figures["ecc_uncorrected"].most,
            "pcie_bytes_per_s": _traffic(figures, "pcie"),
            "nvlink_bytes_per_s": _traffic(figures, "nvlink"),
            "energy_j": joules and joules[0],
            "energy_method": joules and joules[1],
        }


def _both(first: str, value: float | None, second: str, other: float | None) -> dict[str, float | None] | None:
    return None if value is None else {first: value, second: other}


def _only(name: str, value: float | None) -> dict[str, float] | None:
    return None if value is None else {name: value}


def _traffic(figures: Mapping[str, _Figure], link: str) -> dict[str, float | None] | None:
    sent, received = (figures[f"{link}_{way}_bytes_per_s"].mean for way in ("tx", "rx"))
    return None if sent is None and received is None else {"tx": sent, "rx": received}


def summaries(samples: Iterable[Sample], names: Mapping[str, str], began: float, ended: float) -> list[dict[str, Any]]:
    """One per GPU, of what was from `began` to `ended` (as `Sample.time_s`); `samples` in order of time, from before to
    after that, or the energy is not known. `names` by UUID. What was not measured is None."""
    windows: dict[str, _Window] = {}
    for sample in samples:
        if sample.uuid not in windows:
            windows[sample.uuid] = _Window(sample, began, ended)
        windows[sample.uuid].add(sample)
    return [window.summary(names.get(uuid, "GPU")) for uuid, window in windows.items()]


def run_energy(
    gpus: Sequence[Mapping[str, Any]],
    devices: int,
    rapl_j: Sequence[float | None],
    output_tokens: int,
    window_s: float,
) -> dict[str, Any]:
    """Of a whole run on so many `devices`: the summaries of its GPUs, and what RAPL counted on each of its hosts."""
    parts = [gpu["energy_j"] for gpu in gpus] + [None] * (devices - len(gpus))
    joules = _sum(parts)
    return {
        "gpu_j": joules,
        "output_tokens": output_tokens,
        "gpu_j_per_output_token": joules / output_tokens if joules is not None and output_tokens else None,
        "method": None if joules is None else " and ".join(sorted({gpu["energy_method"] for gpu in gpus})),
        "window_s": window_s,
        "rapl_j": _sum(rapl_j),
        "note": NOTE if joules is not None else f"{NOTE}; not measured: {_why(parts, window_s)}",
    }


def _why(parts: Sequence[float | None], window_s: float) -> str:
    if window_s < LEAST_WINDOW_S:
        return f"the work took {window_s:.2g} s, and the counters need {LEAST_WINDOW_S:g}"
    return f"{sum(each is None for each in parts)} of {len(parts)} GPUs did not tell it all the time"


def _sum(parts: Sequence[float | None]) -> float | None:
    known = [each for each in parts if each is not None]
    return sum(known) if known and len(known) == len(parts) else None
