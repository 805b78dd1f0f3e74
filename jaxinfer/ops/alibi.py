"""Attention with linear biases (Press, Smith and Lewis, "Train Short, Test Long", 2022, section 3): no rotations, but
each head's scores fall with the distance to the key, by a slope of its own."""

import math

import jax
import jax.numpy as jnp
import numpy as np


def slopes(heads: int) -> np.ndarray:
    """float32 [N]: a geometric series; where N is no power of two, the rest from the series of twice as many heads."""
    power = 2 ** math.floor(math.log2(heads))

    def series(count: int) -> np.ndarray:
        return 2.0 ** (-8 / count * np.arange(1, count + 1))

    return np.concatenate([series(power), series(2 * power)[::2][: heads - power]]).astype(np.float32)


def own_slopes(heads: int) -> jax.Array:
    """Of this device's part of N heads, cut over ``tensor``."""
    own = heads // jax.lax.axis_size("tensor")
    return jax.lax.dynamic_slice_in_dim(jnp.asarray(slopes(heads)), jax.lax.axis_index("tensor") * own, own)


def bias(slopes: jax.Array, at: jax.Array) -> jax.Array:
    """float32 [N, S] of keys at positions [S]: rising to the newest key is falling with the distance, after softmax.

    Rounded as the models were trained with it: slopes, positions and their product each in bfloat16."""
    return _bfloat16(_bfloat16(slopes)[:, None] * _bfloat16(at.astype(jnp.float32))[None])


def _bfloat16(x: jax.Array) -> jax.Array:
    # XLA may leave out a conversion to bfloat16 and back (--xla_allow_excess_precision); this it keeps
    return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
