"""All layers in one launch: which models it takes, that its source compiles, on a GPU what it computes."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.models.block import ACTIVATIONS
from jaxinfer.ops import cuda
from jaxinfer.ops.attention import paged_attention, write_pages
from jaxinfer.ops.decode_layers import Sizes, _source, decode_layers, fits
from jaxinfer.ops.linear import linear
from jaxinfer.ops.norm import rms_norm
from jaxinfer.ops.rope import rotate

HOPPER, AMPERE, GAMING = cuda.Gpu("9.0", 132), cuda.Gpu("8.0", 108), cuda.Gpu("8.6", 84)
NO_WINDOW = 2**30
LLAMA_8B = Sizes(
    rows=1, width=4096, heads=32, kv_heads=8, head_dim=128, mlp=14336, layers=32, page=16, eps=1e-5, half=False,
    activation="silu",
)  # fmt: skip
OPENLLAMA_3B = replace(LLAMA_8B, width=3200, kv_heads=32, head_dim=100, mlp=8640, layers=26)
TINY = replace(LLAMA_8B, width=256, heads=4, kv_heads=2, head_dim=64, mlp=512, layers=2)


def test_which_models_it_takes():
    for gpu in (HOPPER, AMPERE):
        assert fits(LLAMA_8B, gpu) and fits(OPENLLAMA_3B, gpu) and fits(TINY, gpu)
    assert fits(TINY, GAMING)
    assert not fits(LLAMA_8B, replace(GAMING, capability="8.9")), "no room for a ring in 99 KiB"
    assert not fits(replace(LLAMA_8B, rows=5), HOPPER)
    assert not fits(replace(LLAMA_8B, mlp=14336 + 32), HOPPER), "columns come in tiles of 64"
    assert not fits(replace(LLAMA_8B, heads=128), HOPPER), "16 query heads per KV head"
    assert not fits(replace(LLAMA_8B, head_dim=512, heads=8), HOPPER)
    assert not fits(replace(LLAMA_8B, activation="swiglu"), HOPPER)


@pytest.mark.parametrize(
    "sizes", [LLAMA_8B, replace(OPENLLAMA_3B, rows=4), replace(TINY, half=True, biases=("o_bias",))]
)
def test_the_source_compiles(sizes):
    if cuda._library() is None:
        pytest.skip("NVRTC is not installed")
    operands = 8 + sizes.layers * (8 + len(sizes.biases))
    for gpu in (HOPPER, AMPERE):
        source, shared = _source(sizes, gpu, 4, operands, 3 + 2 * sizes.layers)
        ptx = cuda.compile_ptx(source, gpu.capability)
        assert ".entry decode_layers" in ptx and "\n.version 8.1\n" in ptx, "older drivers take no newer PTX"
        assert shared <= gpu.shared_bytes


def test_no_gpu_no_kernel():
    class Device:
        compute_capability = "7.5"
        core_count = 40

    assert cuda.gpu(Device()) is None and cuda.gpu(jax.devices("cpu")[0]) is None


def case(sizes, pages, seed):
    """Weights, caches and tables on which activations stay near 1."""
    draw, dtype = np.random.default_rng(seed), jnp.float16 if sizes.half else jnp.bfloat16
    width, kv, d = sizes.width, sizes.kv_heads, sizes.head_dim
    queries, both = sizes.heads * d, (sizes.heads + 2 * kv) * d
    shapes = {"input_norm": (width,), "qkv": (both, width), "o": (width, queries), "post_norm": (width,)}
    shapes |= {"gate_up": (2 * sizes.mlp, width), "down": (width, sizes.mlp)}
    shapes |= {name: shapes[name.removesuffix("_bias")][:1] for name in sizes.biases}

    def make(name, shape):
        values = draw.normal(size=shape) * (0.1 if len(shape) == 1 else shape[1] ** -0.5)
        return jnp.array(values + (1 if name.endswith("norm") else 0), dtype)

    layers = [{name: make(name, shape) for name, shape in shapes.items()} for _ in range(sizes.layers)]
    count = sizes.rows * pages + 1
    pools = [[jnp.array(draw.normal(size=(count, sizes.page, kv, d)), dtype) for _ in layers] for _ in "kv"]
    turns = draw.uniform(0, 6, size=(sizes.rows, 1, d // 2))
    tables = jnp.array(draw.permutation(count - 1).reshape(sizes.rows, pages) + 1, jnp.int32)
    x = jnp.array(draw.normal(size=(sizes.rows, 1, width)), dtype)
    return x, jnp.array(np.cos(turns), jnp.float32), jnp.array(np.sin(turns), jnp.float32), tables, layers, *pools


def plain(sizes, x, cos, sin, positions, tables, windows, layers, k_pools, v_pools):
    """The layers one by one, from plain operations."""
    k_pools, v_pools, queries = list(k_pools), list(v_pools), sizes.heads * sizes.head_dim
    for i, layer in enumerate(layers):

        def product(x, name, layer=layer):
            return linear(x, layer[name]) + layer.get(f"{name}_bias", 0)

        qkv = product(rms_norm(x, layer["input_norm"], sizes.eps), "qkv")
        parts = jnp.split(qkv, (queries, queries + sizes.kv_heads * sizes.head_dim), axis=-1)
        q, k, v = (each.reshape(sizes.rows, 1, -1, sizes.head_dim) for each in parts)
        k_pools[i] = write_pages(k_pools[i], rotate(k, cos, sin), tables, positions)
        v_pools[i] = write_pages(v_pools[i], v, tables, positions)
        mixed = paged_attention(rotate(q, cos, sin), k_pools[i], v_pools[i], tables, positions, windows[i])
        x = x + product(mixed.reshape(sizes.rows, 1, queries), "o")
        gate, up = jnp.split(product(rms_norm(x, layer["post_norm"], sizes.eps), "gate_up"), 2, axis=-1)
        x = x + product(ACTIVATIONS[sizes.activation](gate) * up, "down")
    return x, k_pools, v_pools


def distance(found, expected):
    found, expected = (np.asarray(each.astype(jnp.float32)) for each in (found, expected))
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


ALL_BIASES = ("qkv_bias", "o_bias", "gate_up_bias", "down_bias")
WIDE = replace(TINY, rows=4, width=1024, heads=16, kv_heads=4, head_dim=128, mlp=2816)
BIASED = replace(TINY, rows=3, width=512, heads=8, kv_heads=1, mlp=1536, layers=3, page=4, half=True, biases=ALL_BIASES)
GEMMA = replace(TINY, width=2048, heads=8, kv_heads=1, head_dim=256, mlp=4096, activation="gelu_pytorch_tanh")
CASES = {  # sizes, pages of a row, positions, windows
    "one row": (TINY, 8, [100], None),
    "width 100": (replace(TINY, rows=2, width=320, heads=16, kv_heads=16, head_dim=100, mlp=960), 8, [100, 3], None),
    "four rows": (WIDE, 40, [600, 0, -1, 77], None),
    "float16, windows, biases": (replace(BIASED, activation="gelu"), 50, [190, 10, 5], [20, NO_WINDOW, 7]),
    "width 256": (GEMMA, 40, [601], None),
    "long": (replace(TINY, heads=8, kv_heads=4), 800, [12000], [NO_WINDOW, 3000]),
}


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_equals_the_layers_one_by_one(name):
    sizes, pages, positions, windows = CASES[name]
    gpu = cuda.gpu(jax.devices()[0])
    if gpu is None or not fits(sizes, gpu):
        pytest.skip("this GPU cannot run the kernel")
    x, cos, sin, tables, layers, k_pools, v_pools = case(sizes, pages, 0)
    positions = jnp.array(positions, jnp.int32)[:, None]
    windows = jnp.array(windows or [NO_WINDOW] * sizes.layers, jnp.int32)
    wide = jax.tree.map(lambda each: each.astype(jnp.float32), (layers, k_pools, v_pools))
    with jax.default_matmul_precision("highest"):
        expected = jax.jit(partial(plain, sizes))(x.astype(jnp.float32), cos, sin, positions, tables, windows, *wide)
    arguments = x, cos, sin, positions, tables, windows, layers, k_pools, v_pools
    rounded = jax.jit(partial(plain, sizes))(*arguments)
    run = jax.jit(lambda *each: decode_layers(*each, sizes, gpu))
    found, again = run(*arguments), run(*arguments)
    live = np.asarray(positions)[:, 0] >= 0
    np.testing.assert_array_equal(found[0][live], again[0][live])
    # as near to float32 as the plain form in the same dtype is
    assert distance(found[0][live], expected[0][live]) < 1.2 * distance(rounded[0][live], expected[0][live])
    for mine, theirs in zip(found[1] + found[2], expected[1] + expected[2], strict=True):
        assert distance(mine[1:], theirs[1:]) < 0.01  # page 0 is nobody's
