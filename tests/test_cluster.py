"""Start-up: virtual devices, the thread pool's guard, and processes that find each other or say why not."""

import json
import signal
import socket
import subprocess
import sys
import time

import psutil
import pytest

from jaxinfer.cluster.launch import find_launch, missed_srun
from jaxinfer.cluster.ports import listen
from jaxinfer.cluster.slurm import ClusterError
from processes import free_port, own_environment

PSUM = """
import jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
def total():
    mesh = Mesh(np.array(jax.devices()), ("x",))
    numbers = np.arange(jax.device_count())
    each = jax.make_array_from_callback(numbers.shape, NamedSharding(mesh, P("x")), lambda index: numbers[index])
    psum = jax.shard_map(lambda x: jax.lax.psum(x, "x"), mesh=mesh, in_specs=P("x"), out_specs=P())
    return int(jax.jit(psum)(each)[0])
"""


def python(code: str, **environment: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env=own_environment("NPROC", "JAX_PLATFORMS", **environment),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def finished(process: subprocess.Popen) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def test_virtual_devices_bring_their_threads():
    code = "from jaxinfer.cluster.cpu import use_virtual_devices as use; import os; use(6);" + PSUM
    # the environment's own count gives way, and a pool that is large enough stays
    done = finished(
        python(code + "print(total(), os.environ['NPROC'])", XLA_FLAGS="--xla_force_host_platform_device_count=2")
    )
    assert done[:2] == (0, "15 24\n"), done
    done = finished(python(code + "print(total(), os.environ['NPROC'])", NPROC="40"))
    assert done[:2] == (0, "15 40\n"), done


def test_a_small_pool_is_refused_with_the_cure():
    code = "from jaxinfer.cluster.cpu import check_thread_pool as check; check()"
    settings = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    status, _, err = finished(python(code, **settings, NPROC="15"))
    assert status == 1 and "set NPROC=16" in err
    assert finished(python(code, **settings, NPROC="16"))[0] == 0


def test_devices_cannot_change_once_jax_runs():
    code = "import jax; jax.devices(); from jaxinfer.cluster.cpu import use_virtual_devices as use; use(%d)"
    settings = {"JAX_PLATFORMS": "cpu", "NPROC": "16", "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    status, _, err = finished(python(code % 3, **settings))
    assert status == 1 and "already with 4 cpu" in err
    assert finished(python(code % 4, **settings))[0] == 0


@pytest.mark.parametrize("coordinator", ["node1", "node1:", "node1:x", ":5", "node1:70000"])
def test_addresses(coordinator):
    with pytest.raises(ClusterError, match="legal is host:port"):
        find_launch({}, coordinator, 2, 0)


def test_process_id_out_of_range():
    with pytest.raises(ClusterError, match="found 2 of 2"):
        find_launch({}, "localhost:5", 2, 2)


def test_alone_without_options_or_a_step():
    assert find_launch({}) is None
    assert find_launch({"SLURM_JOB_ID": "5", "SLURM_PROCID": "0", "SLURM_NTASKS": "4"}) is None
    assert "4 tasks" in missed_srun({"SLURM_JOB_ID": "5", "SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, None)


@pytest.mark.slow
def test_a_port_in_use_is_refused():
    with socket.create_server(("", 0)) as other, pytest.raises(ClusterError, match="cannot be used: Address already"):
        listen(find_launch({}, f"127.0.0.1:{other.getsockname()[1]}", 2, 0))


WORK = """
import os, signal, time
from jaxinfer.cluster.cpu import use_virtual_devices
from jaxinfer.cluster.distributed import initialize, leave
from jaxinfer.cluster.launch import find_launch
from jaxinfer.cluster.monitor import supervise
from jaxinfer.cluster.pulse import Limits
rank = {rank}
launch = find_launch({{}}, "{address}", 2, rank)
def work(pulse, where):
    pulse.beat("start", waits=True)
    use_virtual_devices(2)
    initialize(launch, where, 100)
    print(total(), flush=True)
    {then}
    leave()
    return 0
supervise(launch, Limits(**{limits}), "test", {{}}, work)
"""


def rank(address: str, number: int, then: str = "", **limits: float) -> subprocess.Popen:
    # a proxy that does not exist: start-up must not go through it
    code = PSUM + WORK.format(address=address, rank=number, then=then, limits=limits)
    return python(code, http_proxy="http://127.0.0.1:9", https_proxy="http://127.0.0.1:9")


def test_two_processes_meet_and_part():
    address = f"127.0.0.1:{free_port()}"
    late = rank(address, 1)
    time.sleep(1)  # rank 1 asks before rank 0 listens
    both = [finished(rank(address, 0)), finished(late)]
    assert [status for status, _, _ in both] == [0, 0], both
    assert all(out == "6\n" for _, out, _ in both), both  # nothing of the collectives' library


def test_a_connection_that_says_nothing_leaves_no_trace():
    address = f"127.0.0.1:{free_port()}"
    host, port = address.split(":")
    first = rank(address, 0)
    until = time.monotonic() + 60
    while True:  # until rank 0 listens
        try:
            silent = socket.create_connection((host, int(port)))
            break
        except OSError:
            assert time.monotonic() < until
            time.sleep(0.1)
    with silent:
        ends = [finished(each) for each in (rank(address, 1), first)]
    assert [status for status, _, _ in ends] == [0, 0], ends
    assert "Traceback" not in ends[1][2] and "Exception" not in ends[1][2], ends[1][2]


@pytest.mark.slow
def test_who_waits_for_a_late_rank_hears_that_all_is_well():
    address = f"127.0.0.1:{free_port()}"
    early = [rank(address, 0, dead=1.5)]
    time.sleep(5)
    ends = [finished(each) for each in [rank(address, 1, dead=1.5), *early]]
    assert [status for status, _, _ in ends] == [0, 0], ends


def test_absent_coordinator_is_named():
    address = f"127.0.0.1:{free_port()}"
    status, _, err = finished(rank(address, 1, start=1))
    assert status == 2
    assert f"rank 1/2 on {socket.gethostname()}: coordinator {address} not reachable in 1 s: " in err
    assert "no-such-host.invalid:5 not reachable" in finished(rank("no-such-host.invalid:5", 1, start=0.5))[2]


@pytest.mark.slow
def test_an_exception_ends_all_and_says_who():
    address = f"127.0.0.1:{free_port()}"
    waits = rank(address, 0, "time.sleep(300)")
    status, _, err = finished(rank(address, 1, "raise RuntimeError('lost it')"))
    assert status == 1
    assert f"[rank 1 {socket.gethostname()}] RuntimeError: lost it" in err
    status, _, err = finished(waits)
    assert status == 1
    assert err.splitlines()[-1] == f"test: rank 1/2 on {socket.gethostname()} failed in start: RuntimeError: lost it"


def wait_until_gone(pid: int) -> None:
    until = time.monotonic() + 5
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < until, f"process {pid} still runs"
        time.sleep(0.05)


@pytest.mark.slow
def test_an_error_that_follows_waits_for_its_cause():
    address = f"127.0.0.1:{free_port()}"
    first = rank(address, 0, "time.sleep(1); os.kill(os.getpid(), signal.SIGKILL)")
    follows = "import jax; raise jax.errors.JaxRuntimeError('Connection closed by peer')"
    status, _, err = finished(rank(address, 1, follows))
    assert status == 1
    assert "Traceback" not in err
    assert "rank 0/2" in finished(first)[2].splitlines()[-1]


STEPS = """
    import numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
    mesh = Mesh(np.array(jax.devices()), ("x",))
    ones = jax.make_array_from_callback((4,), NamedSharding(mesh, P("x")), lambda index: np.ones(4)[index])
    together = jax.jit(jax.shard_map(lambda x: jax.lax.psum(x, "x"), mesh=mesh, in_specs=P("x"), out_specs=P()))
    together(ones).block_until_ready()
    print("here", flush=True)
    step, seen = 0, {}
    while "quit" not in seen:
        pulse.beat("decode", step, True)
        seen.setdefault(pulse.poll(step), step)
        together(ones).block_until_ready()
        step += 1
    print([seen["drain"], seen["quit"], pulse.shared.drain_at, pulse.shared.quit_at], flush=True)
"""


@pytest.mark.slow
def test_a_stop_signal_reaches_all_at_the_same_step():
    """Although the monitor of rank 1 hears of it a thousand steps late."""
    address = f"127.0.0.1:{free_port()}"
    both = [rank(address, each, STEPS, grace=1) for each in (0, 1)]
    for each in both:
        while each.stdout.readline() != "here\n":
            pass
    time.sleep(1)  # until the monitors have told that both are in decode
    both[1].send_signal(signal.SIGSTOP)
    both[0].send_signal(signal.SIGUSR1)
    time.sleep(1)
    both[1].send_signal(signal.SIGCONT)
    ends = [finished(each) for each in both]
    assert [status for status, _, _ in ends] == [0, 0], ends
    seen = [json.loads(out.splitlines()[-1]) for _, out, _ in ends]
    drained, quitted, drain_at, quit_at = seen[0]
    assert seen[0] == seen[1]
    assert 0 < drained < quitted
    assert (drained, quitted) == (drain_at, quit_at)  # not when the order came, but at the step that it names


@pytest.mark.slow
def test_the_end_of_process_0_ends_the_others():
    address = f"127.0.0.1:{free_port()}"
    waits = rank(address, 1, "time.sleep(300)")
    began = time.monotonic()
    end = "print(os.getpid(), flush=True); os.kill(os.getppid(), signal.SIGKILL); time.sleep(300)"
    status, out, _ = finished(rank(address, 0, end))
    assert status == -signal.SIGKILL
    assert time.monotonic() - began < 60, "the worker, which holds the pipe, outlived its monitor"
    wait_until_gone(int(out.splitlines()[-1]))
    status, _, err = finished(waits)
    assert status == 1
    assert "lost rank 0 on 127.0.0.1 in start, step 0: its process or its node is gone, or stopped" in err


@pytest.mark.slow
def test_suspended_all_together_is_not_dead():
    """As ``scontrol suspend`` does: longer than any bound."""
    address = f"127.0.0.1:{free_port()}"
    both = [rank(address, each, "print('here', flush=True); time.sleep(6)", dead=1.5, stuck=8) for each in (0, 1)]
    for each in both:
        while each.stdout.readline() != "here\n":
            pass
    processes = [every for each in both for every in (psutil.Process(each.pid), *psutil.Process(each.pid).children())]
    assert len(processes) == 4
    for each in processes:
        each.suspend()
    time.sleep(9)
    for each in processes:
        each.resume()
    ends = [finished(each) for each in both]
    assert [status for status, _, _ in ends] == [0, 0], ends
