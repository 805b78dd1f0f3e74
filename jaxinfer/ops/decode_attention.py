"""Attention of one new token per sequence over the paged cache, as a Triton kernel: each page is read once, through the
table, and only as far as its sequence reaches (Dao et al., "Flash-Decoding", 2023, for the split over the cache).

`jaxinfer.ops.attention.paged_attention` is the plain form that defines what is right."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from jaxinfer.ops.attention import MASKED
from jaxinfer.ops.tiles import capped, grid, power

WARPS = 4
PROGRAMS = 2048  # wanted in all: a GPU has some 100 multiprocessors with room for several each
MOST_SPLITS = 16
DOT_ROWS = 16  # the least that tensor cores take


def decode_attention(
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
    """As `paged_attention`, for q [B, 1, N, D] and positions [B, 1]."""
    batch, _, heads, width = q.shape
    kv_heads = k_pool.shape[2]
    group = heads // kv_heads
    splits = min(MOST_SPLITS, power(-(-PROGRAMS // (batch * kv_heads))))
    lengths = positions[:, 0] + 1
    firsts = jnp.zeros_like(lengths) if window is None else jnp.maximum(lengths - window, 0)
    scale = width**-0.5 if scale is None else scale
    kernel = functools.partial(
        _kernel, group=group, splits=splits, page_size=k_pool.shape[1], scale=scale, softcap=softcap
    )
    parts = (batch, kv_heads, splits, group)
    if splits == 1:
        out_shape = (jax.ShapeDtypeStruct((*parts, width), q.dtype),)
    else:
        of_row = jax.ShapeDtypeStruct(parts, jnp.float32)
        out_shape = (jax.ShapeDtypeStruct((*parts, width), jnp.float32), of_row, of_row)
    out, *rest = pl.pallas_call(
        kernel,
        grid=(batch, kv_heads, splits),
        out_shape=out_shape,
        compiler_params=triton.CompilerParams(num_warps=WARPS),
        interpret=interpret,
        name="decode_attention",
    )(q.reshape(batch, kv_heads, group, width), k_pool, v_pool, tables, firsts, lengths)
    if splits == 1:
        return out.reshape(q.shape)
    # the splits' softmaxes become one
    most, total = rest
    scale = jnp.exp(most - most.max(axis=2, keepdims=True)) * (total > 0)
    weight = (scale * total).sum(axis=2)
    out = (out * scale[..., None]).sum(axis=2) / jnp.where(weight == 0, 1.0, weight)[..., None]
    return out.reshape(q.shape).astype(q.dtype)


def _kernel(q_ref, k_ref, v_ref, tables_ref, firsts_ref, lengths_ref, out_ref, *rest_refs,
            group: int, splits: int, page_size: int, scale: float, softcap: float | None):  # fmt: skip
    """One sequence, one KV head, one of `splits` parts of its cache: the part's unnormalized output [group, D], the
    largest score [group] and the sum of exponentials [group]. The only part gives the output itself and no more."""
    row, head, split = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    width = q_ref.shape[-1]
    # Triton wants powers of two; one query row needs no tensor core
    rows, columns = (1 if group == 1 else max(DOT_ROWS, power(group))), power(width)
    g, d = jnp.arange(rows), jnp.arange(columns)
    own = (g < group)[:, None] & (d < width)[None]
    q = triton.load(q_ref.at[(row, head, *grid(g, d))], mask=own, other=0.0)
    first, length = firsts_ref[row], lengths_ref[row]
    block_size = 32 if rows == 1 else 64  # cached tokens per round of the loop; measured on an H200
    share = pl.cdiv(pl.cdiv(length - first, splits), block_size) * block_size
    start = first + split * share
    stop = jnp.minimum(start + share, length)

    def block(number, carry):
        out, most, total = carry
        at = start + number * block_size + jnp.arange(block_size)
        live = at < stop
        at = jnp.minimum(at, stop - 1)
        page = triton.load(tables_ref.at[row, at // page_size])
        # beyond the width the mask holds: a clamped index would hide from Triton that columns are contiguous
        pages, columns_at = grid(page, d)
        cells = jnp.broadcast_to((at % page_size)[:, None], pages.shape)
        there = live[:, None] & (d < width)[None]
        k = triton.load(k_ref.at[pages, cells, head, columns_at], mask=there, other=0.0)
        v = triton.load(v_ref.at[pages, cells, head, columns_at], mask=there, other=0.0)
        if rows == 1:
            scores = (q.astype(jnp.float32) * k.astype(jnp.float32)).sum(axis=1)[None]
        else:
            scores = triton.dot(q, k.T)
        scores = jnp.where(live[None], capped(scores * scale, softcap), MASKED)
        new = jnp.maximum(most, scores.max(axis=1))
        weights = jnp.exp(scores - new[:, None])
        kept = jnp.exp(most - new)
        if rows == 1:
            mixed = (weights.reshape(block_size, 1) * v.astype(jnp.float32)).sum(axis=0)[None]
        else:
            mixed = triton.dot(weights.astype(v.dtype), v)
        return out * kept[:, None] + mixed, new, total * kept + weights.sum(axis=1)

    empty = (
        jnp.zeros((rows, columns), jnp.float32),
        jnp.full((rows,), MASKED, jnp.float32),
        jnp.zeros((rows,), jnp.float32),
    )
    out, most, total = jax.lax.fori_loop(0, pl.cdiv(jnp.maximum(stop - start, 0), block_size), block, empty)
    if splits == 1:
        out = out / jnp.where(total == 0, 1.0, total)[:, None]
    triton.store(out_ref.at[(row, head, split, *grid(g, d))], out.astype(out_ref.dtype), mask=own)
    if splits == 1:
        return
    most_ref, total_ref = rest_refs
    triton.store(most_ref.at[row, head, split, g], most, mask=g < group)
    triton.store(total_ref.at[row, head, split, g], total, mask=g < group)
