"""Who is heard at the hub's port: processes of this run, and nobody else."""

import contextlib
import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

import psutil
import pytest

from jaxinfer.cluster.channel import accept, opening
from jaxinfer.cluster.slurm import read_step
from processes import free_port, own_environment

# no JAX: what the ranks do is to wait for a line
WORK = """
import os, sys
from jaxinfer.cluster.launch import find_launch
from jaxinfer.cluster.monitor import supervise
from jaxinfer.cluster.pulse import Limits
launch = find_launch(os.environ, *{options})
def work(pulse, where):
    print("here", flush=True)
    return 0 if sys.stdin.readline() == "end\\n" else 3
supervise(launch, Limits(**{limits}), "test", {{}}, work)
"""
EARLIER = {"kind": "hello", "run": "", "process_id": 1, "count": 2, "host": "nowhere", "facts": {}}


def start(options: tuple, limits: dict | None = None, **environment: str) -> subprocess.Popen:
    code = WORK.format(options=options, limits=limits or {})
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env=own_environment("JAXINFER_SECRET_FILE", **environment),
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def ends(processes: list[subprocess.Popen], line: str = "end\n") -> list[tuple[int, str]]:
    for each in processes:
        with contextlib.suppress(BrokenPipeError):
            each.stdin.write(line)
            each.stdin.flush()
    # standard input stays open: its end would end them too
    return [(each.wait(60), each.stderr.read()) for each in processes]


def wait_for_start(processes: list[subprocess.Popen]) -> None:
    for each in processes:
        assert each.stdout.readline() == "here\n", each.communicate(timeout=60)


@pytest.fixture
def pair() -> Iterator[tuple[int, list[subprocess.Popen]]]:
    port = free_port()
    both = [start((f"127.0.0.1:{port}", 2, rank)) for rank in (0, 1)]
    yield port, both
    for each in both:
        each.kill()


def connect(port: int) -> socket.socket:
    until = time.monotonic() + 60
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port), 20)
        except OSError:
            assert time.monotonic() < until
            time.sleep(0.05)


def everything(stranger: socket.socket) -> bytes:
    """What the hub says until it hangs up."""
    said = b""
    with contextlib.suppress(ConnectionResetError):
        while part := stranger.recv(4096):
            said += part
    return said


def hello(port: int, **changes) -> bytes:
    return json.dumps({**EARLIER, "run": f"127.0.0.1:{port}", **changes}).encode() + b"\n"


def test_strangers_learn_nothing_and_change_nothing(pair):
    port, both = pair
    wait_for_start(both)
    said = [
        hello(port),  # as ranks of earlier versions spoke
        hello(port) + b'{"kind": "signal", "number": 15}\n{"kind": "end", "status": 2}\n',
        hello(port, run="x"),
        b"GET / HTTP/1.1\r\nHost: node1\r\nAccept: */*\r\nUser-Agent: somebody/1.0\r\n\r\n",
        b"[" * 60000,
        b"\xff" * 64,
    ]
    for text in said:
        with connect(port) as stranger:
            stranger.sendall(text)
            assert everything(stranger) == b""
    # one that knows how ranks speak, and not the secret
    with connect(port) as stranger:
        stranger.sendall(opening().encode())
        answer = stranger.makefile("rb").readline()
        with pytest.raises(ValueError, match="does not know the secret"):
            accept(opening(), answer.decode().strip("\n"), lambda credential: b"k" * 32)
        stranger.sendall(b"0" * 64 + hello(port))
        assert everything(stranger) == b""
    assert ends(both) == [(0, ""), (0, "")]


def test_strangers_that_stay_keep_nobody_out():
    port = free_port()
    address = (f"127.0.0.1:{port}", 2)
    first = start((*address, 0))
    with contextlib.ExitStack() as stack:
        crowd = [stack.enter_context(connect(port)) for _ in range(80)]
        second = start((*address, 1))
        wait_for_start([first, second])
        # one more than those that may wait ends the one that came first
        assert everything(crowd[0]) == b""
        assert ends([first, second]) == [(0, ""), (0, "")]


def step(job: int, rank: int = 0, tasks: int = 1) -> dict[str, str]:
    """The environment that srun gives to a task on this machine."""
    return {
        "SLURM_JOB_ID": str(job), "SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "localhost", "SLURM_NODEID": "0",
        "SLURM_STEP_TASKS_PER_NODE": str(tasks), "SLURM_LOCALID": str(rank), "SLURM_PROCID": str(rank),
    }  # fmt: skip


def test_jobs_that_have_a_port_in_common_run_at_once():
    """Two tasks of an array that are 64 apart, on one node."""
    jobs = [start((), **step(job, rank, 2)) for job in (20_007, 20_071) for rank in (0, 1)]
    wait_for_start(jobs)
    assert ends(jobs) == [(0, "")] * 4


def test_a_step_of_one_task_needs_no_port():
    with contextlib.ExitStack() as stack:
        for port in read_step(step(10_007)).ports:
            stack.enter_context(socket.create_server(("127.0.0.1", port)))
        single = start((), **step(10_007))
        wait_for_start([single])
        assert ends([single]) == [(0, "")]


def test_processes_of_one_node_cannot_be_reached_from_another():
    both = [start((), **step(30_007, rank, 2)) for rank in (0, 1)]
    wait_for_start(both)
    connections = [each for each in psutil.Process(both[0].pid).net_connections() if each.status == psutil.CONN_LISTEN]
    assert [each.laddr.ip for each in connections] == ["127.0.0.1"]
    assert ends(both) == [(0, "")] * 2


def test_two_that_say_they_are_rank_1(pair):
    port, both = pair
    wait_for_start(both)
    third = start((f"127.0.0.1:{port}", 2, 1))
    (status, err), *others = ends([*both, third], "")
    host = socket.gethostname()
    assert status == 2 and err == f"test: two processes say that they are rank 1: on {host} and on {host}\n"
    assert [status for status, _ in others] == [2, 2]


def test_a_rank_with_another_secret_is_told_so(tmp_path):
    address = f"127.0.0.1:{free_port()}"
    files = [tmp_path / "0", tmp_path / "1"]
    for file in files:
        file.write_text(f"{file.name} of many bytes that nobody knows")
        file.chmod(0o600)
    both = [start((address, 2, rank), {"start": 2.5 - rank}, JAXINFER_SECRET_FILE=str(files[rank])) for rank in (0, 1)]
    (status, err), (other, text) = ends(both)
    assert status == 1 and "did not prove that they are of this run: have all ranks the same secret?" in err
    assert other == 2 and "another program listens there (it does not know the secret of this run)" in text
    assert "that nobody knows" not in err + text


def test_a_secret_that_others_can_read_is_refused(tmp_path):
    file = tmp_path / "secret"
    file.write_text("x" * 32)
    file.chmod(0o644)
    ((status, err),) = ends([start((f"127.0.0.1:{free_port()}", 2, 0), JAXINFER_SECRET_FILE=str(file))])
    assert status == 2
    assert err.startswith(f"test: error: {file}: found mode 644 of user") and "chmod 600" in err
    # one process has nobody to prove anything to
    ((status, err),) = ends([start((f"127.0.0.1:{free_port()}", 1, 0), JAXINFER_SECRET_FILE=str(file))])
    assert (status, err) == (0, "")
