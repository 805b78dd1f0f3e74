"""The matmul of every weight: what it computes, and that the weight stays where it lies."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.ops.linear import linear


@pytest.mark.parametrize("rows", [(1, 1), (3,), (2, 5)], ids=str)
def test_against_numpy_and_without_a_copy_of_the_weight(rows):
    rng = np.random.default_rng(0)
    x, weight = rng.normal(size=(*rows, 24)).astype(np.float32), rng.normal(size=(40, 24)).astype(np.float32)
    np.testing.assert_allclose(linear(x, weight), x @ weight.T, rtol=0, atol=1e-5)
    text = jax.jit(linear).lower(x, weight).compile().as_text()
    assert re.search(r"f32\[40,24\]\S* parameter", text)
    assert not re.search(r"f32\[(40,24|24,40)\]\S* (copy|transpose|fusion)", text)


def test_the_dtype_is_that_of_x_unless_asked_for():
    x, weight = jnp.full((2, 512), 1 / 3, jnp.bfloat16), jnp.full((4, 512), 1 / 3, jnp.bfloat16)
    assert linear(x, weight).dtype == jnp.bfloat16
    wide = linear(x, weight, jnp.float32)
    assert wide.dtype == jnp.float32
    np.testing.assert_allclose(wide, 512 * float(x[0, 0]) ** 2, rtol=1e-5)
