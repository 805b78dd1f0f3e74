"""Attention over a paged KV cache (Kwon et al., "PagedAttention", 2023, section 4), in plain jax.numpy.

A pool is [P, page_size, K, D]; page 0 is the null page: tables name it where a sequence has no page, and nobody reads
it. A block table [B, W] lists the pages of each sequence in order. Positions of -1 mark tokens that are not live."""

import jax
import jax.numpy as jnp

from jaxinfer.ops import alibi
from jaxinfer.ops.rope import rotate

MASKED = -1e30  # finite: a row without any visible key stays free of NaN


def write_pages(pool: jax.Array, new: jax.Array, tables: jax.Array, positions: jax.Array) -> jax.Array:
    """Writes new [B, T, K, D] at positions [B, T] through tables [B, W]; returns the pool, in place if donated."""
    page_size = pool.shape[1]
    page = jnp.take_along_axis(tables, jnp.maximum(positions, 0) // page_size, axis=1)
    # beyond the pool, where nothing is written: many rows' writes to one cell would wait for each other on a GPU
    page = jnp.where(positions < 0, pool.shape[0], page).reshape(-1)
    cell = (positions % page_size).reshape(-1)
    new = new.reshape(-1, *new.shape[2:]).astype(pool.dtype)
    # in the shape that the engine holds pools in: through another, XLA copies pools of one KV head, or for one row
    return pool[None, None].at[0, 0, page, cell].set(new)[0, 0]


def rotate_and_write(
    qkv: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    k_pool: jax.Array,
    v_pool: jax.Array,
    tables: jax.Array,
    positions: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Takes qkv [B, T, (N + 2K) * D] apart, rotates queries and keys by cos and sin [B, T, D/2], and writes keys and
    values as `write_pages` does. Returns the queries [B, T, N, D] and the two pools."""
    kv_heads, width = k_pool.shape[2:]
    keys = kv_heads * width
    queries = qkv.shape[-1] - 2 * keys
    parts = jnp.split(qkv, (queries, queries + keys), axis=-1)
    q, k, v = (each.reshape(*qkv.shape[:2], -1, width) for each in parts)
    k_pool = write_pages(k_pool, rotate(k, cos, sin), tables, positions)
    return rotate(q, cos, sin), k_pool, write_pages(v_pool, v, tables, positions)


def paged_attention(
    q: jax.Array,
    k_pool: jax.Array,
    v_pool: jax.Array,
    tables: jax.Array,
    positions: jax.Array,
    window: jax.Array | int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    slopes: jax.Array | None = None,
) -> jax.Array:
    """Causal attention of q [B, T, N, D] over the pages, which hold the queries' own keys already.

    A query at position p sees positions max(0, p - window + 1) to p. Queries at -1 give zeros.
    Scores are q k, plus the key's `alibi.bias` by slopes [N], times scale (by default D ** -0.5), then c tanh(x / c)
    with the softcap c (Gemma Team, "Gemma 2", 2024, section 2).
    Returns [B, T, N, D] in q's dtype; scores and sums are float32.
    """
    batch, length, heads, width = q.shape
    kv_heads, page_size = k_pool.shape[2], k_pool.shape[1]
    span = tables.shape[1] * page_size
    k = k_pool[tables].reshape(batch, span, kv_heads, width)
    v = v_pool[tables].reshape(batch, span, kv_heads, width)
    at = jnp.arange(span)
    # what nobody sees may be NaN that another sequence left in the page, and 0 times that is NaN
    v = jnp.where((at <= positions.max(axis=1, keepdims=True))[..., None, None], v, 0)
    grouped = q.reshape(batch, length, kv_heads, heads // kv_heads, width)
    scores = jnp.einsum("btkgd,bskd->bkgts", grouped, k, preferred_element_type=jnp.float32)
    if slopes is not None:
        scores = scores + alibi.bias(slopes, at).reshape(kv_heads, -1, 1, span)
    scores = scores * (width**-0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    visible = at[None, None] <= positions[:, :, None]
    if window is not None:
        visible &= at[None, None] > positions[:, :, None] - window
    visible = visible[:, None, None]
    scores = jnp.where(visible, scores, MASKED)
    weights = jnp.where(visible, jnp.exp(scores - scores.max(axis=-1, keepdims=True)), 0.0)
    total = weights.sum(axis=-1, keepdims=True)
    weights = (weights / jnp.where(total == 0, 1.0, total)).astype(v.dtype)
    out = jnp.einsum("bkgts,bskd->btkgd", weights, v, preferred_element_type=jnp.float32)
    return out.reshape(q.shape).astype(q.dtype)
