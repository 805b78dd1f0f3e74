import dataclasses
from collections import Counter, deque
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from jaxinfer.engine.scheduler import Scheduler, SchedulerConfig
from jaxinfer.engine.sequence import DecodeBlock, PrefillTick, State
from sim_device import SimDevice, alone, request

BASE = SchedulerConfig(
    shards=1,
    stages=1,
    rows=2,
    pages=40,
    page_size=4,
    decode_steps=4,
    prefill_shapes=((1, 8), (2, 4), (4, 2)),
    prefill_ticks=1,
)


def config(**changes) -> SchedulerConfig:
    return dataclasses.replace(BASE, **changes)


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
    rows=st.sampled_from([1, 2, 3, 5]),
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
    return request(uid, prompt, new, draw(st.integers(0, 3)), SimpleNamespace(max_new_tokens=new, stop=stop))


@settings(max_examples=150, deadline=None)
@given(st.data(), configs, st.integers(1, 3))
def test_every_request_gets_the_tokens_that_it_gets_alone(data, config, depth):
    engine = Engine(config, depth)
    for uid in range(data.draw(st.integers(1, 12))):
        engine.add(draw_request(data.draw, config, uid))
        for _ in range(data.draw(st.sampled_from([0, 0, 1, 3]))):
            if engine.scheduler.has_unfinished:
                engine.step()
    engine.run()
    for seq, got in engine.got.items():
        assert got == until_stop(alone(seq, config.stages), seq.params.stop), seq.request_id


class AnyOrder(RuleBasedStateMachine):
    """Requests come, stop and are given up at any moment; dispatches and completions alternate in any way."""

    @initialize(config=configs)
    def start(self, config):
        self.engine = Engine(config)
        self.given_up = set()

    @rule(data=st.data())
    def add(self, data):
        engine = self.engine
        engine.add(draw_request(data.draw, engine.scheduler.config, len(engine.sequences)))

    @rule(times=st.integers(1, 6))
    def step(self, times):
        for _ in range(times):
            if self.engine.scheduler.has_unfinished:
                self.engine.step()

    @rule()
    def dispatch(self):
        if len(self.engine.pending) < 4:
            self.engine.dispatch()

    @precondition(lambda self: self.engine.pending)
    @rule()
    def complete(self):
        self.engine.complete()

    @precondition(lambda self: self.engine.sequences)
    @rule(data=st.data(), abort=st.booleans())
    def give_up(self, data, abort):
        seq = data.draw(st.sampled_from(self.engine.sequences))
        if seq.state is not State.FINISHED:
            self.given_up.add(seq)
        (self.engine.scheduler.abort if abort else self.engine.scheduler.finish)(seq)

    @invariant()
    def consistent(self):
        if hasattr(self, "engine"):
            self.engine.check()

    def teardown(self):
        if not hasattr(self, "engine"):
            return
        self.engine.run()
        for seq, got in self.engine.got.items():
            expected = until_stop(alone(seq, self.engine.scheduler.config.stages), seq.params.stop)
            assert got == (expected[: len(got)] if seq in self.given_up else expected), seq.request_id


AnyOrder.TestCase.settings = settings(max_examples=80, stateful_step_count=30, deadline=None)
test_any_order_of_events = AnyOrder.TestCase


@pytest.mark.parametrize("stages", [1, 3])
def test_hundreds_of_requests_through_few_pages(stages):
    engine = Engine(config(stages=stages, shards=2, rows=4, pages=12, prefill_ticks=2))
    for uid in range(200):
        engine.add(request(uid, 1 + uid * 7 % 23, uid * 5 % 20, seed=uid))
    engine.run()
    assert engine.scheduler.preemptions > 0
    for seq, got in engine.got.items():
        assert got == alone(seq, stages)


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("stages", [1, 2, 3, 4])
def test_no_stage_idles_once_there_are_as_many_sequences_as_microbatches(stages, shards):
    engine = Engine(config(stages=stages, shards=shards, rows=3, pages=200))
    for uid in range(stages * shards):
        engine.add(request(uid, 3 + uid, 400))
    for _ in range(10 * stages):
        engine.dispatch()
    blocks, before = 0, engine.idle
    for _ in range(8):
        assert engine.dispatch()
        blocks += isinstance(engine.history[-1], DecodeBlock)
    steady = engine.scheduler.steady_bubble
    assert (blocks, engine.idle, steady.idle) == (8, before, 0)
    assert steady.total >= 8 * shards * 4 * stages**2


def test_filling_and_emptying_the_pipeline_count_as_bubble():
    engine = Engine(config(stages=2, decode_steps=2))
    for uid in range(2):
        engine.add(request(uid, 2, 3))
    engine.run()
    # Of 8 stage-ticks a block: the first lacks the fill, the second has only the last pass of microbatch 1.
    assert [type(each).__name__ for each in engine.history[-2:]] == ["DecodeBlock"] * 2
    assert (engine.scheduler.decode_bubble.idle, engine.scheduler.decode_bubble.total) == (1 + 7, 16)
    assert engine.scheduler.steady_bubble.total == 0
    # Two prefill ticks of two stages: the empty one has its first stage idle, the first its second.
    assert (engine.scheduler.prefill_bubble.idle, engine.scheduler.prefill_bubble.total) == (2, 4)


def test_microbatches_are_loaded_evenly_and_shards_by_free_pages():
    scheduler = Scheduler(config(shards=2, stages=3, rows=4))
    sequences = [request(uid, 4, 4) for uid in range(14)]
    for seq in sequences:
        scheduler.add(seq)
    scheduler.schedule()
    assert [seq.shard for seq in sequences] == [0, 1] * 7
    assert [seq.slot for seq in sequences[::2]] == [0, 4, 8, 1, 5, 9, 2]
    long, short = request(14, 40, 4), request(15, 4, 4)
    for seq in (long, short):
        scheduler.add(seq)
    scheduler.schedule()
    assert (long.shard, short.shard) == (0, 1)


@pytest.mark.parametrize(("new", "state"), [(1, State.PREFILL), (2, State.WAITING)])
def test_admission_leaves_pages_for_one_block_of_everyone(new, state):
    """Of 9 pages the first takes 3 and may ask for 4 in a block; the second takes 2, and asks for 1 with new=2."""
    scheduler = Scheduler(config(pages=10, page_size=1, stages=2))
    first, second = request(0, 3, 9 - 3), request(1, 2, new)
    scheduler.add(first)
    scheduler.add(second)
    scheduler.schedule()
    assert (first.state, second.state) == (State.PREFILL, state)
    scheduler.finish(first)
    scheduler.schedule()
    assert second.state is not State.WAITING


def test_the_head_of_the_queue_is_not_overtaken():
    engine = Engine(config(rows=4, pages=9, prefill_ticks=4))
    first, big, small = request(0, 12, 8), request(1, 28, 4), request(2, 2, 2)
    for seq in (first, big, small):
        engine.add(seq)
    while big.state is State.WAITING:
        engine.step()
        assert small.state is State.WAITING
    engine.run()
    assert engine.scheduler.preemptions == 0


def test_the_latest_arrival_gives_way_and_comes_back_first():
    engine = Engine(config(rows=3, pages=9, prefill_ticks=4))
    old, young, later = request(0, 8, 20), request(1, 8, 20), request(2, 20, 2)
    for seq in (old, young, later):
        engine.add(seq)
    admissions = set()
    while engine.scheduler.has_unfinished:
        engine.step()
        admissions |= {(seq.uid, seq.epoch) for seq in engine.sequences if seq.epoch}
    engine.run()
    assert engine.scheduler.preemptions >= 1
    uids = [uid for uid, _ in sorted(admissions, key=lambda each: each[1])]
    assert uids.count(0) == 1, "the earliest arrival was preempted"
    assert uids.count(1) >= 2 and uids[-1] == 2 and uids.count(2) == 1, "the queue was overtaken"


def test_a_row_that_gives_way_to_a_prompt_still_in_prefill():
    """An early arrival that gave its pages back comes to the other shard, whose decoding row, a later one, then gives
    way to it: there is no block to send while the early one is still in prefill."""
    shape = {"prefill_shapes": ((3, 2),), "prefill_ticks": 1}
    engine = Engine(config(shards=2, stages=2, rows=1, pages=20, page_size=2, decode_steps=4, **shape))
    aborted = request(1, 2, 21)
    events = [(0, 4, 20), None, None, aborted, (2, 4, 17), None, None, (3, 17, 6), False, (4, 4, 19), (5, 13, 10)]
    for event in events:
        if event is None:
            engine.step()
        elif event is False:
            engine.scheduler.finish(aborted)
        else:
            engine.add(event if event is aborted else request(*event))
    engine.add(request(6, 16, 3))
    engine.run()
    assert "DPPPeD" in kinds(engine), "a tick is sent in place of the block"
    for seq in engine.sequences:
        assert seq is aborted or engine.got[seq] == alone(seq, 2)


def test_a_prompt_takes_as_many_rows_as_it_fills():
    """Little of a tick is empty: each prompt leaves less than one row, and few tokens do not take a large tick."""
    shapes = ((2, 512), (32, 32), (8, 32))
    engine = Engine(config(rows=8, pages=2000, prefill_shapes=shapes))
    for uid, length in enumerate((100, 33, 700, 400)):
        engine.add(request(uid, length, 1))
    for _ in range(3):
        engine.dispatch()
    entered = [[(row.seq.uid, row.start, row.count) for row in each.stages[0][0] if row] for each in engine.history]
    assert [each.shape for each in engine.history] == [(32, 32), (8, 32), (8, 32)]
    assert entered[0][:7] == [(0, 0, 32), (0, 32, 32), (0, 64, 32), (0, 96, 4), (1, 0, 32), (1, 32, 1), (2, 0, 32)]
    assert len(entered[0]) == 32
    engine.run()
    for seq in engine.sequences:
        assert engine.got[seq] == alone(seq, 1)


@settings(max_examples=60, deadline=None)
@given(st.data(), configs)
def test_the_earliest_arrival_is_admitted_once(data, config):
    engine = Engine(dataclasses.replace(config, shards=1))
    for uid in range(8):
        engine.add(draw_request(data.draw, engine.scheduler.config, uid))
    first, epochs = engine.sequences[0], set()
    while first.state is not State.FINISHED:
        engine.step()
        epochs.add(first.epoch)
    assert len(epochs - {0}) == 1


def widths(engine) -> list[int]:
    """Rows per microbatch of the decode blocks so far, repetitions left out."""
    rows = [dispatch.rows for dispatch in engine.history if isinstance(dispatch, DecodeBlock)]
    return [each for at, each in enumerate(rows) if at == 0 or each != rows[at - 1]]


@pytest.mark.parametrize("patience, expected", [(100, [16]), (2, [16, 4, 1])])
def test_decode_blocks_narrow_when_that_pays(patience, expected):
    engine = Engine(config(stages=2, rows=20, pages=400, prefill_ticks=20, patience=patience))
    for uid in range(20):
        engine.add(request(uid, 4, 84 - 4 * uid))
    engine.run()
    assert widths(engine) == expected, "no program per step of the way up, and few on the way down"
    for uid in range(20, 22):
        engine.add(request(uid, 4, 20))
    engine.run()
    assert widths(engine)[-1] == 1, "new work has the rows that it needs at once"
    for seq, got in engine.got.items():
        assert got == alone(seq, 2)


def kinds(engine) -> str:
    """One letter per dispatch: P with entering rows, e without, D decode."""
    return "".join(
        "D" if isinstance(each, DecodeBlock) else "P" if any(row for rows in each.stages[0] for row in rows) else "e"
        for each in engine.history
    )


def test_a_lone_request_takes_no_dispatch_too_many():
    engine = Engine(config(stages=3))
    engine.add(request(0, 20, 9))  # 3 chunks, then 8 tokens to feed
    engine.run()
    assert kinds(engine) == "PPPeeDD"


def test_a_last_pass_in_flight_gets_one_more_block():
    engine = Engine(config(stages=2))
    for uid in range(2):
        engine.add(request(uid, 3, 5))
    engine.run()
    assert kinds(engine) == "PeDD"


def test_slot_and_pages_are_free_once_all_passes_are_dispatched():
    scheduler = Scheduler(config())
    seq = request(0, 4, 5)
    scheduler.add(seq)
    first, block = scheduler.schedule(), scheduler.schedule()
    assert isinstance(block, DecodeBlock) and block.owners[0][0] is seq and seq.slot == 0
    assert scheduler.schedule() is None
    assert seq.state is State.DRAINED and scheduler.free_pages == [39]
    assert scheduler.complete(first, [[7]]) == [(seq, [7])]
    assert block.rows == 1, "one request needs no second row"
    assert scheduler.complete(block, [[[token]] for token in range(4)]) == [(seq, [0, 1, 2, 3])]
    assert seq.output == [7, 0, 1, 2, 3]
    scheduler.finish(seq)
    assert not scheduler.has_unfinished


def test_prefill_leaves_room_for_decoding():
    engine = Engine(config(rows=4, prefill_ticks=2))
    engine.add(request(0, 4, 30))
    for _ in range(2):
        engine.step()
    engine.add(request(1, 36, 4))
    for _ in range(9):
        engine.step()
    assert kinds(engine) == "PDPPDPPDPDD"
    engine.run()


def test_without_decoding_prefill_goes_on():
    engine = Engine(config(rows=4, prefill_ticks=1, stages=2))
    engine.add(request(0, 36, 4))
    engine.run()
    assert kinds(engine) == "PPPPPeD"


@pytest.mark.parametrize(
    ("prompts", "shape"),
    [
        ([8], (1, 8)),
        ([3], (1, 8)),  # (2, 4) takes as many: ties go to the longest chunk
        ([2, 2, 2, 2], (4, 2)),
        ([4, 4], (2, 4)),
        ([8, 2, 2, 2], (1, 8)),
        ([9, 9, 9, 9], (1, 8)),
    ],
)
def test_the_shape_that_takes_most_tokens_is_chosen(prompts, shape):
    scheduler = Scheduler(config(rows=8))
    for uid, length in enumerate(prompts):
        scheduler.add(request(uid, length, 2))
    assert scheduler.schedule().shape == shape


def test_a_shape_is_changed_when_it_pays_and_the_pipeline_is_empty_then():
    engine = Engine(config(stages=3, rows=20, prefill_ticks=9))
    engine.add(request(0, 8, 2))
    engine.dispatch()
    for uid in range(1, 25):
        engine.add(request(uid, 2, 2))
    for _ in range(4):
        engine.dispatch()
    assert [each.shape for each in engine.history] == [(1, 8)] * 3 + [(4, 2)] * 2
    assert kinds(engine) == "PeePP"


@pytest.mark.parametrize(("short", "expected"), [(1, [(1, 8)] * 3), (2, [(1, 8), (4, 2)])])
def test_a_shape_stays_while_emptying_the_pipeline_costs_more(short, expected):
    """Of (1, 8) one token is left, and `short` prompts of 2: one sequence a tick, or after two empty ticks all at
    once. With 5 tokens left that is fewer ticks, with 3 it is not."""
    engine = Engine(config(stages=3, rows=4, prefill_ticks=9))
    engine.add(request(0, 9, 2))
    engine.dispatch()
    for uid in range(1, short + 1):
        engine.add(request(uid, 2, 2))
    for _ in range(6):
        engine.dispatch()
    ticks = [each for each in engine.history if isinstance(each, PrefillTick)]
    entering = [tick.shape for tick in ticks if any(tick.stages[0][0])]
    assert entering == expected


def test_what_no_shard_can_hold_is_refused():
    scheduler = Scheduler(config(pages=5))
    scheduler.add(request(0, 10, 7))  # the last token never enters the cache
    with pytest.raises(ValueError, match="10 prompt tokens and 8 new tokens need 5 pages of 4 tokens, a shard has 4"):
        scheduler.add(request(1, 10, 8))
    with pytest.raises(ValueError, match="the prompt has 0 tokens"):
        scheduler.add(request(2, 0, 8))
    with pytest.raises(ValueError, match="max_new_tokens: found -1"):
        scheduler.add(request(3, 3, -1))
    assert scheduler.waiting == 1


@pytest.mark.parametrize("new", [0, 1])
def test_a_request_that_only_prefills(new):
    engine = Engine(config(stages=2))
    engine.add(request(0, 11, new))
    engine.run()
    assert len(engine.got[engine.sequences[0]]) == new
    assert "D" not in kinds(engine)


def test_results_out_of_order_and_lost_tokens_are_errors():
    scheduler = Scheduler(config())
    seq = request(0, 4, 3)
    scheduler.add(seq)
    tick, block = scheduler.schedule(), scheduler.schedule()
    nothing = [[[-1]]] * 4
    with pytest.raises(RuntimeError, match="in the order of dispatch"):
        scheduler.complete(block, nothing)
    scheduler.complete(tick, [[7]])
    assert scheduler.schedule() is None
    with pytest.raises(RuntimeError, match="returned 1 of 3 tokens"):
        scheduler.complete(block, nothing)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": 0}, "rows: found 0"),
        ({"pages": 1}, "pages: found 1"),
        ({"prefill_shapes": ()}, "prefill_shapes: found"),
        ({"prefill_shapes": ((1, 8), (0, 8))}, "prefill_shapes: found"),
    ],
)
def test_a_bad_setting_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        config(**changes)
