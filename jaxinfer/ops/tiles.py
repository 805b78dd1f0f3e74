"""What the Triton kernels share: blocks are powers of two, and every index of a block has the block's shape."""

import jax
import jax.numpy as jnp


def grid(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Rows a and columns b as two arrays [a, b]."""
    shape = (a.size, b.size)
    return jnp.broadcast_to(a[:, None], shape), jnp.broadcast_to(b[None], shape)


def power(number: int) -> int:
    """The least power of two that is not below."""
    return 1 << (number - 1).bit_length()


def capped(x: jax.Array, cap: float | None) -> jax.Array:
    """c tanh(x / c); written out, since Triton has exp but not everywhere tanh."""
    return x if cap is None else cap * (1.0 - 2.0 / (jnp.exp(x * (2.0 / cap)) + 1.0))
