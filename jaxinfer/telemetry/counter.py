"""Counters of hardware, which wrap around or start anew, as ones that only grow."""


class Counter:
    """Gives what a counter has counted since the first look at it.

    Args:
      top: how many values it has, where it goes on at 0 after the last of them. Without, a smaller value than before
        means that its owner (a driver, say) started anew: what it had counted since the look before is not known.
    """

    def __init__(self, top: int | None = None):
        self._top, self._total = top, 0
        self._last: int | None = None

    def __call__(self, value: int) -> int:
        if self._last is not None:
            went_round = value < self._last
            before = self._last - (self._top or self._last) if went_round else self._last
            self._total += value - before
        self._last = value
        return self._total
