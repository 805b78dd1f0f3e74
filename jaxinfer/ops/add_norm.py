"""The residual stream and the norm that follows as one Triton kernel: a row is read once and stays in registers.

`jaxinfer.ops.norm.add_then_norm` is the plain form that defines what is right."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from jaxinfer.ops.tiles import power

COLUMNS_OF_A_WARP = 512  # two loads of 16 bytes per thread and array
MOST_WARPS = 16


def add_rms_norm(
    x: jax.Array, delta: jax.Array, weight: jax.Array, eps: float, interpret: bool = False
) -> tuple[jax.Array, jax.Array]:
    """As `add_then_norm`: x and delta [..., H], weight [H] to x + delta and its norm, both [..., H]."""
    rows = x.reshape(-1, x.shape[-1])
    warps = min(MOST_WARPS, max(1, power(x.shape[-1]) // COLUMNS_OF_A_WARP))
    out = pl.pallas_call(
        functools.partial(_kernel, eps=eps),
        grid=rows.shape[:1],
        out_shape=(jax.ShapeDtypeStruct(rows.shape, x.dtype),) * 2,
        compiler_params=triton.CompilerParams(num_warps=warps),
        interpret=interpret,
        name="add_rms_norm",
    )(rows, delta.reshape(rows.shape), weight)
    return out[0].reshape(x.shape), out[1].reshape(x.shape)


def _kernel(x_ref, delta_ref, weight_ref, sum_ref, normed_ref, *, eps: float):
    """One row."""
    row, width = pl.program_id(0), x_ref.shape[1]
    columns = jnp.arange(power(width))
    own = None if columns.size == width else columns < width
    other = None if own is None else 0.0
    x, delta = (triton.load(each.at[row, columns], mask=own, other=other) for each in (x_ref, delta_ref))
    weight = triton.load(weight_ref.at[columns], mask=own, other=other)
    # float32 holds such sums and products closely enough that rounding them is rounding once
    total = (x.astype(jnp.float32) + delta.astype(jnp.float32)).astype(x.dtype)
    triton.store(sum_ref.at[row, columns], total, mask=own)
    wide = total.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt((wide * wide).sum() / width + eps)
    normed = weight.astype(jnp.float32) * wide.astype(x.dtype).astype(jnp.float32)
    triton.store(normed_ref.at[row, columns], normed.astype(x.dtype), mask=own)
