"""RMSNorm (Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019, section 3) and LayerNorm (Ba, Kiros and
Hinton, "Layer Normalization", 2016, section 3). All normalize [..., H] in float32 and return x's dtype; weight [H]."""

import jax
import jax.numpy as jnp


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    return weight * _rms(x, eps).astype(x.dtype)


def norm(kind: str, x: jax.Array, weight: jax.Array, bias: jax.Array | None, eps: float) -> jax.Array:
    """By kind: ``rms``; ``rms+1``, weights from 1 on and multiplied in float32; ``layer``, with a bias [H]."""
    if kind == "rms":
        return rms_norm(x, weight, eps)
    if kind == "rms+1":
        return (_rms(x, eps) * (1.0 + weight.astype(jnp.float32))).astype(x.dtype)
    wide = x.astype(jnp.float32)
    wide = wide - wide.mean(axis=-1, keepdims=True)
    wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return (wide * weight.astype(jnp.float32) + bias.astype(jnp.float32)).astype(x.dtype)


def add_then_norm(x: jax.Array, delta: jax.Array, weight: jax.Array, eps: float) -> tuple[jax.Array, jax.Array]:
    """x + delta, all [..., H], and the RMS norm of that."""
    x = x + delta
    return x, rms_norm(x, weight, eps)


def _rms(x: jax.Array, eps: float) -> jax.Array:
    wide = x.astype(jnp.float32)
    return wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
