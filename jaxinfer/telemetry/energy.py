"""Joules of a window of time, from what was sampled before, in and after it."""

from bisect import bisect_left
from collections.abc import Sequence

# NVML's energy counter moves about every 100 ms, as often as we look: the error at both ends is below a tenth of this
LEAST_WINDOW_S = 2.0
GAP_S = 1.0  # between two samples, above which nobody knows what the power was


class Energy:
    """Of one GPU from `began` to `ended`; give it the samples in order of time, with at least one on either side."""

    def __init__(self, began: float, ended: float):
        self._began, self._ended = began, ended
        self._last: tuple[float, float | None, float | None] | None = None
        self._counter: list[float | None] = [None, None]  # where it stood at the two ends
        self._integral = self._covered = 0.0

    def add(self, time: float, counter_j: float | None, power_w: float | None) -> None:
        if self._last is not None and time > self._last[0] and time - self._last[0] <= GAP_S:
            before, counter, power = self._last
            if counter is not None and counter_j is not None:
                for place, when in enumerate((self._began, self._ended)):
                    if before <= when <= time:
                        self._counter[place] = _between(when, before, counter, time, counter_j)
            start, end = max(before, self._began), min(time, self._ended)
            if power is not None and power_w is not None and start < end:
                ends = [_between(when, before, power, time, power_w) for when in (start, end)]
                self._integral += (end - start) * sum(ends) / 2
                self._covered += end - start
        self._last = time, counter_j, power_w

    def joules(self) -> tuple[float, str] | None:
        """With how it was found, ``counter`` or ``integral of power``; None where neither covers the window, and of one
        shorter than `LEAST_WINDOW_S`."""
        window, (first, last) = self._ended - self._began, self._counter
        if window < LEAST_WINDOW_S:
            return None
        if first is not None and last is not None:
            return last - first, "counter"
        if self._covered > window - 1e-6:
            return self._integral, "integral of power"
        return None


def difference(times: Sequence[float], totals: Sequence[float], began: float, ended: float) -> float | None:
    """How much a total, looked at now and then, grew from `began` to `ended`; None where no look is before or after."""
    if not times or times[0] > began or times[-1] < ended or ended - began < LEAST_WINDOW_S:
        return None
    found = []
    for when in (began, ended):
        after = bisect_left(times, when)
        before = max(0, after - 1)
        found.append(_between(when, times[before], totals[before], times[after], totals[after]))
    return found[1] - found[0]


def _between(when: float, before: float, first: float, after: float, last: float) -> float:
    return first + (last - first) * (when - before) / (after - before) if after > before else last
