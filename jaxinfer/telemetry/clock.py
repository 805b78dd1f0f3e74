"""How far the clocks of two processes are apart, from barriers that both went through."""

from collections.abc import Sequence
from typing import NamedTuple


class Passage(NamedTuple):
    """When a process came to a barrier and when it left it, by its own clock, in seconds."""

    came: float
    left: float


def apart(first: Sequence[Passage], other: Sequence[Passage]) -> tuple[float, float]:
    """What the other's clock shows more than the first's, and the most by which that is wrong, in seconds; both went
    through the same barriers.

    Nobody leaves a barrier before all have come, so each barrier bounds the difference from both sides; of several the
    tightest bounds count, and their middle is the answer.
    """
    most = min(theirs.left - mine.came for mine, theirs in zip(first, other, strict=True))
    least = max(theirs.came - mine.left for mine, theirs in zip(first, other, strict=True))
    return (most + least) / 2, (most - least) / 2
