"""The engine's loop over a scheduler, with a simulated device, for the tests of both its halves."""

import dataclasses
from collections import Counter, deque
from types import SimpleNamespace

from hypothesis import strategies as st

from jaxinfer.engine.scheduler import Scheduler
from jaxinfer.engine.scheduler_config import SchedulerConfig
from jaxinfer.engine.sequence import DecodeBlock, PrefillTick, State
from sim_device import SimDevice, request

BASE = SchedulerConfig(
    shards=1,
    stages=1,
    max_batch=2,
    pages=40,
    page_size=4,
    decode_steps=4,
    prefill_shapes=((1, 8), (2, 4), (4, 2)),
    prefill_ticks=1,
)


def config(rows: int = 2, **changes) -> SchedulerConfig:
    """`rows` of each microbatch."""
    return dataclasses.replace(BASE, **{"max_batch": rows * changes.get("stages", 1)} | changes)


def stops(tokens: list[int], stop: int) -> bool:
    """A token that is a multiple of stop is one (0: none is)."""
    return bool(stop) and any(token % stop == 0 for token in tokens)


def until_stop(tokens: list[int], stop: int) -> list[int]:
    return next((tokens[: n + 1] for n in range(len(tokens)) if stops(tokens[: n + 1], stop)), tokens)


class Engine:
    """The engine's loop with a simulated device: results are completed `depth` dispatches late."""

    def __init__(self, config: SchedulerConfig, depth: int = 1):
        self.scheduler, self.device, self.depth = Scheduler(config), SimDevice(config), depth
        self.pending: deque = deque()
        self.history: list[PrefillTick | DecodeBlock] = []
        self.sequences: list = []
        self.got: dict = {}
        self.idle = 0
        self.entered = 0  # token slots of prefill ticks with new rows since the last decode block

    def add(self, seq) -> None:
        self.scheduler.add(seq)
        self.sequences.append(seq)
        self.got[seq] = []

    def dispatch(self) -> bool:
        decoding = {
            seq: seq.epoch
            for seq in self.sequences
            if seq.state is State.RUNNING and (seq.fed < seq.limit or seq.in_flight)
        }
        dispatch = self.scheduler.schedule()
        if dispatch is None:
            return False
        self.history.append(dispatch)
        self.pending.append((dispatch, self.device.run(dispatch)))
        if isinstance(dispatch, DecodeBlock):
            assert self.device.busy, "a decode block with nothing to do"
            config = self.scheduler.config
            self.idle += config.shards * config.decode_steps * config.stages**2 - self.device.busy
            self.entered = 0
        elif any(row for rows in dispatch.stages[0] for row in rows):
            if any(seq.epoch == epoch for seq, epoch in decoding.items()):
                assert self.entered < self.scheduler.config.prefill_tokens
            self.entered += dispatch.shape[0] * dispatch.shape[1]
        return True

    def complete(self) -> None:
        for seq, new in self.scheduler.complete(*self.pending.popleft()):
            self.got[seq] += new
            assert self.got[seq] == seq.output
            stop = getattr(seq.params, "stop", 0)
            self.got[seq] = list(until_stop(seq.output, stop))
            if stops(seq.output, stop) or len(seq.output) == seq.params.max_new_tokens:
                self.scheduler.finish(seq)

    def step(self) -> None:
        dispatched = self.dispatch()
        assert dispatched or self.pending, "unfinished sequences, and nothing to do for them"
        while len(self.pending) > (self.depth if dispatched else 0):
            self.complete()
        self.check()

    def run(self) -> "Engine":
        for _ in range(5000):
            if not self.scheduler.has_unfinished:
                break
            self.step()
        assert not self.scheduler.has_unfinished, "does not come to an end"
        while self.pending:
            self.complete()
        self.check()
        config = self.scheduler.config
        assert self.scheduler.free_pages == [config.pages - 1] * config.shards
        assert self.scheduler.running == self.scheduler.waiting == 0
        return self

    def check(self) -> None:
        """No page or slot is shared or lost, and everyone is where its state says."""
        config, scheduler = self.scheduler.config, self.scheduler
        pages, slots = [[] for _ in range(config.shards)], set()
        for seq in self.sequences:
            assert (seq.slot >= 0) == (seq.state in (State.PREFILL, State.RUNNING)) == bool(seq.pages)
            if seq.slot >= 0:
                assert seq.slot < config.slots and (seq.shard, seq.slot) not in slots
                slots.add((seq.shard, seq.slot))
                pages[seq.shard] += seq.pages
                assert len(seq.pages) <= config.pages_for(seq.cache_tokens)
        for taken, free in zip(pages, scheduler.free_pages, strict=True):
            assert len(set(taken)) == len(taken) == config.pages - 1 - free
            assert all(0 < page < config.pages for page in taken)
        states = Counter(seq.state for seq in self.sequences)
        assert scheduler.running == states[State.PREFILL] + states[State.RUNNING] == len(slots)
        assert scheduler.waiting == states[State.WAITING]
        assert scheduler.has_unfinished == (states[State.FINISHED] < len(self.sequences))
        assert scheduler.decode_bubble.idle == self.idle


def shapes(budget: int) -> tuple[tuple[int, int], ...]:
    return tuple((rows, budget // rows) for rows in (1, 2, 4))


configs = st.builds(
    SchedulerConfig,
    shards=st.integers(1, 2),
    stages=st.integers(1, 4),
    max_batch=st.integers(1, 20),
    pages=st.integers(5, 16),
    page_size=st.integers(1, 4),
    decode_steps=st.integers(1, 5),
    prefill_shapes=st.sampled_from([shapes(4), shapes(8), shapes(16), ((2, 3),)]),
    prefill_ticks=st.integers(1, 3),
    patience=st.sampled_from([1, 2, 128]),
)


def draw_request(draw, config: SchedulerConfig, uid: int):
    """Any request that a shard can hold."""
    room = (config.pages - 1) * config.page_size
    prompt = draw(st.integers(1, min(room, 24)))
    new = draw(st.integers(0, min(room - prompt + 1, 16)))
    stop = draw(st.sampled_from([0, 0, 5]))
    anew_at = draw(st.sampled_from([None, None, prompt - 1, prompt, prompt + 1, prompt + 3, prompt + new - 1]))
    params = SimpleNamespace(max_new_tokens=new, stop=stop)
    return request(uid, prompt, new, draw(st.integers(0, 3)), params, anew_at)


def expects_little(engine: Engine) -> Engine:
    """After some outputs of one token that could have been longer: others are admitted as if they were so short, too,
    and pages run out."""
    for uid in range(100, 108):
        engine.add(request(uid, 2, 8, params=SimpleNamespace(max_new_tokens=8, stop=1)))
    engine.run()
    engine.history.clear()
    engine.sequences.clear()
    engine.got.clear()
    return engine


def kinds(engine) -> str:
    """One letter per dispatch: P with entering rows, e without, D decode."""
    return "".join(
        "D" if isinstance(each, DecodeBlock) else "P" if any(row for rows in each.stages[0] for row in rows) else "e"
        for each in engine.history
    )
