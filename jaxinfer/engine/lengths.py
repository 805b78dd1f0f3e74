"""How long outputs will be: known from those that ended, and from how far the others are."""

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

REMEMBERED = 1024  # ended outputs
GOLDEN = 0.6180339887498949  # multiples of it, modulo 1, fill [0, 1) evenly


class OutputLengths:
    """The lengths at which outputs met a stop. One that ran into its limit tells only that it would have been longer.

    Every process sees the same outputs end, so all expect the same.
    """

    def __init__(self):
        self._ended: deque[tuple[int, bool]] = deque(maxlen=REMEMBERED)

    def ended(self, tokens: int, stopped: bool) -> None:
        """An output of so many tokens ended; `stopped`: by itself, before its limit."""
        self._ended.append((tokens, stopped))

    def survival(self, running: Sequence[int]) -> "Survival":
        """Of all outputs, those that run (with so many tokens) included."""
        lengths = np.array([tokens for tokens, _ in self._ended], np.int64)
        stopped = np.array([stops for _, stops in self._ended], bool)
        if not stopped.any():
            return Survival(np.empty(0, np.int64), np.empty(0))
        at, events = np.unique(lengths[stopped], return_counts=True)
        everything = np.sort(np.concatenate([lengths, np.asarray(running, np.int64)]))
        reached = len(everything) - np.searchsorted(everything, at, "left")
        return Survival(at, np.cumprod(1 - events / reached))


class Survival(NamedTuple):
    """Kaplan and Meier's estimate ("Nonparametric Estimation from Incomplete Observations", 1958), in which running
    outputs count with what they have: those that end first would otherwise make all look short."""

    at: np.ndarray  # lengths at which some stopped, ascending
    longer: np.ndarray  # the share of outputs that are longer than each

    def expect(self, made: Sequence[int], limits: Sequence[int], numbers: Sequence[int]) -> np.ndarray:
        """Final lengths [B] of outputs that have `made` tokens and end at `limits` at the latest.

        Each is a quantile of the lengths that are possible still; which one follows from its number, so that many
        outputs together have the distribution's shape.
        """
        made, limits = np.asarray(made, np.int64), np.asarray(limits, np.int64)
        if not len(self.at):
            return limits
        alive = np.where(made < self.at[0], 1.0, self.longer[np.searchsorted(self.at, made, "right") - 1])
        share = alive * (1 - np.asarray(numbers, np.float64) * GOLDEN % 1.0)
        # the first length that no more than this share of all exceed
        place = np.searchsorted(-self.longer, -share, "left")
        expected = np.where(place < len(self.at), self.at[np.minimum(place, len(self.at) - 1)], limits)
        return np.clip(expected, np.minimum(made + 1, limits), limits)
