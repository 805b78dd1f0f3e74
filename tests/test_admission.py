import dataclasses
from collections import deque

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxinfer.engine.scheduler import Scheduler
from jaxinfer.engine.sequence import DecodeBlock, PrefillTick, State
from scheduling import Engine, config, configs, draw_request, expects_little, kinds
from sim_device import alone, request


@pytest.mark.parametrize("stages", [1, 3])
def test_hundreds_of_requests_through_few_pages(stages):
    engine = Engine(config(stages=stages, shards=2, rows=4, pages=12, prefill_ticks=2))
    for uid in range(200):
        engine.add(request(uid, 1 + uid * 7 % 23, uid * 5 % 20, seed=uid))
    engine.run()
    assert engine.scheduler.preemptions > 0
    for seq, got in engine.got.items():
        assert got == alone(seq, stages)


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
    engine = expects_little(Engine(config(rows=3, pages=9, prefill_ticks=4)))
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
    engine = Engine(config(shards=2, stages=2, rows=1, pages=20, page_size=2, **shape))
    engine.scheduler._admission._surely_carries = lambda place, seq: True  # or it would hardly ever come to this
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


@pytest.mark.parametrize("stages", [1, 2])
def test_what_is_computed_anew_keeps_its_slot_though_others_wait(stages):
    engine = Engine(config(stages=stages, rows=1, pages=24))
    for uid in range(8):
        engine.add(request(uid, 1 + uid, 20, anew_at=9))
    admissions = set()
    while engine.scheduler.has_unfinished:
        engine.step()
        admissions |= {(seq.uid, seq.epoch) for seq in engine.sequences if seq.epoch}
    assert len(admissions) == 8 and engine.scheduler.preemptions == 0
    for seq, got in engine.got.items():
        assert got == alone(seq, stages)


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


def offline(outputs, limits, pages, max_batch=64):
    """All requests there from the start, prompts of 16 to 128 tokens; outputs stop at their lengths, which nobody knows
    before. Returns the share of all tokens that were prefilled again, and of pages in use while some wait."""
    settings = {"pages": pages, "page_size": 16, "decode_steps": 8, "prefill_shapes": ((4, 64),), "prefill_ticks": 8}
    scheduler, in_flight, used, entered = Scheduler(config(max_batch=max_batch, **settings)), deque(), [], 0
    left = {}
    for uid, (output, limit) in enumerate(zip(outputs, limits, strict=True)):
        seq = request(uid, 16 + uid * 37 % 113, limit)
        left[seq] = output
        scheduler.add(seq)
    while scheduler.has_unfinished:
        dispatch = scheduler.schedule()
        if isinstance(dispatch, PrefillTick):
            rows = dispatch.stages[0][0]
            entered += sum(row.count for row in rows if row)
            in_flight.append((dispatch, [[7 if row and row.final else -1 for row in rows]]))
        elif dispatch is not None:
            steps = [[[7 if seq and seq.fed - seq.limit < 8 else -1 for seq in dispatch.owners[0]]]] * 8
            in_flight.append((dispatch, steps))
        if dispatch is not None and scheduler.waiting:
            used.append(1 - scheduler.free_pages[0] / (pages - 1))
        while len(in_flight) > (dispatch is not None):
            for seq, _ in scheduler.complete(*in_flight.popleft()):
                if len(seq.output) >= left[seq] or len(seq.output) == seq.params.max_new_tokens:
                    scheduler.finish(seq)
    prompts = sum(len(seq.prompt) for seq in left)
    return (entered - prompts) / (prompts + sum(outputs)), sum(used) / len(used)


def drawn(kind: str, count: int = 400) -> list[int]:
    rng = np.random.default_rng(0)
    if kind == "long tail":
        return np.clip(rng.lognormal(4, 0.8, count), 1, 400).astype(int).tolist()
    return [200 if long else 10 for long in rng.random(count) < 0.3]


@pytest.mark.parametrize("pages", [120, 600])
@pytest.mark.parametrize("kind", ["long tail", "short or long"])
def test_little_is_prefilled_twice_though_nobody_knows_when_outputs_end(kind, pages):
    outputs = drawn(kind)
    again, used = offline(outputs, [400] * len(outputs), pages, max_batch=512)
    assert again < 0.01
    assert used > 0.6


@pytest.mark.parametrize("pages", [120, 600])
def test_nothing_is_prefilled_twice_where_lengths_are_known_and_the_cache_is_used(pages):
    outputs = [20 + uid * 7 % 180 for uid in range(400)]
    again, used = offline(outputs, outputs, pages, max_batch=512)
    assert again == 0
    assert used > 0.85


@pytest.mark.parametrize("guessing", [False, True])
def test_a_cache_for_all_takes_all_at_once(guessing):
    """As many whole contexts as `max_batch`: whatever the outputs do, the pages suffice."""
    engine = Engine(config(max_batch=64, pages=64 * 5 + 1, page_size=16, prefill_shapes=((64, 16),), prefill_ticks=4))
    if guessing:
        expects_little(engine)
    for uid in range(64):
        engine.add(request(uid, 48, 33))
    engine.dispatch()
    assert engine.scheduler.running == 64


def test_rounds_are_of_equal_size_where_many_rows_gain_little():
    """The pages carry 600 at once. A first round of 600 would leave a second one of 424, at as many steps."""
    scheduler = Scheduler(config(max_batch=1024, pages=600 * 12, page_size=16, prefill_shapes=((64, 32),)))
    for uid in range(1024):
        scheduler.add(request(uid, 100, 85))
    scheduler.schedule()
    assert scheduler.running == 512


def test_what_runs_grows_with_what_the_pages_carry():
    """Small rounds gain nothing: up to 256 rows cost the same time in a step."""
    scheduler = Scheduler(config(max_batch=1024, pages=200 * 12, page_size=16, prefill_shapes=((64, 32),)))
    for uid in range(250):
        scheduler.add(request(uid, 100, 85))
    scheduler.schedule()
    assert 190 <= scheduler.running <= 200


@pytest.mark.parametrize(("stages", "batch"), [(2, 1), (2, 3), (4, 2), (3, 7)])
def test_no_more_are_in_work_at_once_than_max_batch(stages, batch):
    engine = Engine(config(stages=stages, max_batch=batch, pages=400))
    for uid in range(3 * batch):
        engine.add(request(uid, 5, 9))
    most = 0
    while engine.scheduler.has_unfinished:
        engine.step()
        most = max(most, engine.scheduler.running)
    assert most == batch


def test_one_request_at_a_time_under_a_pipeline_is_never_preempted():
    """The cache is made for one of them; two at once, one in each microbatch, would take turns."""
    engine = Engine(config(stages=2, max_batch=1, pages=11))
    for uid in range(2):
        engine.add(request(uid, 10, 30))
    engine.run()
    assert engine.scheduler.preemptions == 0
    tokens = sum(row.count for each in engine.history if isinstance(each, PrefillTick)
                 for row in each.stages[0][0] if row)  # fmt: skip
    assert tokens == 20
