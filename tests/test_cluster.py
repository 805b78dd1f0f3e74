"""Start-up: virtual devices, the thread pool's guard, and processes that find each other or say why not."""

import os
import socket
import subprocess
import sys
import time

import pytest

from jaxinfer.cluster.distributed import ClusterError, initialize

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
    env = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "NPROC", "JAX_PLATFORMS")}
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env={**env, **environment},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def finished(process: subprocess.Popen) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


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
        initialize(coordinator, 2, 0)


def test_process_id_out_of_range():
    with pytest.raises(ClusterError, match="found 2 of 2"):
        initialize("localhost:5", 2, 2)


def test_absent_coordinator_is_named():
    port = free_port()
    with pytest.raises(ClusterError, match=f"rank 1/2 on .*127.0.0.1:{port} not reachable in 1 s.*refused"):
        initialize(f"127.0.0.1:{port}", 2, 1, timeout_s=1)
    with pytest.raises(ClusterError, match=r"no-such-host\.invalid:5 not reachable"):
        initialize("no-such-host.invalid:5", 2, 1, timeout_s=0.5)


def test_a_port_in_use_is_refused():
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(ClusterError, match=f"port {port} cannot be used"):
            initialize(f"127.0.0.1:{port}", 2, 0)


JOIN = """
import sys, time
from jaxinfer.cluster.cpu import use_virtual_devices
from jaxinfer.cluster.distributed import initialize, run
rank = {rank}
def main():
    use_virtual_devices(2)
    initialize("127.0.0.1:{port}", 2, rank, heartbeat_s=10)
    print(total(), flush=True)
    {then}
"""


def join(port: int, rank: int, then: str = "") -> subprocess.Popen:
    # a proxy that does not exist: start-up must not go through it
    code = PSUM + JOIN.format(port=port, rank=rank, then=then) + "\nrun(main, rank)"
    return python(code, http_proxy="http://127.0.0.1:9", https_proxy="http://127.0.0.1:9")


def test_two_processes_meet_and_part():
    port = free_port()
    late = join(port, 1)
    time.sleep(1)  # rank 1 asks before rank 0 listens
    both = [finished(join(port, 0)), finished(late)]
    assert [status for status, _, _ in both] == [0, 0], both
    assert all(out.endswith("6\n") for _, out, _ in both), both  # the collectives' library prints before it


@pytest.mark.slow
def test_an_exception_ends_all_and_says_who():
    port = free_port()
    began = time.monotonic()
    waits = join(port, 0, "time.sleep(300)")
    status, _, err = finished(join(port, 1, "raise RuntimeError('lost it')"))
    assert status == 1
    assert f"[rank 1 {socket.gethostname()}] RuntimeError: lost it" in err
    assert finished(waits)[0] != 0
    assert time.monotonic() - began < 60
