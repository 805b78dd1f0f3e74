"""How the doctor's ranks meet: who comes, who is refused, who goes, and a port that another program has."""

import contextlib
import json
import socket
import struct
import threading
import time

import attrs
import pytest

from jaxinfer.cluster.gather import meet
from jaxinfer.cluster.launch import Launch
from jaxinfer.cluster.slurm import ClusterError
from processes import free_port


def launches(count: int) -> list[Launch]:
    port = free_port()
    return [Launch("127.0.0.1", (port,), count, index, None, ("a",) * count, "7.0.0") for index in range(count)]


def attend(launch: Launch, seconds: float, outcome: dict) -> threading.Thread:
    def run() -> None:
        try:
            meeting = meet(launch, seconds)
            values = meeting.gather({"from": launch.process_id}, 5)
            shared = meeting.share("all well", 5)
            outcome[launch.process_id] = (meeting, values, shared)
            meeting.close()
        except ClusterError as problem:
            outcome[launch.process_id] = str(problem)

    thread = threading.Thread(target=run)
    thread.start()
    return thread


def test_meeting():
    outcome: dict = {}
    for thread in [attend(launch, 10, outcome) for launch in reversed(launches(3))]:
        thread.join()
    meeting, values, shared = outcome[0]
    assert values == [{"from": 0}, {"from": 1}, {"from": 2}] and shared == "all well" and not meeting.missing
    other, none, shared = outcome[2]
    assert none is None and shared == "all well" and abs(other.clock_s) < 0.1 and 0 < other.round_trip_s < 1


def test_strangers_are_refused_and_absent_ranks_named():
    host, first, second = launches(3)
    outcome: dict = {}
    threads = [attend(host, 3, outcome)]
    time.sleep(0.3)
    with socket.create_connection((host.host, host.ports[0])) as stranger:
        stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
        threads.append(attend(first, 3, outcome))
        other: dict = {}
        attend(attrs.evolve(second, run="8.0.0"), 3, other).join()
        for thread in threads:
            thread.join()
    meeting, values, _ = outcome[0]
    assert values == [{"from": 0}, {"from": 1}, None] and meeting.missing == {2: "did not come in 3 s"}
    assert "refused by rank 0" in other[2] and "it belongs to run 8.0.0, this is 7.0.0" in other[2]
    assert len(meeting.refused) == 2 and any("does not know its secret" in text for text in meeting.refused)


def test_a_stranger_takes_no_rank_and_hears_nothing():
    host, first = launches(2)
    outcome: dict = {}
    thread = attend(host, 10, outcome)
    hello = json.dumps({"run": host.run, "process": 1, "of": 2, "host": "nowhere"}).encode()
    time.sleep(0.3)
    for text in (struct.pack("!I", len(hello)) + hello, struct.pack("!I", 64) + b"0" * 64 + b"\0\0\0\x22" + b"0" * 34):
        with socket.create_connection((host.host, host.ports[0]), 10) as stranger:
            stranger.sendall(text)
            said = b""
            while part := stranger.recv(4096):
                said += part
        # an answer is random, but for the signature
        assert host.run.encode() not in said and b"refused" not in said
    with contextlib.ExitStack() as stack:
        crowd = [stack.enter_context(socket.create_connection((host.host, host.ports[0]), 10)) for _ in range(80)]
        attend(first, 10, outcome).join()
        assert crowd[0].recv(1) == b""
    thread.join()
    meeting, values, _ = outcome[0]
    assert values == [{"from": 0}, {"from": 1}] and not meeting.missing
    assert meeting.refused == ["127.0.0.1: no process of this run: it does not know its secret"]


@pytest.mark.slow
def test_another_program_on_the_port():
    host, first = launches(2)
    with socket.create_server((host.host, host.ports[0])) as server:
        with pytest.raises(ClusterError, match=f"port {host.ports[0]} cannot be used"):
            meet(host, 1)

        def answer() -> None:
            connection, _ = server.accept()
            connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
            connection.close()

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(ClusterError, match=f"another program answers at {host.host}:{host.ports[0]}"):
            meet(first, 0)
        thread.join()
    with pytest.raises(ClusterError, match=r"rank 0 at .* not reached in 1 s: .*refused"):
        meet(first, 1)


def test_the_next_port_where_another_run_has_the_first():
    other, port = launches(2), free_port()
    outcome: dict = {}
    threads = [attend(other[0], 20, {})]
    time.sleep(0.3)
    ours = [attrs.evolve(each, ports=(*each.ports, port), run="9.0.0") for each in other]
    threads += [attend(launch, 20, outcome) for launch in ours]
    for thread in threads[1:]:
        thread.join()
    assert outcome[0][1] == [{"from": 0}, {"from": 1}] and not outcome[0][0].missing
    attend(other[1], 20, {}).join()
    threads[0].join()


def test_a_rank_that_goes_or_sticks_is_named():
    host, first, second = launches(3)
    meetings: dict = {}

    def join(launch: Launch) -> None:
        meetings[launch.process_id] = meet(launch, 5)

    threads = [threading.Thread(target=join, args=[launch]) for launch in (host, first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    meetings[1].close()
    assert meetings[0].gather("a", 1) == ["a", None, None]
    assert "ended before" in meetings[0].missing[1] and "stuck" in meetings[0].missing[2]
    meetings[0].close()
    with pytest.raises(ClusterError, match=r"rank 0 on 127\.0\.0\.1 is gone"):
        meetings[2].share(None, 5)
    meetings[2].close()
