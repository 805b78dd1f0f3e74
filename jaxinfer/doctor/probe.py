"""``python -m jaxinfer.doctor.probe LAUNCH``: JAX's part of the doctor, in a process of its own that may hang or abort.

Says on standard output, as lines of JSON, how far it is and what it measured.
"""

import ctypes
import json
import os
import signal
import sys
import time
from typing import Any

from jaxinfer.cluster.distributed import initialize
from jaxinfer.cluster.launch import Launch

SMALL, LARGE, LARGE_ON_CPU = 8 << 10, 64 << 20, 4 << 20
PR_SET_PDEATHSIG = 1
HEARTBEAT_SECONDS = 100  # the doctor's own bound comes first


def main() -> None:
    given = json.loads(sys.argv[1])
    _die_with(given.pop("parent"))
    coordinator = given.pop("coordinator")
    launch = Launch(**given)
    say("start")
    initialize(launch, coordinator, HEARTBEAT_SECONDS)
    say("joined")
    import jax

    devices = jax.devices()
    device = devices[0]
    say(
        "devices",
        platform=device.platform,
        kind=device.device_kind,
        devices=len(devices),
        local=jax.local_device_count(),
        ids=[each.local_hardware_id for each in jax.local_devices() if hasattr(each, "local_hardware_id")],
    )
    for name, size in (("small", SMALL), ("large", LARGE_ON_CPU if device.platform == "cpu" else LARGE)):
        say(name, bytes=size, seconds=measure(size))
    say("done")
    sys.stdout.flush()
    # an exit of the interpreter would wait in JAX for processes that may be gone
    os._exit(0)


def measure(size: int) -> float:
    """Seconds of one all-reduce of `size` bytes a device over all devices, in a chain of them."""
    import jax
    import numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    count = jax.device_count()
    mesh = Mesh(np.array(jax.devices()), ("all",))
    spec = PartitionSpec("all")
    shape = (count, size // 4)
    array = jax.make_array_from_callback(
        shape, NamedSharding(mesh, spec), lambda index: np.full((1, shape[1]), index[0].start or 0, np.float32)
    )

    def chain(x: jax.Array, times: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, times, lambda _, y: jax.lax.psum(y, "all") / count, x)

    both = (spec, PartitionSpec())
    run = jax.jit(jax.shard_map(chain, mesh=mesh, in_specs=both, out_specs=spec, check_vma=False))

    def timed(times: int) -> float:
        began = time.perf_counter()
        result = run(array, np.int32(times))
        result.block_until_ready()
        seconds = time.perf_counter() - began
        part = np.asarray(result.addressable_shards[0].data)
        if not np.allclose(part, (count - 1) / 2):
            raise SystemExit(f"the sum is wrong: found {part.flat[0]}, expected {(count - 1) / 2}")
        return seconds

    timed(1)  # compiles, and NCCL connects
    # all processes must run the same number, so that it cannot follow a clock
    times = 200 if size == SMALL else 5
    if jax.devices()[0].platform == "cpu":
        times //= 5
    return min(timed(times), timed(times)) / times


def say(event: str, **values: Any) -> None:
    print(json.dumps({"event": event, **values}), flush=True)


def _die_with(parent: int) -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before that
        os._exit(1)


if __name__ == "__main__":
    main()
