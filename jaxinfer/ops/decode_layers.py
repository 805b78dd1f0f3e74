"""All layers of a stage for a few decoding rows in one CUDA launch (decode_layers.cu says how).

The plain form is `Decoder.run_stage` (jaxinfer/engine/forward.py) without it, layer by layer."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp

from jaxinfer.ops import cuda

WARPS = 7  # that stream; one more adds up. With more, attention's registers would spill
CHUNKS = 8  # of 16 bytes, of a weight's row, that a warp takes at a time
BUFFERS, PAD, CACHED_PAGES = 2, 16, 512
MOST_ROWS = 4  # a row more costs shared memory that the ring of weights needs
MOST_SPLITS, MOST_RING, LEAST_RING = 16, 16, 5
ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh", "relu")
WEIGHTS = ("input_norm", "qkv", "o", "post_norm", "gate_up", "down")
BIASES = ("qkv_bias", "o_bias", "gate_up_bias", "down_bias")


@dataclass(frozen=True)
class Sizes:
    """What a kernel is compiled for; letters as everywhere, `page` in tokens."""

    rows: int  # B
    width: int  # H
    heads: int  # N
    kv_heads: int  # K
    head_dim: int  # D
    mlp: int  # F
    layers: int
    page: int
    eps: float
    half: bool  # float16; else bfloat16
    activation: str
    biases: tuple[str, ...] = ()


def _shared(sizes: Sizes, gpu: cuda.Gpu) -> int:
    """Bytes of shared memory beside the ring."""
    group = sizes.heads // sizes.kv_heads
    columns = max(sizes.width, sizes.heads * sizes.head_dim, sizes.mlp)
    activations = max(sizes.rows * (columns * 2 + PAD), WARPS * group * (sizes.head_dim + 2) * 4)
    pointers = 8 * (10 + sizes.layers * (8 + len(sizes.biases)))
    step = 4 * (1 + sizes.layers + 3 * sizes.rows + 2 + CACHED_PAGES)
    residual = 512 * ((sizes.width // 2 // gpu.multiprocessors + 8) // 8)
    return BUFFERS * WARPS * 512 + activations + 16 + pointers + residual + 4 * sizes.rows * WARPS + step + 128


def _ring(sizes: Sizes, gpu: cuda.Gpu) -> int:
    return min(MOST_RING, (gpu.shared_bytes - _shared(sizes, gpu)) // (WARPS * CHUNKS * 256))


def fits(sizes: Sizes, gpu: cuda.Gpu) -> bool:
    """Whether the kernel can be compiled for these sizes; where not, the layers run one by one."""
    queries = sizes.heads * sizes.head_dim
    tiled = all(columns % (8 * CHUNKS) == 0 for columns in (sizes.width, queries, sizes.mlp))
    lanes = sizes.head_dim % 4 == 0 and sizes.head_dim <= 256
    group = sizes.heads // sizes.kv_heads
    known = sizes.activation in ACTIVATIONS
    return sizes.rows <= MOST_ROWS and tiled and lanes and group <= 8 and known and _ring(sizes, gpu) >= LEAST_RING


def decode_layers(
    x: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    positions: jax.Array,
    tables: jax.Array,
    windows: jax.Array,
    layers: Sequence[Mapping[str, jax.Array]],
    k_pools: Sequence[jax.Array],
    v_pools: Sequence[jax.Array],
    sizes: Sizes,
    gpu: cuda.Gpu,
) -> tuple[jax.Array, list[jax.Array], list[jax.Array]]:
    """x [B, 1, H] through the layers; returns it and the pools with the new keys and values, in place if donated.

    cos, sin [B, 1, D/2]; positions [B, 1], -1 where a row is not live; tables [B, W]; windows [L] tokens; `layers` by
    name, weights as [out, in]; pools [P, page, K, D] per layer. Sums are float32, in one order: the same input gives
    the same bits. All blocks must run at once, so no other program may hold multiprocessors for good.

    Raises:
      CudaError: NVRTC does not take the source.
    """
    rows, kv_heads = sizes.rows, sizes.kv_heads
    group = sizes.heads // kv_heads
    splits = max(1, min(MOST_SPLITS, gpu.multiprocessors // (rows * kv_heads)))
    names = [*WEIGHTS, *(each for each in BIASES if each in sizes.biases)]
    names = [*names[:6], "k", "v", *names[6:]]
    counters = jnp.zeros((1 + sizes.layers * rows * kv_heads,), jnp.uint32)
    operands = [x, cos, sin, positions, tables, windows, jnp.full((1,), tables.shape[1], jnp.int32), counters]
    first, aliases = len(operands), {}
    # results: the new x, scratch, then what is written in place
    queries = rows * sizes.heads * sizes.head_dim
    scratch = 2 * (2 * queries + 2 * rows * sizes.width + rows * sizes.mlp) + 16
    scratch += rows * kv_heads * splits * group * (8 + 4 * sizes.head_dim)
    results = [jax.ShapeDtypeStruct(x.shape, x.dtype), jax.ShapeDtypeStruct((scratch,), jnp.uint8)]

    def in_place(array: jax.Array) -> None:
        aliases[len(operands)] = len(results)
        operands.append(array)
        results.append(jax.ShapeDtypeStruct(array.shape, array.dtype))

    for index, layer in enumerate(layers):
        for name in names:
            if name in "kv":
                in_place((k_pools if name == "k" else v_pools)[index])
            else:
                operands.append(layer[name])
    aliases[first - 1] = len(results)
    results.append(jax.ShapeDtypeStruct(counters.shape, counters.dtype))
    source, shared = _source(sizes, gpu, splits, len(operands), len(results))
    ptx = cuda.compile_ptx(source, gpu.capability)
    out = cuda.call(ptx, "decode_layers", operands, results, aliases, gpu.multiprocessors, (WARPS + 1) * 32, shared)
    return out[0], list(out[2:-1:2]), list(out[3:-1:2])


@functools.cache
def _source(sizes: Sizes, gpu: cuda.Gpu, splits: int, operands: int, results: int) -> tuple[str, int]:
    """The kernel's source for these sizes, and the shared memory it needs, in bytes."""
    ring = _ring(sizes, gpu)
    macros = {
        "B": sizes.rows,
        "H": sizes.width,
        "N": sizes.heads,
        "K": sizes.kv_heads,
        "D": sizes.head_dim,
        "F": sizes.mlp,
        "LAYERS": sizes.layers,
        "SMS": gpu.multiprocessors,
        "PAGE": sizes.page,
        "SPLITS": splits,
        "RING": ring,
        "WARPS": WARPS,
        "CHUNKS": CHUNKS,
        "EPS": f"{sizes.eps!r}f",
        "SCALE": f"{sizes.head_dim**-0.5 * 1.4426950408889634!r}f",  # softmax in powers of two
        "HALF": int(sizes.half),
        "ACTIVATION": ACTIVATIONS.index(sizes.activation),
        "QKV_BIAS": int("qkv_bias" in sizes.biases),
        "O_BIAS": int("o_bias" in sizes.biases),
        "MLP_BIAS": int("down_bias" in sizes.biases),
        "PARAMETERS": ", ".join(f"u64 p{number}" for number in range(operands + results)),
        # the operands, x's result and the scratch: what is written in place is among the operands
        "POINTERS": " ".join(f"pointers[{number}] = p{number};" for number in range(operands + 2)),
    }
    defines = "".join(f"#define {name} {value}\n" for name, value in macros.items())
    parts = [Path(__file__).with_name(f"decode_layers{part}.cu").read_text() for part in ("_stream", "_attention", "")]
    return defines + "".join(parts), _shared(sizes, gpu) + ring * WARPS * CHUNKS * 256
