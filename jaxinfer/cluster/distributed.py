"""Start and end of a program of several processes: each failure names the rank and what it waited for."""

import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

CONNECT_SECONDS = 5.0
RETRY_SECONDS = 0.2
QUIET_SECONDS = 5.0  # that a rank waits before it says so


class ClusterError(RuntimeError):
    """The processes cannot find each other."""


def initialize(
    coordinator: str, num_processes: int, process_id: int, timeout_s: float = 120.0, heartbeat_s: int = 30
) -> None:
    """Joins this process to the others; call it before anything else uses JAX.

    `coordinator` is ``host:port`` of process 0. A process that dies ends the others within about `heartbeat_s`.

    Raises:
      ClusterError: a malformed address, a process id out of range, a port that is taken, a coordinator that cannot be
        reached within `timeout_s`.
    """
    host, port = _address(coordinator)
    if num_processes < 1 or not 0 <= process_id < num_processes:
        raise ClusterError(f"process_id: found {process_id} of {num_processes}, legal is 0 to num_processes - 1")
    if num_processes == 1:
        return
    me = f"rank {process_id}/{num_processes} on {socket.gethostname()}"
    _bypass_proxies(host)
    deadline = time.monotonic() + timeout_s
    if process_id == 0:
        _check_free(port, me)
    else:
        # JAX's own wait ends in an abort that names neither host nor port
        _wait_for(host, port, me, timeout_s)
    import jax

    # with the preemption service on, JAX swallows SIGTERM
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            coordinator,
            num_processes,
            process_id,
            cluster_detection_method="deactivate",
            initialization_timeout=max(10, int(deadline - time.monotonic())),
            heartbeat_timeout_seconds=heartbeat_s,
        )
    except RuntimeError as error:
        raise ClusterError(f"{me}: no start with coordinator {host}:{port}: {error}") from error


def run(main: Callable[[], int | None], process_id: int | None = None) -> None:
    """Runs `main` and exits with what it returns; any exception, of any thread, ends this process at once.

    With several processes (`process_id` given) each line of the traceback carries the rank, and nothing waits for the
    others: JAX's own exit would, for a peer that waits for this one.
    """

    def end(code: int) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

    def report() -> None:
        tag = "" if process_id is None else f"[rank {process_id} {socket.gethostname()}] "
        sys.stderr.write("".join(f"{tag}{line}\n" for line in traceback.format_exc().rstrip().split("\n")))

    def thread_died(args: threading.ExceptHookArgs) -> None:
        sys.stderr.write(f"thread {args.thread.name if args.thread else '?'}:\n")
        traceback.print_exception(args.exc_type, args.exc_value, args.exc_traceback)
        end(1)

    threading.excepthook = thread_died
    try:
        code = main() or 0
        if process_id is not None:
            import jax

            jax.distributed.shutdown()
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        code = 130
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        report()
        code = 1
    if code:
        end(code)


def _address(coordinator: str) -> tuple[str, int]:
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ClusterError(f"coordinator: found {coordinator!r}, legal is host:port")
    return host.strip("[]"), int(port)


def _bypass_proxies(host: str) -> None:
    if any(name.lower().endswith("_proxy") for name in os.environ):  # gRPC would send the start-up through http_proxy
        for name in ("no_proxy", "NO_PROXY"):
            os.environ[name] = ",".join(filter(None, [os.environ.get(name), host]))


def _check_free(port: int, me: str) -> None:
    # gRPC shares ports: on one that another program listens on, ranks of two programs would meet
    family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            raise ClusterError(f"{me}: port {port} cannot be used: {error.strerror}; choose another") from None


def _wait_for(host: str, port: int, me: str, timeout_s: float) -> None:
    began, said = time.monotonic(), False
    while True:
        try:
            socket.create_connection((host, port), CONNECT_SECONDS).close()
            return
        except OSError as error:
            waited = time.monotonic() - began
            if waited > timeout_s:
                raise ClusterError(
                    f"{me}: coordinator {host}:{port} not reachable in {timeout_s:.0f} s: {error} "
                    "(does rank 0 run there? does the name resolve here? is the port open?)"
                ) from None
            if waited > QUIET_SECONDS and not said:
                print(f"{me}: waiting for coordinator {host}:{port}: {error}", file=sys.stderr, flush=True)
                said = True
            time.sleep(RETRY_SECONDS)


def share(value: Any) -> Any:
    """What process 0 has in `value` (anything that JSON holds); the others' own values are ignored."""
    import jax
    import numpy as np
    from jax.experimental import multihost_utils

    if jax.process_count() == 1:
        return value
    data = np.frombuffer(json.dumps(value).encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(data))))
    buffer = np.zeros(size, np.uint8)
    if jax.process_index() == 0:
        buffer[:] = data
    return json.loads(np.asarray(multihost_utils.broadcast_one_to_all(buffer)).astype(np.uint8).tobytes())


def hosts() -> list[str]:
    """The host name of each process."""
    import jax
    import numpy as np
    from jax.experimental import multihost_utils

    name = socket.gethostname().encode()[:64]
    if jax.process_count() == 1:
        return [name.decode()]
    names = multihost_utils.process_allgather(np.frombuffer(name.ljust(64, b"\0"), np.uint8))
    return [bytes(each.tolist()).rstrip(b"\0").decode() for each in np.asarray(names)]


def wait_for_all(where: str) -> None:
    """Returns when every process is here."""
    import jax
    from jax.experimental import multihost_utils

    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(where)
