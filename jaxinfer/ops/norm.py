"""RMSNorm (Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019, section 3)."""

import jax
import jax.numpy as jnp


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """Normalizes [..., H] in float32 and returns x's dtype; weight is [H]."""
    wide = x.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return weight * wide.astype(x.dtype)


def add_then_norm(x: jax.Array, delta: jax.Array, weight: jax.Array, eps: float) -> tuple[jax.Array, jax.Array]:
    """x + delta, all [..., H], and the norm of that."""
    x = x + delta
    return x, rms_norm(x, weight, eps)
