"""Who is to blame: ranks that wait are not, while somebody else can be."""

import signal

from jaxinfer.cluster.pulse import Limits
from jaxinfer.cluster.verdict import Rank, judge

LIMITS = Limits(dead=10, stuck=60, load=300, compile=600)


def rank(place: int, **known) -> Rank:
    return Rank(place, 4, f"node{place}", "GPU 0: X", **{"silent": 0.1, "phase": "decode", "step": 7, **known})


def blamed(*ranks: Rank) -> tuple[int, ...] | None:
    verdict = judge(ranks, LIMITS)
    return verdict and verdict.ranks


def test_all_is_well():
    assert blamed(rank(0, age=59), rank(1, age=59, waits=True)) is None
    assert blamed(rank(0, phase="load", age=299), rank(1, phase="compile", age=599)) is None
    assert blamed(rank(0, ended=0, silent=0), rank(1)) is None


def test_who_waits_for_a_busy_rank_is_not_late():
    assert blamed(rank(0, age=200, waits=True), rank(1, phase="load", age=200)) is None
    assert blamed(rank(0, age=302, waits=True), rank(1, phase="load", age=302)) == (1,)
    assert blamed(rank(0, age=62, waits=True), rank(1, age=62)) == (1,)


def test_when_all_wait_the_one_behind_is_to_blame():
    assert blamed(rank(0, step=8, age=62, waits=True), rank(1, step=7, age=62, waits=True)) == (1,)
    assert blamed(rank(0, age=62, waits=True), rank(1, age=62, waits=True)) == (0, 1)
    # one that has just begun to wait may still be served
    assert blamed(rank(0, age=62, waits=True), rank(1, age=5, waits=True)) is None
    # the others are done: whom does it wait for?
    assert blamed(rank(0, ended=0), rank(1, age=62, waits=True)) == (1,)


def test_a_stopped_process_is_the_plainest_cause():
    ranks = (rank(0, step=6, age=62, waits=True), rank(1, age=62, waits=True, state="T"), rank(2, age=62))
    assert blamed(*ranks) == (1,)
    assert judge(ranks, LIMITS).stuck


def test_texts_name_rank_host_gpu_phase_and_step():
    stuck = judge([rank(2, age=62)], LIMITS).text
    assert stuck == (
        "rank 2/4 on node2 (GPU 0: X) is stuck in decode, step 7: no progress for 62 s (bound 60 s, --stuck-s)"
    )
    assert "--load-stuck-s" in judge([rank(2, phase="load", age=302)], LIMITS).text
    killed = judge([rank(1, ended=-signal.SIGKILL, memory="by hand")], LIMITS)
    assert killed.text == "rank 1/4 on node1 (GPU 0: X) died in decode, step 7: killed by signal 9 (SIGKILL); by hand"
    assert judge([rank(1, silent=9, age=65)], LIMITS) is None  # it may have made progress since its last word
    assert "no sign of life for 11 s" in judge([rank(1, silent=11)], LIMITS).text


def test_an_error_that_may_follow_waits_for_its_cause():
    follows = rank(0, ended=1, follows=True, failure="Connection closed by peer", ended_for=1)
    assert blamed(follows, rank(1)) is None
    assert blamed(follows, rank(1, ended=-signal.SIGKILL, ended_for=0.5)) == (1,)
    assert blamed(follows, rank(1, ended=1, failure="ValueError", ended_for=0.5)) == (1,)
    assert blamed(follows, rank(1, lost=True)) == (1,)
    follows.ended_for = 3
    assert blamed(follows, rank(1)) == (0,)


def test_the_first_failure_counts_and_the_user_s_own_has_its_status():
    first, second = rank(3, ended=1, failure="A", ended_for=2), rank(1, ended=1, failure="B", ended_for=1)
    assert blamed(second, first) == (3,)
    verdict = judge([rank(1, ended=2, failure="x.jsonl: missing", phase="load")], LIMITS)
    assert verdict.status == 2
    assert verdict.text == "error: x.jsonl: missing (rank 1/4 on node1 (GPU 0: X), in load)"
