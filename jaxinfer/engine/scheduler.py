"""Decides what the device does next: which rows are prefilled, which are decoded. Who waits and who gives way is
`admission.py`'s question.

Nothing here looks at a clock or at a token's value: each decision follows from the requests and from how many tokens
the dispatches so far have fed, so every process decides alike and dispatches ahead of the results.
"""

from collections import deque
from dataclasses import dataclass

from jaxinfer.engine.admission import Admission
from jaxinfer.engine.scheduler_config import SchedulerConfig
from jaxinfer.engine.sequence import Ahead, DecodeBlock, PrefillRow, PrefillTick, Sequence, State
from jaxinfer.engine.shapes import WIDE, cost, covering, taken


@dataclass
class Bubble:
    """Stage-ticks of each shard: all, and those in which the stage had nothing to work on."""

    idle: int = 0
    total: int = 0

    def __add__(self, other: "Bubble") -> "Bubble":
        return Bubble(self.idle + other.idle, self.total + other.total)

    @property
    def share(self) -> float:
        return self.idle / self.total if self.total else 0.0


class Scheduler:
    """Continuous batching over a pipeline of S stages, with paged caches.

    The engine calls, in a loop: `schedule`, dispatch what it returns, `complete` for the dispatch before, `finish` for
    each sequence that met a stop or has all its tokens. Every dispatch is completed, in the order of dispatch.
    """

    def __init__(self, config: SchedulerConfig):
        self.config = config
        self.decode_bubble = Bubble()
        self.prefill_bubble = Bubble()
        self.steady_bubble = Bubble()  # decode blocks that enter and leave with every microbatch of every shard running
        self._admission = Admission(config)
        self._shards = self._admission.shards
        self._unfinished = 0
        self._dispatched: deque[PrefillTick | DecodeBlock] = deque()
        self._shape: tuple[int, int] | None = None  # of the rows in the prefill pipeline
        self._pipeline: list[list[list[PrefillRow | None]]] = []  # rows whose next stage is index + 1
        self._entered = 0  # token slots of the prefill ticks with entering rows since the last decode block
        self._was_full = False
        self._buckets: set[int] = set()  # row buckets in use: their programs are compiled
        self._fresh = True  # no decode block since nothing was unfinished
        self._too_wide = 0  # decode blocks wider than need be

    # What the engine calls

    def add(self, seq: Sequence) -> None:
        """Puts a new sequence at the end of the queue.

        Raises:
          ValueError: an empty prompt, a negative max_new_tokens, or more tokens than all pages of a shard can hold.
        """
        self._admission.add(seq)
        self._fresh |= not self._unfinished
        self._unfinished += 1

    def finish(self, seq: Sequence) -> None:
        """Ends a sequence, whatever its state, and frees its slot and pages at once. Does nothing the second time.

        Work of it that is in a pipeline is dropped by the next dispatch; tokens that still come are ignored.
        """
        self._end(seq, stopped=True)

    def abort(self, seq: Sequence) -> None:
        """The same for a sequence that nobody wants any more: its output says nothing of how long outputs get."""
        self._end(seq, stopped=False)

    def _end(self, seq: Sequence, stopped: bool) -> None:
        if seq.state is not State.FINISHED:
            self._admission.remove(seq, stopped)
            self._unfinished -= 1

    def schedule(self) -> PrefillTick | DecodeBlock | None:
        """The next dispatch; it counts as dispatched. None: there is none before results are completed."""
        self._admission.release_drained()
        decoding = any(seq.state is State.RUNNING for shard in self._shards for seq in shard.residents)
        may_enter = not decoding or self._entered < self.config.prefill_tokens
        dispatch = self._prefill_tick(may_enter)
        if dispatch is None and decoding:
            # No block comes back when the decoding rows all gave their pages to earlier arrivals still in prefill.
            dispatch = self._decode_block() or self._prefill_tick(True)
        if dispatch is not None:
            self._dispatched.append(dispatch)
        return dispatch

    def complete(self, dispatch: PrefillTick | DecodeBlock, tokens) -> list[tuple[Sequence, list[int]]]:
        """Takes the results of the oldest dispatch not completed yet.

        Args:
          tokens: int [K, D, M * rows] of a decode block, int [D, R] of the exiting rows of a prefill tick; -1 for none
            (other negative ones stand for a token: the scheduler looks at no token's value). Nested lists or an array.

        Returns:
          (sequence, its new tokens) for each unfinished sequence that got some, or whose prefill is through (no tokens
          with max_new_tokens=0). They are appended to its output already, never beyond max_new_tokens.

        Raises:
          RuntimeError: completed out of order, or the device lost tokens.
        """
        if not self._dispatched or self._dispatched[0] is not dispatch:
            raise RuntimeError("dispatches must be completed once each, in the order of dispatch")
        self._dispatched.popleft()
        tokens = tokens.tolist() if hasattr(tokens, "tolist") else tokens
        found: list[tuple[Sequence, list[int], bool]] = []
        if isinstance(dispatch, PrefillTick):
            for rows, row_tokens in zip(dispatch.stages[-1], tokens, strict=True):
                for row, token in zip(rows, row_tokens, strict=True):
                    if row is not None:
                        found.append((row.seq, [token] if row.final and token != -1 else [], row.final))
        else:
            for d, owners in enumerate(dispatch.owners):
                columns = zip(*(step[d] for step in tokens), strict=True)
                for seq, column in zip(owners, columns, strict=True):
                    if seq is not None:
                        found.append((seq, [token for token in column if token != -1], False))
        results = []
        for seq, new, always in found:
            seq.outstanding -= 1
            if seq.state is State.FINISHED:
                continue
            wanted = seq.params.max_new_tokens
            new = new[: wanted - len(seq.output)]
            seq.output.extend(new)
            if not seq.outstanding and len(seq.output) < wanted:
                self._nothing_in_flight(seq, wanted)
            if new or always:
                results.append((seq, new))
        return results

    def _nothing_in_flight(self, seq: Sequence, wanted: int) -> None:
        anew = seq.state is State.PREFILL and not seq.prefilled
        due = seq.target - len(seq.prompt) if anew else wanted
        if (anew or seq.state is State.DRAINED) and len(seq.output) < due:
            raise RuntimeError(
                f"request {seq.request_id} sample {seq.index}: the device returned {len(seq.output)} of "
                f"{due} tokens, and nothing of it is in flight"
            )
        if anew:
            self._admission.known(seq)

    def emptied(self) -> "Scheduler":
        """A new one, whose counts go on from these: for when this one may have been left halfway."""
        new = Scheduler(self.config)
        new.decode_bubble, new.prefill_bubble = self.decode_bubble, self.prefill_bubble
        new.steady_bubble, new._admission.preemptions = self.steady_bubble, self.preemptions
        return new

    def ahead(self) -> Ahead:
        """What the waiting sequences that get slots at once will need, if nothing else runs and pages suffice."""
        config = self.config
        self._admission.choose_batch()
        waiting = self._admission.queue()[: config.slots * config.shards]
        # of the first shard, as of the others
        prefills = self._prefills_ahead([len(seq.tokens) for seq in waiting[:: config.shards]])
        anew = [seq.anew_at + 1 for seq in waiting if seq.anew_at and len(seq.tokens) <= seq.anew_at < seq.end]
        prefills += self._prefills_ahead(anew[:1])  # each alone, for all that is known
        decoding = [seq for seq in waiting if seq.end > len(seq.tokens)]
        return Ahead(
            list(dict.fromkeys(prefills)),
            any(seq.score for seq in waiting),
            self._expected_rows() if decoding else 0,
            (
                max((min(len(seq.tokens) + config.decode_steps, seq.end) for seq in decoding), default=1),
                max((seq.end for seq in decoding), default=1),
            ),
        )

    def _prefills_ahead(self, lengths: list[int]) -> list[tuple[tuple[int, int], int]]:
        """Ticks for sequences of these lengths: shapes, and tokens of the longest sequence in each."""
        prefills, left = [], [[length, length] for length in lengths]
        while left:
            shape = self._best_shape([[tokens for _, tokens in left]])
            entering = taken([tokens for _, tokens in left], shape)
            prefills.append((shape, max(length for length, _ in left[: len(entering)])))
            for row, tokens in zip(left, entering, strict=False):
                row[1] -= tokens
            left = [row for row in left if row[1]]
        return prefills

    @property
    def has_unfinished(self) -> bool:
        return self._unfinished > 0

    @property
    def running(self) -> int:
        """Sequences that hold a slot, those in prefill included."""
        return sum(len(shard.residents) for shard in self._shards)

    @property
    def waiting(self) -> int:
        return self._admission.waiting

    @property
    def preemptions(self) -> int:
        """Of sequences that had begun to prefill."""
        return self._admission.preemptions

    @property
    def free_pages(self) -> list[int]:
        """Per shard."""
        return [shard.pages.free_pages for shard in self._shards]

    @property
    def bubble(self) -> Bubble:
        """Overall: decode and prefill. A tick of the one takes another time than a tick of the other."""
        return self.decode_bubble + self.prefill_bubble

    # Prefill

    def _prefill_tick(self, may_enter: bool) -> PrefillTick | None:
        """A tick with entering rows; or an empty one, when rows in flight must leave first or nothing else is left."""
        self._pipeline = [[self._live(rows) for rows in stage] for stage in self._pipeline]
        occupied = [any(row for rows in stage for row in rows) for stage in self._pipeline]
        ticks_to_empty = len(occupied) - occupied.index(True) if any(occupied) else 0
        if may_enter:
            self._admission.admit()
        if any(shard.filling for shard in self._shards):
            if not may_enter:
                return None
            shape = self._choose_shape(ticks_to_empty)
            enter = not ticks_to_empty or shape == self._shape
        elif ticks_to_empty:
            enter = False
        else:
            return None
        if not ticks_to_empty:
            self._shape = shape
            self._pipeline = [self._empty_rows() for _ in range(self.config.stages - 1)]
        entering = self._enter() if enter else self._empty_rows()
        self._entered += enter * self._shape[0] * self._shape[1]

        stages = [entering, *self._pipeline]
        self._pipeline = stages[:-1]
        for row in (row for rows in stages[-1] for row in rows if row):
            row.seq.outstanding += 1
            if row.final:
                row.seq.state = State.RUNNING
                row.seq.fed = row.seq.target
        bubble = self.prefill_bubble
        bubble.total += len(stages) * len(self._shards)
        bubble.idle += sum(not any(rows) for stage in stages for rows in stage)
        return PrefillTick(self._shape, stages)

    @staticmethod
    def _live(rows: list[PrefillRow | None]) -> list[PrefillRow | None]:
        return [row if row and row.epoch == row.seq.epoch else None for row in rows]

    def _empty_rows(self) -> list[list[PrefillRow | None]]:
        return [[None] * self._shape[0] for _ in self._shards]

    def _left(self) -> list[list[int]]:
        """Per shard, tokens to prefill of each sequence."""
        return [[seq.target - seq.prefilled for seq in shard.filling] for shard in self._shards]

    def _choose_shape(self, ticks_to_empty: int) -> tuple[int, int]:
        """The best shape; but while rows of one shape are in flight, another must first pay for itself: the waiting
        tokens at the new rate, after the ticks that empty the pipeline, must take less time than at the present rate.
        """
        left = self._left()
        best = self._best_shape(left)
        if not ticks_to_empty or best == self._shape:
            return best
        new, now = (sum(sum(taken(each, shape)) for each in left) for shape in (best, self._shape))
        new_cost, now_cost, tokens = cost(best), cost(self._shape), sum(map(sum, left))
        pays = ticks_to_empty * now_cost * now * new + tokens * new_cost * now < tokens * now_cost * new
        return best if pays else self._shape

    def _best_shape(self, left: list[list[int]]) -> tuple[int, int]:
        """The shape that takes the most tokens for its cost, ties to more tokens, then to the longer chunk."""

        def worth(shape):
            tokens = sum(sum(taken(each, shape)) for each in left)
            return tokens / cost(shape), tokens, shape[1]

        return max(self.config.prefill_shapes, key=worth)

    def _enter(self) -> list[list[PrefillRow | None]]:
        entering = self._empty_rows()
        for shard, left, rows in zip(self._shards, self._left(), entering, strict=True):
            r = 0
            for seq, tokens in zip(shard.filling, taken(left, self._shape), strict=False):
                end = seq.prefilled + tokens
                while seq.prefilled < end:
                    count = min(self._shape[1], end - seq.prefilled)
                    final = seq.prefilled + count == seq.target
                    score = seq.score and seq.target == len(seq.prompt)
                    rows[r] = PrefillRow(seq, seq.prefilled, count, final, score, seq.epoch, seq.pages)
                    seq.prefilled += count
                    r += 1
            shard.filling = [seq for seq in shard.filling if seq.prefilled < seq.target]
        return entering

    # Decode

    def _decode_block(self) -> DecodeBlock | None:
        """One block for all rows that can be fed or have a pass in flight; None when paging left no such row."""
        config = self.config
        owners: list[list[Sequence | None]] = []
        keep: list[list[bool]] = []
        busy, full, any_owner = 0, True, False
        for shard in self._shards:
            self._admission.grow(shard)
            shard_owners: list[Sequence | None] = [None] * config.slots
            for seq in shard.residents:
                if seq.state is State.RUNNING:
                    shard_owners[seq.slot] = seq
                    any_owner = True
            owners.append(shard_owners)
        if not any_owner:
            return None
        for shard, shard_owners in zip(self._shards, owners, strict=True):
            epochs = [seq.epoch if seq else 0 for seq in shard_owners]
            keep.append([0 < now == last for now, last in zip(epochs, shard.last_epochs, strict=True)])
            shard.last_epochs = epochs
            fed, carried = [0] * config.stages, [False] * config.stages
            for slot, seq in enumerate(shard_owners):
                if seq is None:
                    continue
                microbatch = slot // config.rows
                steps = min(config.decode_steps, seq.limit - seq.fed)
                fed[microbatch] = max(fed[microbatch], steps)
                carried[microbatch] |= seq.in_flight
                seq.fed += steps
                seq.in_flight = microbatch > 0 and steps == config.decode_steps
                seq.outstanding += 1
            for microbatch, steps in enumerate(fed):
                # The pass that microbatch m enters in the last step does m of its S stage-ticks in the next block.
                last = steps == config.decode_steps
                busy += steps * config.stages - last * microbatch + carried[microbatch] * microbatch
                full &= last
        rows = self._block_rows(owners)
        first_rows = [slot for slot in range(config.slots) if slot % config.rows < rows]
        total = len(self._shards) * config.decode_steps * config.stages**2
        block = Bubble(total - busy, total)
        self.decode_bubble += block
        if full and self._was_full:
            self.steady_bubble += block
        self._was_full = full
        self._entered = 0
        return DecodeBlock(
            config.decode_steps,
            rows,
            [[of_shard[slot] for slot in first_rows] for of_shard in owners],
            [[of_shard[slot] for slot in first_rows] for of_shard in keep],
        )

    def _expected_rows(self) -> int:
        """The row bucket that decoding as many sequences at once takes as should be, if there are so many."""
        unfinished = -(-self._unfinished // len(self._shards))
        return self._covering(-(-min(unfinished, self._admission.batch) // self.config.stages))

    def _covering(self, rows: int) -> int:
        return covering(rows, self.config.rows)

    def _block_rows(self, owners: list[list[Sequence | None]]) -> int:
        """The smallest row bucket in use that covers every owner.

        A new one covers the sequences that are still to come as well, or each step of the way up would compile a
        program. On the way down, as requests end, the wide ones do for a while: `patience` blocks, or fewer the more
        rows nobody uses.
        """
        highest = max(slot % self.config.rows for of_shard in owners for slot, seq in enumerate(of_shard) if seq)
        wanted = self._covering(highest + 1)
        rows = min((bucket for bucket in self._buckets if bucket >= wanted), default=0)
        if rows > wanted:
            self._too_wide += max(1, (rows - wanted) // WIDE)
        if self._fresh or not rows:
            rows = max(wanted, self._expected_rows())
        elif self._too_wide >= self.config.patience:
            rows = wanted
        if rows == wanted:
            self._too_wide = 0
        self._buckets.add(rows)
        self._fresh = False
        return rows
