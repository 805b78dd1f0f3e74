"""Attention of a chunk of new tokens over the paged cache, as a Triton kernel: scores live in registers, tile by tile
(Dao, "FlashAttention-2", 2023, section 3), and pages are read through the table.

`jaxinfer.ops.attention.paged_attention` is the plain form that defines what is right."""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from jaxinfer.ops.attention import MASKED
from jaxinfer.ops.tiles import capped, grid, power

ROWS = {128: 128, 256: 64}  # query rows of a tile, by head width up to
KEYS = {128: 64, 256: 32}  # cached tokens of a tile
WARPS = {128: 4, 256: 8}
STAGES = {128: 3, 256: 2}  # tiles of keys and values under way at once
DOT_ROWS = 16  # the least that tensor cores take


def prefill_attention(
    q: jax.Array,
    k_pool: jax.Array,
    v_pool: jax.Array,
    tables: jax.Array,
    positions: jax.Array,
    window: jax.Array | int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    interpret: bool = False,
) -> jax.Array:
    """As `paged_attention`, where the live positions of a row of [B, T] are consecutive, and all before its -1."""
    batch, length, heads, width = q.shape
    kv_heads = k_pool.shape[2]
    group = heads // kv_heads
    size = next(size for size in ROWS if width <= size)
    # the query heads of one KV head lie side by side: a tile's rows are (token, head) pairs
    rows = max(DOT_ROWS, min(ROWS[size], power(length * group)))
    keys = max(DOT_ROWS, KEYS[size] * 2 // q.dtype.itemsize)
    warps = WARPS[size] if rows == ROWS[size] else 4
    scale = width**-0.5 if scale is None else scale
    kernel = functools.partial(_kernel, rows=rows, keys=keys, windowed=window is not None, scale=scale, softcap=softcap)
    limits = jnp.stack((positions[:, 0], (positions >= 0).sum(axis=1)), axis=1).astype(jnp.int32)
    out = pl.pallas_call(
        kernel,
        grid=(kv_heads, batch, pl.cdiv(length * group, rows)),
        out_shape=jax.ShapeDtypeStruct((batch, length, kv_heads, group, width), q.dtype),
        compiler_params=triton.CompilerParams(num_warps=warps, num_stages=STAGES[size]),
        interpret=interpret,
        name="prefill_attention",
    )(
        q.reshape(batch, length, kv_heads, group, width),
        k_pool,
        v_pool,
        tables,
        limits,
        jnp.full((1,), 0 if window is None else window, jnp.int32),
    )
    return out.reshape(q.shape)


def _kernel(q_ref, k_ref, v_ref, tables_ref, limits_ref, window_ref, out_ref, *,
            rows: int, keys: int, windowed: bool, scale: float, softcap: float | None):  # fmt: skip
    """One tile of `rows` query rows of one sequence and one KV head."""
    # the last tokens see the most keys: their tiles start first, so that no long one is left alone at the end
    head, row, tile = pl.program_id(0), pl.program_id(1), pl.num_programs(2) - 1 - pl.program_id(2)
    _, length, _, group, width = q_ref.shape
    page_size = k_ref.shape[1]
    start, count, window = limits_ref[row, 0], limits_ref[row, 1], window_ref[0]
    d = jnp.arange(power(width))  # Triton wants powers of two
    r = tile * rows + jnp.arange(rows)
    token = jax.lax.div(r, group)
    own = (token < length)[:, None] & (d < width)[None]
    tokens, columns = grid(token, d)
    place = (row, tokens, head, grid(jax.lax.rem(r, group), d)[0], columns)
    q = triton.load(q_ref.at[place], mask=own, other=0.0)

    first = jax.lax.div(tile * rows, group)
    last = jnp.minimum(jax.lax.div(tile * rows + rows - 1, group), count - 1)
    stop = jnp.where(first < count, start + last + 1, 0)
    position = start + token
    # of exp2's exponent; a capped score has been scaled before
    factor = (scale if softcap is None else 1.0) * math.log2(math.e)

    def block(number, carry, masked):
        out, most, total = carry
        at = number * keys + jnp.arange(keys)
        cell = jnp.minimum(at, stop - 1) if masked else at
        page = triton.load(tables_ref.at[row, jax.lax.div(cell, page_size)])
        # beyond the width the mask holds: a clamped index would hide from Triton that columns are contiguous
        pages, columns = grid(page, d)
        place = (pages, grid(jax.lax.rem(cell, page_size), d)[0], head, columns)
        there = None if d.size == width else columns < width
        other = None if there is None else 0.0
        k = triton.load(k_ref.at[place], mask=there, other=other)
        v = triton.load(v_ref.at[place], mask=there, other=other)
        scores = triton.dot(q, k.T)
        if softcap is not None:
            scores = capped(scores * scale, softcap)
        if masked:
            visible = at[None] <= position[:, None]
            if windowed:
                visible &= at[None] > (position - window)[:, None]
            scores = jnp.where(visible, scores, MASKED)
        new = jnp.maximum(most, scores.max(axis=1))
        weights = jnp.exp2(scores * factor - (new * factor)[:, None])
        kept = jnp.exp2((most - new) * factor)
        mixed = triton.dot(weights.astype(v.dtype), v)
        return out * kept[:, None] + mixed, new, total * kept + weights.sum(axis=1)

    carry = (
        jnp.zeros((rows, d.size), jnp.float32),
        jnp.full((rows,), MASKED / 2, jnp.float32),  # above a masked score: a row that sees nothing yet sums up nothing
        jnp.zeros((rows,), jnp.float32),
    )
    if windowed:
        masked_from = jax.lax.div(jnp.maximum(start + first - window + 1, 0), keys)
    else:
        masked_from = jax.lax.div(jnp.minimum(start + first + 1, stop), keys)
        carry = jax.lax.fori_loop(0, masked_from, functools.partial(block, masked=False), carry)
    masked = functools.partial(block, masked=True)
    out, _, total = jax.lax.fori_loop(masked_from, pl.cdiv(stop, keys), masked, carry)
    # a row that is not live has seen masked keys only, or none
    out = out * jnp.where(token < count, 1.0 / total, 0.0)[:, None]
    triton.store(out_ref.at[place], out.astype(out_ref.dtype), mask=own)
