"""What a device offers, as far as the engine must know before it allocates: dtypes, kernels, memory."""

import os
from typing import Any, Protocol

import jax.numpy as jnp
import psutil

from jaxinfer.parallel.axes import LayoutError

VARIABLES = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")  # the second is the older name
JAX_SHARE = 0.75  # of a GPU's memory, which JAX takes where nobody says
POOL_SHARE = 0.93  # what we ask for: the rest is for CUDA's context, code and graphs, NCCL, and inboxes of peers
FRAGMENTS = 0.03  # of a pool, which may lie in pieces that are too small


class Card(Protocol):
    """What this file reads of a `jax.Device`; the plan has cards that are not here."""

    device_kind: str
    compute_capability: str  # "9.0"; AMD's say gfx90a, the CPU has none


def check_dtype(dtype: Any, device: Card) -> None:
    """T4 and V100 have no bfloat16 units: XLA would emulate it, slowly and without a word."""
    capability = getattr(device, "compute_capability", "")
    if dtype == jnp.bfloat16 and _is_nvidia(capability) and float(capability) < 8:
        raise LayoutError(
            f"dtype: bfloat16 needs a GPU of compute capability 8.0, {device.device_kind} has {capability}; "
            "legal here: float16, float32"
        )


def choose_kernels(wanted: str, dtype: Any, device: Card) -> str:
    """What `Decoder` takes: Triton needs compute capability 8.0 and multiplies float32 as tf32, which nobody who asked
    for float32 wants; on a CPU the kernels can only be interpreted."""
    capability = getattr(device, "compute_capability", "")
    nvidia = _is_nvidia(capability)
    able = nvidia and float(capability) >= 8
    if wanted == "on" and nvidia and not able:
        raise LayoutError(
            f"kernels: on needs compute capability 8.0, {device.device_kind} has {capability}; legal here: auto, off"
        )
    if wanted == "off" or (wanted == "auto" and not (able and jnp.dtype(dtype).itemsize == 2)):
        return "off"
    return "on" if able else "interpret"


def claim_memory() -> None:
    """Has JAX take POOL_SHARE of each GPU when it starts, so that `memory_fraction` is a share of the card; unless the
    user's environment says how much, or JAX runs already."""
    if any(os.environ.get(name) for name in VARIABLES):
        return
    import jax

    name, was = "jax_num_cpu_devices", jax.config.jax_num_cpu_devices
    try:  # another number is refused once JAX runs
        jax.config.update(name, was + 2)
        jax.config.update(name, was)
    except RuntimeError:
        return
    os.environ[VARIABLES[0]] = str(POOL_SHARE)


def device_memory(device: Any) -> tuple[int, float]:
    """Bytes of the whole device, and the share of them that this process can fill. Virtual CPU devices share the
    host's memory."""
    import jax

    stats = device.memory_stats() or {}
    if "bytes_limit" not in stats:
        return psutil.virtual_memory().total // len(jax.local_devices()), 1.0
    share = next((float(os.environ[name]) for name in VARIABLES if os.environ.get(name)), JAX_SHARE)
    return round(stats["bytes_limit"] / share), share * (1 - FRAGMENTS)


def _is_nvidia(capability: str) -> bool:
    return capability.replace(".", "").isdigit()
