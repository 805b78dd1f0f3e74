"""What the first device can do, measured in a few seconds beside every benchmark: the floors are made of it."""

import time
from typing import Any

import attrs


@attrs.frozen
class Limits:
    """Of one device: a copy, counting bytes read and bytes written, and large matmuls of the model's dtype."""

    copy_bytes_per_s: float
    matmul_flops_per_s: float


def measure(dtype: str) -> Limits:
    """Copies 1 GiB and multiplies 8192 x 8192 random matrices (less on a CPU); the best of a few rounds of each."""
    import jax
    import jax.numpy as jnp

    small = jax.default_backend() == "cpu"
    size, width, calls = (2**26, 1024, 4) if small else (2**30, 8192, 20)
    device = jax.local_devices()[0]
    with jax.default_device(device):
        block = jnp.zeros(size, jnp.uint8)
        copy = _best(jax.jit(jnp.copy), (block,), calls)
        del block
        # random numbers: a GPU multiplies zeros faster than it can multiply anything else
        left, right = (jax.random.normal(jax.random.key(seed), (width, width), dtype) for seed in (0, 1))
        matmul = _best(jax.jit(jnp.matmul), (left, right), calls)
    return Limits(copy_bytes_per_s=2 * size / copy, matmul_flops_per_s=2 * width**3 / matmul)


def _best(function: Any, arguments: tuple[Any, ...], calls: int, rounds: int = 5) -> float:
    """Seconds per call, calls enqueued one after the other."""
    function(*arguments).block_until_ready()
    seconds = []
    for _ in range(rounds):
        began = time.perf_counter()
        for _ in range(calls):
            result = function(*arguments)
        result.block_until_ready()
        seconds.append((time.perf_counter() - began) / calls)
    return min(seconds)
