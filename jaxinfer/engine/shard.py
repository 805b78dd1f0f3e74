"""One data shard's slots and pages, and the sequences that hold them."""

import bisect
import heapq
from dataclasses import dataclass, field

from jaxinfer.engine.pages import PageAllocator
from jaxinfer.engine.sequence import Sequence


def arrival(seq: Sequence) -> int:
    return seq.arrival


def discard(ordered: list[Sequence], seq: Sequence) -> bool:
    """Takes seq out of a list that is sorted by arrival; says whether it was there."""
    at = bisect.bisect_left(ordered, seq.arrival, key=arrival)
    found = at < len(ordered) and ordered[at] is seq
    if found:
        del ordered[at]
    return found


@dataclass(eq=False)
class Shard:
    pages: PageAllocator
    free_rows: list[list[int]]  # per microbatch, a heap
    last_epochs: list[int]  # per slot, of its owner in the last decode block
    residents: list[Sequence] = field(default_factory=list)  # hold a slot, by arrival
    filling: list[Sequence] = field(default_factory=list)  # those with chunks still to enter, by arrival
    reserve: int = 0  # pages that the residents may ask for in their next block
    promised: int = 0  # pages that the residents hold at their ends if none stops before

    @property
    def free_slots(self) -> int:
        return sum(map(len, self.free_rows))

    def take_slot(self) -> int:
        """The lowest free row of the emptiest microbatch: passes are spread over the stages evenly."""
        microbatch = max(range(len(self.free_rows)), key=lambda m: len(self.free_rows[m]))
        rows = len(self.last_epochs) // len(self.free_rows)
        return microbatch * rows + heapq.heappop(self.free_rows[microbatch])

    def return_slot(self, slot: int) -> None:
        microbatch, row = divmod(slot, len(self.last_epochs) // len(self.free_rows))
        heapq.heappush(self.free_rows[microbatch], row)
