import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from jaxinfer.engine.scheduler import Scheduler
from jaxinfer.engine.sequence import DecodeBlock, PrefillTick, State
from scheduling import Engine, config, configs, draw_request, kinds, until_stop
from sim_device import alone, request


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


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("stages", [1, 2, 3, 4])
def test_no_stage_idles_once_there_are_as_many_sequences_as_microbatches(stages, shards):
    engine = Engine(config(stages=stages, shards=shards, rows=3, pages=1000))
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


@pytest.mark.parametrize("anew_at", [None, 3, 9])
def test_what_a_request_needs_is_foreseen(anew_at):
    engine = Engine(config())
    engine.add(request(0, 4, 12, anew_at=anew_at))
    ahead = engine.scheduler.ahead()
    engine.run()
    ticks = [each for each in engine.history if isinstance(each, PrefillTick)]
    used = [(tick.shape, row.seq.target) for tick in ticks for row in tick.stages[0][0] if row]
    assert {shape for shape, _ in ahead.prefills} >= {tick.shape for tick in ticks}
    assert (
        max(tokens for _, tokens in ahead.prefills) == max(length for _, length in used) == (10 if anew_at == 9 else 4)
    )
    assert (ahead.rows, ahead.decodes) == (1, (8, 15))


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
        ({"max_batch": 0}, "max_batch: found 0"),
        ({"pages": 1}, "pages: found 1"),
        ({"prefill_shapes": ()}, "prefill_shapes: found"),
        ({"prefill_shapes": ((1, 8), (0, 8))}, "prefill_shapes: found"),
    ],
)
def test_a_bad_setting_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        config(**changes)
