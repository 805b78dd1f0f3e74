"""What the processes of a run do together: join, share, compare, wait."""

import ctypes
import json
import os
import socket
import sys
from typing import Any

from jaxinfer.cluster.gather import meet
from jaxinfer.cluster.launch import Launch
from jaxinfer.cluster.ports import keep_coordinator
from jaxinfer.cluster.slurm import ClusterError

JOIN_SECONDS = 600  # the monitors bound it sooner and say who is missing


def start(launch: Launch) -> None:
    """As `initialize`, for a program without monitors: its processes agree on a coordinator among themselves.

    Raises:
      ClusterError: not all processes came.
    """
    if launch.num_processes == 1:
        return initialize(launch, "", JOIN_SECONDS)
    meeting = meet(launch, JOIN_SECONDS)
    try:
        if meeting.missing:
            missing = "; ".join(f"rank {rank} {why}" for rank, why in sorted(meeting.missing.items()))
            raise ClusterError(f"{launch.name}: {missing}")
        coordinator, _kept = keep_coordinator(launch)
        initialize(launch, meeting.share(coordinator, JOIN_SECONDS), JOIN_SECONDS)
    finally:
        meeting.close()


def initialize(launch: Launch, coordinator: str, heartbeat_s: int) -> None:
    """Joins this process to the others at `coordinator` (``host:port``); call it before anything else uses JAX.

    Raises:
      ClusterError: JAX could not start its part.
    """
    import jax

    # with the preemption service on, JAX swallows SIGTERM
    jax.config.update("jax_enable_preemption_service", False)
    gpus = None if launch.gpus is None else list(launch.gpus)
    if launch.num_processes == 1:
        return
    _bypass_proxies(launch.address)
    _silence_cout()
    try:
        jax.distributed.initialize(
            coordinator,
            launch.num_processes,
            launch.process_id,
            local_device_ids=gpus,
            cluster_detection_method="deactivate",
            # its default is all addresses
            coordinator_bind_address=coordinator if launch.on_one_node else None,
            initialization_timeout=JOIN_SECONDS,
            # its own watch ends in an abort with a text for programmers: ours comes first
            heartbeat_timeout_seconds=heartbeat_s,
        )
    except RuntimeError as error:
        raise ClusterError(f"{launch.name}: no start with coordinator {coordinator}: {error}") from error


def leave() -> None:
    """Ends JAX's part when every process is here."""
    import jax

    if jax.process_count() == 1:
        return
    # its threads complain that they are cancelled, at the end of every good run
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        jax.distributed.shutdown()
    finally:
        os.dup2(kept, 2)


def _bypass_proxies(host: str) -> None:
    if any(name.lower().endswith("_proxy") for name in os.environ):  # gRPC would send the start-up through http_proxy
        for name in ("no_proxy", "NO_PROXY"):
            os.environ[name] = ",".join(filter(None, [os.environ.get(name), host]))


def _silence_cout() -> None:
    """Ends C++'s standard output, that of C and Python goes on: Gloo tells of each connection there, and nobody else.

    It is ``std::cout.setstate(std::ios::badbit)``, since Gloo has no setting for it and knows no log.
    """
    try:
        library = ctypes.CDLL("libstdc++.so.6")  # by this name it is the one that jaxlib has loaded
        cout = ctypes.addressof(ctypes.c_void_p.in_dll(library, "_ZSt4cout"))
        clear = library["_ZNSt9basic_iosIcSt11char_traitsIcEE5clearESt12_Ios_Iostate"]
    except (OSError, ValueError, AttributeError):
        return
    # the state is in a virtual base; where that lies stands before the object's table (Itanium C++ ABI, 2.5.2)
    table = ctypes.c_void_p.from_address(cout).value or 0
    place = ctypes.c_ssize_t.from_address(table - 3 * ctypes.sizeof(ctypes.c_void_p)).value
    clear(ctypes.c_void_p(cout + place), 1)


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


def everyone(value: Any) -> list[Any]:
    """What each process has in `value` (anything that JSON holds)."""
    import jax
    import numpy as np
    from jax.experimental import multihost_utils

    if jax.process_count() == 1:
        return [value]
    data = json.dumps(value).encode()
    longest = int(np.max(multihost_utils.process_allgather(np.int32(len(data)))))
    padded = np.frombuffer(data.ljust(longest), np.uint8)
    return [json.loads(bytes(each.tolist())) for each in np.asarray(multihost_utils.process_allgather(padded))]


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


def differing(digest: bytes) -> list[int]:
    """The processes whose 16 bytes are not those of process 0."""
    import jax
    import numpy as np
    from jax.experimental import multihost_utils

    if jax.process_count() == 1:
        return []
    found = np.asarray(multihost_utils.process_allgather(np.frombuffer(digest, np.uint8)))
    return [place for place, each in enumerate(found) if bytes(each.tolist()) != bytes(found[0].tolist())]
