"""The kernels around a layer's matmuls against their plain forms: their own code, interpreted where there is no GPU."""

import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from conftest import ON_GPU
from jaxinfer.ops.add_norm import add_rms_norm
from jaxinfer.ops.attention import rotate_and_write
from jaxinfer.ops.norm import add_then_norm
from jaxinfer.ops.rope_write import rope_and_write

# two roundings to bfloat16 may differ by one unit in the last place: the plain form may skip one in between
TIGHT = {jnp.float32: {"rtol": 1e-6, "atol": 1e-6}, jnp.bfloat16: {"rtol": 2**-7, "atol": 2**-7}}


def close(found, expected, dtype):
    assert found.dtype == expected.dtype == dtype and found.shape == expected.shape
    np.testing.assert_allclose(found.astype(jnp.float32), expected.astype(jnp.float32), **TIGHT[dtype])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1, 64), (5, 1, 96), (3, 7, 200), (2, 9, 1536), (4, 3200)])
def test_add_norm_equals_the_plain_form(shape, dtype):
    draw = np.random.default_rng(sum(shape))
    x, delta = (jnp.array(draw.normal(size=shape) * 3, dtype) for _ in range(2))
    weight = jnp.array(draw.normal(size=shape[-1]), dtype)
    found = add_rms_norm(x, delta, weight, 1e-2, interpret=not ON_GPU)
    for one, other in zip(found, add_then_norm(x, delta, weight, 1e-2)):
        close(one, other, dtype)


def test_add_norm_rounds_before_it_norms():
    """The sum that the norm sees is the one that goes on as the residual stream."""
    x, delta = (jnp.full((1, 64), each, jnp.bfloat16).at[0, 0].set(256) for each in (1, 2**-9))
    ones = jnp.ones(64, jnp.bfloat16)
    total, normed = add_rms_norm(x, delta, ones, 0.0, interpret=not ON_GPU)
    again = add_rms_norm(total, jnp.zeros_like(total), ones, 0.0, interpret=not ON_GPU)
    assert (total == again[0]).all() and (normed == again[1]).all()
    assert total[0, 1] == 1


def case(seed, dtype):
    """A batch of rows of which some tokens are not live, over pools that hold something already."""
    draw, pick = np.random.default_rng(seed), random.Random(seed)
    batch, length = pick.randint(1, 5), pick.randint(1, 9)
    kv_heads, group = pick.choice([1, 2, 3, 5, 8]), pick.choice([1, 3, 4])
    width, page_size = pick.choice([4, 16, 64, 100]), pick.choice([4, 16])
    pages = -(-length // page_size) + pick.randint(1, 3)
    count = batch * pages + 1
    qkv = jnp.array(draw.normal(size=(batch, length, (group + 2) * kv_heads * width)), dtype)
    turned = draw.normal(size=(batch, length, width // 2))
    cos, sin = jnp.array(np.cos(turned), jnp.float32), jnp.array(np.sin(turned), jnp.float32)
    pools = [jnp.array(draw.normal(size=(count, page_size, kv_heads, width)), dtype) for _ in range(2)]
    tables = jnp.array(draw.permutation(count - 1).reshape(batch, pages) + 1, jnp.int32)
    start = draw.integers(0, pages * page_size - length + 1, size=(batch, 1))
    offset = np.arange(length)
    live = offset < draw.integers(0, length + 1, size=(batch, 1))
    return qkv, cos, sin, *pools, tables, jnp.array(np.where(live, start + offset, -1), jnp.int32)


@pytest.mark.parametrize("seed, dtype", [*((seed, jnp.float32) for seed in range(6)), (6, jnp.bfloat16)])
def test_rope_and_write_equals_the_plain_form(seed, dtype):
    arguments = case(seed, dtype)
    q, *pools = jax.jit(rope_and_write, static_argnames="interpret")(*arguments, interpret=not ON_GPU)
    expected_q, *expected_pools = jax.jit(rotate_and_write)(*arguments)
    close(q, expected_q, dtype)
    for found, expected in zip(pools, expected_pools):  # the null page too: tokens that are not live write nothing
        close(found, expected, dtype)


@pytest.mark.gpu
def test_no_pool_is_copied_on_a_gpu():
    arguments = case(0, jnp.bfloat16)
    where = [each.unsafe_buffer_pointer() for each in arguments[3:5]]
    _, *pools = jax.jit(rope_and_write, donate_argnums=(3, 4))(*arguments)
    assert [each.unsafe_buffer_pointer() for each in pools] == where
