"""Virtual CPU devices: a mesh of any shape on a laptop, without the deadlock that a small thread pool brings."""

import os

THREADS_PER_DEVICE = 4  # measured: below it, collectives that do not depend on each other block each other's threads
MOST_DEVICES = 1024


class ThreadPoolError(RuntimeError):
    """Too few threads for the CPU devices: their collectives may never finish."""


def use_virtual_devices(count: int) -> None:
    """Makes `count` CPU devices the only ones, with a thread pool that is large enough for them.

    Raises:
      ValueError: a count below 1, or above MOST_DEVICES, which would take memory without end.
      RuntimeError: JAX runs already, with another platform, another number of devices or too small a pool.
    """
    if not 1 <= count <= MOST_DEVICES:
        raise ValueError(f"cpu_devices: found {count}, legal is 1 to {MOST_DEVICES}")
    import jax

    try:
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError:  # JAX runs already, so that its devices are what they are
        found = jax.local_devices()
        if len(found) != count or found[0].platform != "cpu":
            raise RuntimeError(
                f"cpu_devices: found {count}, but JAX runs already with {len(found)} {found[0].platform} device(s); "
                "ask for virtual devices before anything else uses JAX"
            ) from None
        check_thread_pool()
    else:
        jax.config.update("jax_platforms", "cpu")
        variable = _pool_variable()
        os.environ[variable] = str(max(_pool_size(), THREADS_PER_DEVICE * count))


def check_thread_pool() -> None:
    """Looks at the devices in use; starts JAX if it does not run.

    Raises:
      ThreadPoolError: several CPU devices and fewer than four threads for each.
    """
    import jax

    devices = jax.local_devices()
    needed = THREADS_PER_DEVICE * len(devices)
    if devices[0].platform == "cpu" and len(devices) > 1 and _pool_size() < needed:
        raise ThreadPoolError(
            f"{len(devices)} CPU devices need a pool of {needed} threads, or their collectives can deadlock; it has "
            f"{_pool_size()}: set {_pool_variable()}={needed} in the environment before Python starts"
        )


def _pool_variable() -> str:
    return "PJRT_NPROC" if os.environ.get("PJRT_NPROC") else "NPROC"  # XLA looks at both, in this order


def _pool_size() -> int:
    size = os.environ.get(_pool_variable(), "")
    return int(size) if size.isdigit() else len(os.sched_getaffinity(0))
