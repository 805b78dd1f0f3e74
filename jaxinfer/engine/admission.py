"""Who gets memory: the queue, and the slots and pages that sequences hold, get more of, or give back.

Nothing here looks at a clock or at a token's value, so every process decides alike: see `scheduler.py`.
"""

import bisect
import heapq

from jaxinfer.engine.pages import PageAllocator
from jaxinfer.engine.scheduler_config import SchedulerConfig
from jaxinfer.engine.sequence import Sequence, State
from jaxinfer.engine.shard import Shard, arrival, discard


class Admission:
    """The sequences that wait, in order of arrival, and those that hold a slot of a shard.

    Order: first come, first admitted; the head of the queue blocks the rest. When a shard's pages run out, its latest
    arrival gives way, and waits at the front of the queue again. So the earliest arrival of a shard always advances.
    """

    def __init__(self, config: SchedulerConfig):
        self.config = config
        self.preemptions = 0  # of sequences that had begun to prefill
        self.shards = [
            Shard(
                PageAllocator(config.pages),
                [list(range(config.rows)) for _ in range(config.stages)],
                [0] * config.slots,
            )
            for _ in range(config.shards)
        ]
        self._queue: list[tuple[int, Sequence]] = []  # heap by arrival; the head is dropped when FINISHED
        self._waiting = 0
        self._arrivals = 0
        self._admissions = 0

    @property
    def waiting(self) -> int:
        return self._waiting

    def queue(self) -> list[Sequence]:
        """Those that wait, the head first."""
        return [seq for _, seq in sorted(self._queue) if seq.state is State.WAITING]

    def add(self, seq: Sequence) -> None:
        """Puts a new sequence at the end of the queue.

        Raises:
          ValueError: an empty prompt, a negative max_new_tokens, or more tokens than all pages of a shard can hold.
        """
        config, new = self.config, seq.params.max_new_tokens
        if not seq.prompt:
            raise ValueError(f"request {seq.request_id}: the prompt has 0 tokens, legal is at least 1")
        if new < 0:
            raise ValueError(f"request {seq.request_id}: max_new_tokens: found {new}, legal is at least 0")
        needed = config.pages_for(seq.cache_tokens)
        if needed > config.pages - 1:
            raise ValueError(
                f"request {seq.request_id}: {len(seq.prompt)} prompt tokens and {new} new tokens need {needed} pages "
                f"of {config.page_size} tokens, a shard has {config.pages - 1}"
            )
        seq.arrival = self._arrivals
        self._arrivals += 1
        self._enqueue(seq)

    def remove(self, seq: Sequence) -> None:
        """Takes an unfinished sequence out of the queue, or frees its slot and pages."""
        if seq.state is State.WAITING:
            self._waiting -= 1
        elif seq.state is not State.DRAINED:
            self._release(seq)
        seq.state = State.FINISHED

    def _enqueue(self, seq: Sequence) -> None:
        seq.state = State.WAITING
        heapq.heappush(self._queue, (seq.arrival, seq))
        self._waiting += 1

    def admit(self) -> None:
        """Gives slots and pages to the head of the queue as long as a shard has room for it.

        Room is pages for all its tokens, and for the growth of one block of each resident, itself included: with less,
        the next decode block would preempt it again.
        """
        config = self.config
        while self._queue:
            seq = self._queue[0][1]
            if seq.state is not State.WAITING:
                heapq.heappop(self._queue)
                continue
            if seq.outstanding:  # preempted: its output is not fully known yet
                return
            target = len(seq.prompt) + len(seq.output)
            pages = config.pages_for(target)
            needed = pages + self._growth(seq, pages)
            best = None
            for index, shard in enumerate(self.shards):
                slots, free = shard.free_slots, shard.pages.free_pages
                if slots and free >= needed + shard.reserve and (best is None or (free, slots) > best[:2]):
                    best = free, slots, index
            if best is None:
                return
            seq.shard = best[2]
            shard = self.shards[seq.shard]
            heapq.heappop(self._queue)
            self._waiting -= 1
            self._admissions += 1
            seq.state = State.PREFILL
            seq.epoch = self._admissions
            seq.slot = shard.take_slot()
            seq.pages = shard.pages.allocate(pages)
            seq.target, seq.prefilled, seq.fed, seq.in_flight = target, 0, 0, False
            shard.reserve += needed - pages
            bisect.insort(shard.residents, seq, key=arrival)
            bisect.insort(shard.filling, seq, key=arrival)

    def _release(self, seq: Sequence) -> None:
        """Frees slot and pages. Its rows in the pipelines are stale from here on, known by their epoch."""
        shard = self.shards[seq.shard]
        shard.reserve -= self._growth(seq, len(seq.pages))
        shard.pages.free(seq.pages)
        shard.return_slot(seq.slot)
        discard(shard.residents, seq)
        discard(shard.filling, seq)
        seq.epoch, seq.shard, seq.slot, seq.pages, seq.in_flight = 0, -1, -1, (), False

    def _growth(self, seq: Sequence, pages: int) -> int:
        """Pages, on top of these, that one decode block may ask for."""
        config = self.config
        return min(config.pages_for(config.decode_steps), config.pages_for(seq.cache_tokens) - pages)

    def _preempt(self, seq: Sequence) -> None:
        self.preemptions += seq.prefilled > 0
        self._release(seq)
        self._enqueue(seq)

    def release_drained(self) -> None:
        """Releases the sequences whose last pass has left the pipeline in what is dispatched already."""
        for shard in self.shards:
            for seq in [s for s in shard.residents if s.state is State.RUNNING and s.fed >= s.limit]:
                if not seq.in_flight:
                    self._release(seq)
                    seq.state = State.DRAINED

    def grow(self, shard: Shard) -> None:
        """Gives each decoding row, in order of arrival, the pages of its next K tokens; the latest arrivals pay."""
        config, at = self.config, 0
        while at < len(shard.residents):
            seq = shard.residents[at]
            at += 1
            if seq.state is not State.RUNNING:
                continue
            more = config.pages_for(min(seq.limit, seq.fed + config.decode_steps)) - len(seq.pages)
            while more > shard.pages.free_pages and seq.slot >= 0:
                self._preempt(shard.residents[-1])
            if more > 0 and seq.slot >= 0:
                shard.reserve -= self._growth(seq, len(seq.pages))
                seq.pages += shard.pages.allocate(more)
                shard.reserve += self._growth(seq, len(seq.pages))
