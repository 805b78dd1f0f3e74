"""Calls that an interrupt or an error leaves halfway: the next one works, and says what it says in a new engine."""

import inspect
import os
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from convert.run import convert
from engine_run import make_engine, run, tokens
from hf_models import make_hf_folder
from jaxinfer import LLM, SamplingParams
from jaxinfer.engine.request import Request
from jaxinfer.inputs import InputRecord

pytestmark = pytest.mark.slow

SMALL = {"max_batch": 4, "prefill_chunk": 16, "decode_steps": 2, "page_size": 8, "pages": 17}
PROMPTS = [[5] * 20, [7, 8, 9], [11] * 12]
PARAMS = SamplingParams(max_new_tokens=12, ignore_eos=True, temperature=1.0, repetition_penalty=1.1, n=2)
CODE = Path(inspect.getfile(LLM)).parent  # what an interrupt may hit


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("interrupts")
    make_hf_folder(folder / "hf", num_hidden_layers=1)
    convert(folder / "hf", folder / "ckpt", quiet=True)
    return folder / "ckpt"


@pytest.fixture(scope="module")
def llm(checkpoint):
    return LLM(checkpoint, dtype="float32", **SMALL)


def answers(llm):
    return [[sample.token_ids for sample in each.samples] for each in llm.generate(PROMPTS, PARAMS)]


@pytest.fixture(scope="module")
def expected(llm):
    return answers(llm)


def as_new(llm, expected):
    assert answers(llm) == expected
    assert llm.engine.scheduler.free_pages == [16]


def test_a_signal_at_any_time(llm, expected):
    inside = False

    def interrupt(number, frame):
        if inside:  # one that comes late would end the tests
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    began = time.perf_counter()
    answers(llm)
    whole, interrupted = time.perf_counter() - began, 0
    try:
        for place in range(20):
            try:
                inside = True
                signal.setitimer(signal.ITIMER_REAL, 1e-5 + 1.1 * whole * place / 20)
                answers(llm)
                inside = False
            except KeyboardInterrupt:
                inside = False
                interrupted += 1
            signal.setitimer(signal.ITIMER_REAL, 0)
            if place % 3 == 0:  # else the next signal comes upon what this one left
                as_new(llm, expected)
    finally:
        signal.signal(signal.SIGALRM, before)
    as_new(llm, expected)
    assert interrupted


class At:
    """Raises KeyboardInterrupt at one line of the project's code, counted from when this is entered."""

    def __init__(self, line):
        self.left = line

    def _trace(self, frame, event, argument):
        if not frame.f_code.co_filename.startswith(str(CODE)):
            return None
        if event == "line":
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt
        return self._trace

    def __enter__(self):
        sys.settrace(self._trace)
        return self

    def __exit__(self, *error):
        sys.settrace(None)


def lines(llm):
    with At(-1) as count:
        answers(llm)
    return -1 - count.left


def interrupt(llm, line):
    with pytest.raises(KeyboardInterrupt), At(line):
        answers(llm)
        raise KeyboardInterrupt  # the line was not reached: how many there are depends on the clock


@pytest.mark.parametrize("places", [25, pytest.param(4000, marks=pytest.mark.long)])
def test_an_interrupt_at_any_line(llm, expected, places):
    total = lines(llm)
    for place in range(places):
        interrupt(llm, 1 + place * total // places)
        if place % 5 == 0:
            as_new(llm, expected)
    as_new(llm, expected)


def test_a_result_that_cannot_be_read(llm, expected):
    """As after an error on the device: what later programs make of it cannot be read either."""
    stream = llm.stream(PROMPTS, PARAMS)
    next(stream)
    llm.engine._in_flight[0][1].emitted.tokens.delete()
    for each in llm.engine._runner._state.k:
        each.delete()
    with pytest.raises(RuntimeError, match="deleted"):
        list(stream)
    as_new(llm, expected)


def test_an_error_of_a_callback(checkpoint, expected):
    calls = 0

    def beat(phase, step, waits):
        nonlocal calls
        calls -= 1
        if calls == 0:
            raise LookupError("no such pulse")

    llm = LLM(checkpoint, dtype="float32", beat=beat, **SMALL)
    for place in (1, 2, 3, 4, 7, 20):
        calls = place
        with pytest.raises(LookupError, match="no such pulse"):
            answers(llm)
    as_new(llm, expected)


def test_the_engine_alone(checkpoint):
    """An error in `step` drops all requests; the counts of the engine's life go on."""
    engine = make_engine(checkpoint, max_batch=2, page_size=8, pages=17)
    prompts = {str(place): prompt for place, prompt in enumerate(PROMPTS)}
    params = SamplingParams(max_new_tokens=100, ignore_eos=True)
    alone = tokens(run(engine, prompts, params))
    before = engine.stats.stage_ticks
    for name, prompt in prompts.items():
        engine.add(Request(name, prompt, params))
    while not engine.step():
        pass
    engine._in_flight[0][1].emitted.tokens.delete()
    with pytest.raises(RuntimeError, match="deleted"):
        engine.step()
    assert not engine.has_unfinished() and engine.abort("0") == []
    assert tokens(run(engine, prompts, params)) == alone
    assert engine.stats.stage_ticks > 2 * before


def test_ctrl_c_while_the_weights_load(checkpoint, expected):
    slow = threading.Event()
    llm = LLM(checkpoint, dtype="float32", wait=False, loading=lambda done, total: slow.wait(60), **SMALL)
    ctrl_c = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))
    ctrl_c.start()
    with pytest.raises(KeyboardInterrupt):
        answers(llm)
    slow.set()
    as_new(llm, expected)


def test_what_is_not_left_stays(llm, expected):
    """A stream that is alive keeps others out, from another thread too; one that is dead does not, nor what it was."""
    stream = llm.stream(PROMPTS, PARAMS)
    next(stream)
    with ThreadPoolExecutor(1) as thread:
        for call in (lambda: answers(llm), lambda: next(llm.stream("a")), lambda: next(llm.updates())):
            with pytest.raises(RuntimeError, match="3 requests of this LLM are unfinished"):
                thread.submit(call).result()
    assert len({update.request_id for update in stream}) == 3
    as_new(llm, expected)
    llm.add(InputRecord(1, "x", "prompt_token_ids", [5], PARAMS))
    with pytest.raises(RuntimeError, match="1 requests of this LLM are unfinished"):
        answers(llm)
    assert sum(update.output is not None for update in llm.updates()) == 2
    as_new(llm, expected)
