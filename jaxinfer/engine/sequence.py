"""What the scheduler, the engine loop and the runner tell each other: sequences and dispatches."""

import enum
from dataclasses import dataclass, field
from typing import Any


class State(enum.Enum):
    WAITING = enum.auto()  # in the queue: new, or preempted
    PREFILL = enum.auto()  # holds a slot and pages; its last chunk has not left the last stage yet, or not even its
    #                        first one entered, where it is computed anew and its last tokens are not known yet
    RUNNING = enum.auto()  # decodes, or its last pass is still in the pipeline
    DRAINED = enum.auto()  # all that can make its tokens is dispatched; slot and pages are free, results are awaited
    FINISHED = enum.auto()


@dataclass(eq=False)
class Sequence:
    """One sample of one request. The engine owns the first block of fields, the scheduler all others."""

    uid: int
    request_id: str
    index: int  # which of the request's n samples
    prompt: tuple[int, ...]
    params: Any  # has max_new_tokens; the rest is not the scheduler's business
    seed: int
    score: bool = False  # prompt logprobs are wanted
    anew_at: int | None = None  # a token at this position needs all before it computed anew (see ops/rope.py)
    output: list[int] = field(default_factory=list)  # appended to by Scheduler.complete only

    state: State = State.WAITING
    arrival: int = -1  # rank of its Scheduler.add among all
    epoch: int = 0  # number of the admission that gave it its slot, unique among all admissions; 0: holds no slot
    shard: int = -1
    slot: int = -1  # m * rows + b inside its shard, for microbatch m
    pages: tuple[int, ...] = ()  # block table; replaced, never changed in place, so that a reference is a snapshot
    target: int = 0  # tokens that its prefill covers: prompt and the output known at admission, or when begun anew
    prefilled: int = 0  # tokens of target in chunks dispatched so far
    fed: int = 0  # while RUNNING: the device's pos[slot] after all that is dispatched
    in_flight: bool = False  # its last pass leaves the pipeline in the next decode block (never so in microbatch 0)
    outstanding: int = 0  # dispatches not completed yet that carry results of it

    @property
    def tokens(self) -> tuple[int, ...]:
        return (*self.prompt, *self.output)

    @property
    def end(self) -> int:
        """The position of the last new token, which is sampled and never enters the cache."""
        return len(self.prompt) + self.params.max_new_tokens - 1

    @property
    def limit(self) -> int:
        """Its row is fed while pos < limit: up to its end, or to where it is computed anew."""
        if self.anew_at is None or self.target > self.anew_at:
            return self.end
        return min(self.end, self.anew_at)

    @property
    def cache_tokens(self) -> int:
        """The most tokens that its cache ever holds."""
        return max(len(self.prompt), self.end)


@dataclass(frozen=True)
class PrefillRow:
    """Tokens start .. start+count of seq.tokens, in one row of a prefill tick."""

    seq: Sequence
    start: int
    count: int
    final: bool  # covers the last of the tokens to prefill: sampled from, and token[slot], pos[slot] set, at its exit
    score: bool  # prompt logprobs are wanted, and not known from a prefill before, of the prompt alone
    epoch: int  # seq.epoch at entry; another value there now means that the row is stale
    pages: tuple[int, ...]  # block table, covers at least start + count tokens


@dataclass(eq=False)
class PrefillTick:
    """One prefill tick over all stages. The slot of a row is row.seq.slot, as it stands at dispatch."""

    shape: tuple[int, int]  # (R, C)
    stages: list[list[list[PrefillRow | None]]]  # [S][D][R]: index 0 enters now, index S-1 exits now; stale rows: None


@dataclass(frozen=True)
class Ahead:
    """What sequences that wait will probably need; a wrong guess costs time only."""

    prefills: list[tuple[tuple[int, int], int]]  # (R, C) of ticks, and tokens of their longest block table
    score: bool  # some of those score
    rows: int  # row bucket of decode blocks; 0: there will be none
    decodes: tuple[int, int]  # tokens of their longest block table, at first and at last


@dataclass(eq=False)
class DecodeBlock:
    """K decode steps over the first `rows` rows of each microbatch; b rows are m * rows to (m + 1) * rows - 1 below. A
    row's block table and limit are owner.pages and owner.limit at dispatch.

    An owner that reached its limit is there for its pass in flight only; the device's pos < limit keeps it from being
    fed, so active[slot] = owners[slot] is not None.
    """

    steps: int
    rows: int  # a row bucket: covers every row that decodes or has a pass in flight
    owners: list[list[Sequence | None]]  # [D][M * rows]
    keep: list[list[bool]]  # [D][M * rows]: the same admission of the same sequence owned the slot in the block before
