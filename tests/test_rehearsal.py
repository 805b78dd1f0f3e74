"""What a rehearsal says of a scheduler is what it does with a device, pages and all; the device is a simulated one."""

import random
from types import SimpleNamespace

import pytest

from jaxinfer.engine.rehearsal import rehearse
from jaxinfer.engine.sequence import DecodeBlock
from scheduling import Engine, config
from sim_device import request

SETTINGS = [
    {},
    {"stages": 2, "rows": 2},
    {"stages": 3, "rows": 3, "shards": 2, "prefill_ticks": 2},
    {"stages": 2, "rows": 4, "pages": 14},  # preempts
    {"rows": 20, "pages": 60, "max_batch": 20},
]


def seen(dispatch):
    """All that a program's choice and arrays follow from."""

    def of(seq):
        return seq and (seq.uid, seq.pages, seq.slot)

    if isinstance(dispatch, DecodeBlock):
        return dispatch.rows, [[of(seq) for seq in owners] for owners in dispatch.owners], dispatch.keep
    row = lambda row: row and (row.seq.uid, row.start, row.count, row.final, row.score, row.pages)  # noqa: E731
    return dispatch.shape, [[[row(each) for each in rows] for rows in stage] for stage in dispatch.stages]


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("anew_at", [None, 12])
def test_a_rehearsal_is_what_then_happens(settings, anew_at):
    draw = random.Random(3)
    made = config(**settings)
    sequences = []
    for uid in range(14):
        prompt, new = draw.randrange(1, 18), draw.choice([0, 1, 2, 7, 30])
        params = SimpleNamespace(max_new_tokens=new)
        sequences.append(request(uid, prompt, new, params=params, anew_at=anew_at if prompt <= 12 else None))
    expected = [seen(each) for each in rehearse(made, sequences)]
    engine = Engine(made)
    for seq in sequences:
        engine.add(seq)
    happened = []
    while engine.scheduler.has_unfinished:
        before = len(engine.history)
        dispatched = engine.dispatch()
        happened += [seen(each) for each in engine.history[before:]]
        while len(engine.pending) > (1 if dispatched else 0):
            engine.complete()
            if not dispatched:
                break
    assert happened == expected
    assert (settings.get("pages") != 14 or engine.scheduler.preemptions) and len(happened) > 10
