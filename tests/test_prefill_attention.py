"""The prefill attention kernel against its plain form: the kernel's own code, interpreted where there is no GPU."""

import random

import jax.numpy as jnp
import numpy as np
import pytest

from conftest import ON_GPU
from jaxinfer.ops.attention import paged_attention
from jaxinfer.ops.prefill_attention import prefill_attention


def case(seed, batch, length, kv_heads, group, width, page_size, pages, dtype):
    """Rows of a chunk that begin anywhere in their context, end early, or are not live at all."""
    draw = np.random.default_rng(seed)
    span, count = pages * page_size, batch * pages + 3
    q = jnp.array(draw.normal(size=(batch, length, kv_heads * group, width)), dtype)
    pools = [jnp.array(draw.normal(size=(count, page_size, kv_heads, width)), dtype) for _ in range(2)]
    tables = jnp.array(draw.permutation(count - 1)[: batch * pages].reshape(batch, pages) + 1, jnp.int32)
    live = draw.integers(0, min(length, span) + 1, size=(batch, 1))
    start = draw.integers(0, span - live + 1)
    offset = np.arange(length)
    return q, *pools, tables, jnp.array(np.where(offset < live, start + offset, -1), jnp.int32)


@pytest.mark.parametrize("seed", range(6))
def test_equals_the_plain_form(seed):
    draw = random.Random(seed)
    batch, length, kv_heads = draw.randint(1, 3), draw.randint(1, 40), draw.randint(1, 3)
    group, width = draw.choice([1, 4, 5, 8]), draw.choice([16, 64, 80, 96, 100, 128, 256])
    page_size, pages, window = draw.choice([4, 12, 16]), draw.randint(1, 20), draw.choice([None, None, 1, 7, 100])
    arguments = case(seed, batch, length, kv_heads, group, width, page_size, pages, jnp.float32)
    expected = paged_attention(*arguments, window)
    found = prefill_attention(*arguments, window, interpret=not ON_GPU)
    # on a GPU Triton multiplies float32 in tf32
    np.testing.assert_allclose(found, expected, atol=3e-3 if ON_GPU else 5e-6)


@pytest.mark.parametrize(
    ("group", "width", "window", "scale", "softcap"),
    [(1, 64, 30, 1.0, 2.0), (8, 100, jnp.int32(30), 0.05, None), (8, 128, None, None, 50.0), (1, 256, None, 1.0, 2.0)],
)
def test_scaled_and_capped(group, width, window, scale, softcap):
    """As Gemma 2 does; a low cap is reached."""
    arguments = case(width, 2, 37, 2, group, width, 12, 9, jnp.float32)
    found = prefill_attention(*arguments, window, scale, softcap, interpret=not ON_GPU)
    expected = paged_attention(*arguments, window, scale, softcap)
    np.testing.assert_allclose(found, expected, atol=4e-3 if ON_GPU else 2e-5)
    assert softcap != 2.0 or not np.allclose(expected, paged_attention(*arguments, window, scale), atol=0.1)


@pytest.mark.slow
@pytest.mark.parametrize(("group", "width", "softcap"), [(1, 100, 5.0), (4, 128, None)])
def test_bfloat16_is_close_to_float32(group, width, softcap):
    arguments = case(1, 3, 150, 2, group, width, 16, 20, jnp.bfloat16)
    wide = [each.astype(jnp.float32) if each.dtype == jnp.bfloat16 else each for each in arguments]
    for window in (None, jnp.int32(200)):
        found = prefill_attention(*arguments, window, softcap=softcap, interpret=not ON_GPU)
        expected = paged_attention(*wide, window, softcap=softcap)
        np.testing.assert_allclose(found.astype(jnp.float32), expected, atol=0.02)
