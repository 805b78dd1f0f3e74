"""The sum over a `tensor` group by a kernel that writes into the other GPUs' memory (all_reduce.cu says how), for
messages of decode steps. The plain form is `jax.lax.psum`, which is faster for large ones."""

import functools
from pathlib import Path

import jax
import numpy as np

from jaxinfer.ops import cuda

KINDS = ("bfloat16", "float16", "float32")
UNIT, LINE = 8, 16  # bytes: of data, and with the epoch
THREADS, BLOCKS, HEAD = 128, 256, 4096
ONE_SHOT = 2**16  # bytes; above it, two hops with less to send are faster than one
PATIENCE_S = 600.0  # for a rank that still compiles; the watch over the processes (cluster/) is quicker


def inbox_bytes(ranks: int) -> int:
    """Of the memory, zero at first, that the other ranks write to. Whole blocks of 2 MiB, as handles to it share."""
    return -(-(HEAD + 2 * BLOCKS * 2 * ranks * THREADS * LINE) // 2**21) * 2**21


def shots(size: int, dtype: np.dtype, ranks: int) -> int | None:
    """1 or 2, the hops in which `size` bytes are summed; None where the kernel cannot, or psum would be faster."""
    if dtype.name not in KINDS or size == 0 or size % UNIT:
        return None
    room = BLOCKS * THREADS * UNIT
    if size <= (room if ranks == 2 else ONE_SHOT):
        return 1
    return 2 if size % (UNIT * ranks) == 0 and size <= room * ranks else None


def peer_sum(x: jax.Array, peers: jax.Array, hops: int | None = None, patience_s: float = PATIENCE_S) -> jax.Array:
    """The sum of x over the ranks of `peers`, the same bits on all: added in float32, in the order of ranks.

    Inside `jax.shard_map`. `peers` is this device's part of `peer.connect`'s table, [..., ranks + 1, 2]. Two sums of a
    program must depend on each other, so that they run in the same order, one by one, on all ranks.
    """
    ranks = peers.shape[-2] - 1
    hops = hops or shots(x.nbytes, x.dtype, ranks)
    threads = -(-x.nbytes // UNIT // (1 if hops == 1 else ranks))
    ptx = _ptx(ranks, x.nbytes // UNIT, hops, x.dtype.name, patience_s)
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return cuda.call(ptx, "all_reduce", [x, peers], [shape], {}, -(-threads // THREADS), THREADS, 0)[0]


@functools.cache
def _ptx(ranks: int, units: int, hops: int, kind: str, patience_s: float) -> str:
    macros = {
        "RANKS": ranks,
        "UNITS": units,
        "SHOTS": hops,
        "KIND": KINDS.index(kind),
        "BLOCKS": BLOCKS,
        "THREADS": THREADS,
        "HEAD": HEAD,
        "PATIENCE": f"{round(patience_s * 1e9)}ull",
    }
    defines = "".join(f"#define {name} {value}\n" for name, value in macros.items())
    return cuda.compile_ptx(defines + Path(__file__).with_name("all_reduce.cu").read_text(), "8.0")
