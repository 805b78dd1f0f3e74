"""Attention with linear biases: the numbers that the models were trained with, on one device and cut over several."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import PartitionSpec as P
from transformers.models.falcon.modeling_falcon import build_alibi_tensor

from jaxinfer.ops import alibi
from jaxinfer.ops.attention import paged_attention
from jaxinfer.parallel.axes import parse_mesh
from jaxinfer.parallel.mesh import make_mesh


def theirs(heads, length):
    """[N, S] by transformers."""
    return build_alibi_tensor(torch.ones(1, length, dtype=torch.long), heads, torch.float32)[:, 0].numpy()


def test_slopes_of_any_number_of_heads():
    for heads in range(1, 257):
        found = alibi.slopes(heads).astype(jnp.bfloat16).astype(np.float32)
        np.testing.assert_array_equal(found, theirs(heads, 2)[:, 1], err_msg=f"{heads} heads")


@pytest.mark.parametrize("heads", [12, 32, 71])
def test_bias_is_rounded_to_bfloat16_as_in_training(heads):
    # under jit, where XLA may keep more digits than the source says; positions above 256 are rounded themselves
    found = jax.jit(alibi.bias)(jnp.asarray(alibi.slopes(heads)), jnp.arange(3000))
    np.testing.assert_array_equal(np.asarray(found), theirs(heads, 3000))


def test_each_device_has_the_slopes_of_its_own_heads():
    mesh = make_mesh(parse_mesh("stage=2,tensor=4"))
    own = jax.shard_map(lambda: alibi.own_slopes(12), mesh=mesh, in_specs=(), out_specs=P("tensor"), check_vma=False)
    np.testing.assert_array_equal(np.asarray(jax.jit(own)()), alibi.slopes(12))


@pytest.mark.parametrize("kv_heads", [1, 3, 12])
def test_attention_adds_the_bias_before_it_scales(kv_heads):
    heads, width, length, page = 12, 4, 40, 8
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(length, n, width)).astype(np.float32) for n in (heads, kv_heads, kv_heads))
    pools = [np.concatenate([np.zeros_like(each[:page]), each]).reshape(-1, page, kv_heads, width) for each in (k, v)]
    positions, table = jnp.arange(length)[None], jnp.arange(1, length // page + 1)[None]
    attend = jax.jit(partial(paged_attention, slopes=jnp.asarray(alibi.slopes(heads))))
    with jax.default_matmul_precision("highest"):
        found = attend(q[None], *map(jnp.asarray, pools), table, positions)[0]
    k, v = (np.repeat(each, heads // kv_heads, axis=1) for each in (k, v))
    scores = (np.einsum("tnd,snd->nts", q, k) + theirs(heads, length)[:, None]) / np.sqrt(width)
    scores = np.where(np.tril(np.ones((length, length), bool)), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    expected = np.einsum("nts,snd->tnd", weights / weights.sum(-1, keepdims=True), v)
    np.testing.assert_allclose(np.asarray(found), expected, atol=1e-5)
