"""Who gets memory: the queue, and the slots and pages that sequences hold, get more of, or give back.

Nothing here looks at a clock or at a token's value, so every process decides alike: see `scheduler.py`.
"""

import bisect
import heapq
from math import ceil

from jaxinfer.engine.forecast import Forecast
from jaxinfer.engine.lengths import OutputLengths
from jaxinfer.engine.pages import PageAllocator
from jaxinfer.engine.scheduler_config import SchedulerConfig
from jaxinfer.engine.sequence import Sequence, State
from jaxinfer.engine.shapes import WIDE
from jaxinfer.engine.shard import Shard, arrival, discard

FULL = 256  # rows of a microbatch beyond which a step takes time by its rows: there, fewer at once cost little
LOOKED_AT = 256  # waiting sequences that stand for all


class Admission:
    """The sequences that wait, in order of arrival, and those that hold a slot of a shard.

    Order: first come, first admitted; the head of the queue blocks the rest. When a shard's pages run out, its latest
    arrival gives way, and waits at the front of the queue again. So the earliest arrival of a shard always advances.
    """

    def __init__(self, config: SchedulerConfig):
        self.config = config
        self.batch = config.max_batch  # sequences of a shard that should run at once: see `_choose_batch`
        self.preemptions = 0  # of sequences that had begun to prefill
        self.shards = [
            Shard(
                PageAllocator(config.pages),
                [list(range(config.rows)) for _ in range(config.stages)],
                [0] * config.slots,
            )
            for _ in range(config.shards)
        ]
        self._lengths = OutputLengths()
        self._queue: list[tuple[int, Sequence]] = []  # heap by arrival; the head is dropped when FINISHED
        self._waiting = 0
        self._most = 0.0  # unfinished sequences of a shard, since none ran
        self._asked = 0  # pages that all unfinished sequences hold at their ends if none stops before
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
        self._asked += needed
        seq.arrival = self._arrivals
        self._arrivals += 1
        self._enqueue(seq)

    def remove(self, seq: Sequence, stopped: bool) -> None:
        """Takes an unfinished sequence out of the queue, or frees its slot and pages; `stopped`: its output has come to
        its end."""
        self._lengths.ended(len(seq.output), stopped and len(seq.output) < seq.params.max_new_tokens)
        self._asked -= self.config.pages_for(seq.cache_tokens)
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
        the next decode block would preempt it again. And the pages of all must suffice later, as they grow and end:
        what is preempted was prefilled for nothing.
        """
        config, forecast = self.config, None
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
            room = [
                (shard.pages.free_pages, shard.free_slots, -index)
                for index, shard in enumerate(self.shards)
                if len(shard.residents) < config.max_batch and shard.pages.free_pages >= needed + shard.reserve
            ]
            if not room:
                return
            if forecast is None and self._short:
                forecast = self._forecast()
                self.choose_batch(forecast)
            places = [-index for _, _, index in sorted(room, reverse=True)]
            places = [each for each in places if len(self.shards[each].residents) < self.batch]
            place = next((each for each in places if self._surely_carries(each, seq)), None)
            if place is None:
                forecast = forecast or self._forecast()
                place = next((each for each in places if forecast.peak(each, seq) < config.pages), None)
            if place is None:
                return
            if forecast is not None:
                forecast.add(place, seq)
            heapq.heappop(self._queue)
            self._waiting -= 1
            self._take_in(seq, place, target)

    def choose_batch(self, forecast: Forecast | None = None) -> None:
        """How many sequences of a shard should run at once: what the pages carry, in rounds of equal size, since a last
        round of few would take as many steps as the others. It does not sink while anything runs."""
        config = self.config
        if not self._short:
            self.batch = config.max_batch
            return
        running = sum(len(shard.residents) for shard in self.shards)
        unfinished = (running + self._waiting) / len(self.shards)
        self._most = max(self._most, unfinished) if running else unfinished
        some = [seq for _, seq in self._queue[:LOOKED_AT] if seq.state is State.WAITING]
        carried = max(1, (config.pages - 1) / (forecast or self._forecast()).held_at_end(some))
        fair = self._most / ceil(self._most / carried)
        # while they come and go one by one, each has half of its tokens, so that twice as many find room
        least, step = min(2 * carried, config.stages * FULL), config.stages * WIDE
        batch = min(config.max_batch, ceil(max(least, fair if fair <= step else ceil(fair / step) * step)))
        self.batch = max(self.batch, batch) if running else batch

    def _forecast(self) -> Forecast:
        return Forecast(self.shards, self._lengths, self.config.page_size, self.config.decode_steps)

    @property
    def _short(self) -> bool:
        """Whether there may be too few pages for all unfinished sequences at once."""
        return self._asked > len(self.shards) * (self.config.pages - 1)

    def _surely_carries(self, place: int, seq: Sequence) -> bool:
        """Whether a shard's pages suffice, whenever what runs ends."""
        return self.shards[place].promised + self.config.pages_for(seq.cache_tokens) < self.config.pages

    def _take_in(self, seq: Sequence, place: int, target: int) -> None:
        shard = self.shards[place]
        self._admissions += 1
        seq.state, seq.epoch = State.PREFILL, self._admissions
        seq.shard, seq.slot = place, shard.take_slot()
        seq.pages = shard.pages.allocate(self.config.pages_for(target))
        seq.target, seq.prefilled, seq.fed, seq.in_flight = target, 0, 0, False
        shard.reserve += self._growth(seq, len(seq.pages))
        shard.promised += self.config.pages_for(seq.cache_tokens)
        bisect.insort(shard.residents, seq, key=arrival)
        bisect.insort(shard.filling, seq, key=arrival)

    def _release(self, seq: Sequence) -> None:
        """Frees slot and pages. Its rows in the pipelines are stale from here on, known by their epoch."""
        shard = self.shards[seq.shard]
        shard.reserve -= self._growth(seq, len(seq.pages))
        shard.promised -= self.config.pages_for(seq.cache_tokens)
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
        """Of the sequences whose last pass has left the pipeline in what is dispatched already: releases those that are
        at their end, and begins the others anew."""
        for shard in self.shards:
            drained = [s for s in shard.residents if s.state is State.RUNNING and s.fed >= s.limit and not s.in_flight]
            for seq in drained:
                if seq.limit == seq.end:
                    self._release(seq)
                    seq.state = State.DRAINED
            for seq in drained:
                if seq.state is State.RUNNING:  # and has not just given way
                    self._begin_anew(shard, seq)

    def _begin_anew(self, shard: Shard, seq: Sequence) -> None:
        """It keeps slot and pages, and is prefilled with all its tokens once they are known: see `known`."""
        seq.state, seq.target, seq.prefilled, seq.fed = State.PREFILL, seq.limit + 1, 0, 0
        if not seq.outstanding:
            self.known(seq)
        self._extend(shard, seq, seq.target)

    def known(self, seq: Sequence) -> None:
        """All tokens are known of a sequence that was begun anew."""
        bisect.insort(self.shards[seq.shard].filling, seq, key=arrival)

    def grow(self, shard: Shard) -> None:
        """Gives each decoding row, in order of arrival, the pages of its next K tokens; the latest arrivals pay."""
        at = 0
        while at < len(shard.residents):
            seq = shard.residents[at]
            at += 1
            if seq.state is State.RUNNING:
                self._extend(shard, seq, min(seq.limit, seq.fed + self.config.decode_steps))

    def _extend(self, shard: Shard, seq: Sequence, tokens: int) -> None:
        """Gives it the pages of so many tokens. The latest arrivals give way, in the end itself."""
        more = self.config.pages_for(tokens) - len(seq.pages)
        while more > shard.pages.free_pages and seq.slot >= 0:
            self._preempt(shard.residents[-1])
        if more > 0 and seq.slot >= 0:
            shard.reserve -= self._growth(seq, len(seq.pages))
            seq.pages += shard.pages.allocate(more)
            shard.reserve += self._growth(seq, len(seq.pages))
