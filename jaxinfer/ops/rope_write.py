"""Rotary embedding of queries and keys, and keys and values into their pages, as one Triton kernel: from what the
q/k/v matmul gives, in one pass.

`jaxinfer.ops.attention.rotate_and_write` is the plain form that defines what is right."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from jaxinfer.ops.tiles import grid, power

ROWS = 16  # (token, head) pairs of a program
PAIRS_OF_A_WARP = 256  # of elements that rotate together: a load of 16 bytes per thread and half
MOST_WARPS = 8


def rope_and_write(
    qkv: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    k_pool: jax.Array,
    v_pool: jax.Array,
    tables: jax.Array,
    positions: jax.Array,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """As `rotate_and_write`, with the pools written in place; only interpreted, on a CPU, are they copied."""
    batch, length, columns = qkv.shape
    kv_heads, width = k_pool.shape[2:]
    heads = columns // width - 2 * kv_heads
    tokens, at_once = batch * length, min(ROWS, power(kv_heads))
    blocks = pl.cdiv(heads, at_once) + 2 * pl.cdiv(kv_heads, at_once)
    warps = min(MOST_WARPS, max(1, ROWS * power(width // 2) // PAIRS_OF_A_WARP))
    q, k_pool, v_pool = pl.pallas_call(
        functools.partial(_kernel, at_once=at_once),
        grid=(pl.cdiv(tokens, ROWS // at_once), blocks),
        out_shape=(
            jax.ShapeDtypeStruct((tokens, heads, width), qkv.dtype),
            jax.ShapeDtypeStruct(k_pool.shape, k_pool.dtype),
            jax.ShapeDtypeStruct(v_pool.shape, v_pool.dtype),
        ),
        input_output_aliases={5: 1, 6: 2},
        compiler_params=triton.CompilerParams(num_warps=warps),
        interpret=interpret,
        name="rope_and_write",
    )(
        qkv.reshape(tokens, -1, width),
        cos.reshape(tokens, -1),
        sin.reshape(tokens, -1),
        tables,
        positions.reshape(-1),
        k_pool,
        v_pool,
    )
    return q.reshape(batch, length, heads, width), k_pool, v_pool


def _kernel(qkv_ref, cos_ref, sin_ref, tables_ref, positions_ref, _k_ref, _v_ref, q_ref, k_ref, v_ref, *, at_once: int):
    """`at_once` heads, all of q or k or v, of some tokens. Heads and tokens beyond the last are masked."""
    tokens, heads, width = q_ref.shape
    page_size, kv_heads, half = k_ref.shape[1], k_ref.shape[2], width // 2
    r, d = jnp.arange(ROWS), jnp.arange(power(half))
    token = pl.program_id(0) * (ROWS // at_once) + jax.lax.div(r, at_once)
    token_at, columns = grid(token, d)
    there = (token_at < tokens) & (columns < half)
    q_blocks, kv_blocks = pl.cdiv(heads, at_once), pl.cdiv(kv_heads, at_once)
    block = pl.program_id(1)

    def heads_of(first_block, count):
        head, _ = grid((block - first_block) * at_once + jax.lax.rem(r, at_once), d)
        return head, there & (head < count)

    def halves(head, own):
        places = ((token_at, head, columns), (token_at, head, columns + half))
        return [triton.load(qkv_ref.at[place], mask=own, other=0.0) for place in places]

    def rotated(head, own):
        first, second = (each.astype(jnp.float32) for each in halves(head, own))
        cos, sin = (triton.load(each.at[token_at, columns], mask=there, other=0.0) for each in (cos_ref, sin_ref))
        return first * cos - second * sin, second * cos + first * sin

    def cells():
        position = triton.load(positions_ref.at[token], mask=token < tokens, other=-1)
        live, position = position >= 0, jnp.maximum(position, 0)
        row = jax.lax.div(token, tokens // tables_ref.shape[0])
        page = triton.load(tables_ref.at[row, jax.lax.div(position, page_size)], mask=live, other=0)
        return [grid(each, d)[0] for each in (page, jax.lax.rem(position, page_size), live)]

    def store(ref, place, head, parts, own):
        for part, at in zip(parts, (columns, columns + half)):
            triton.store(ref.at[(*place, head, at)], part.astype(ref.dtype), mask=own)

    @pl.when(block < q_blocks)
    def _():
        head, own = heads_of(0, heads)
        store(q_ref, (token_at,), head, rotated(head, own), own)

    @pl.when((block >= q_blocks) & (block < q_blocks + kv_blocks))
    def _():
        head, own = heads_of(q_blocks, kv_heads)
        *place, live = cells()
        store(k_ref, place, head, rotated(head + heads, own), own & live)

    @pl.when(block >= q_blocks + kv_blocks)
    def _():
        head, own = heads_of(q_blocks + kv_blocks, kv_heads)
        *place, live = cells()
        store(v_ref, place, head, halves(head + heads + kv_heads, own), own & live)
