"""The collectives of the forward pass, each a line in the source. All run inside `jax.shard_map` over all axes; a trace
calls them by kind and mesh axes, "all_reduce_tensor" say."""

import jax
import jax.numpy as jnp

from jaxinfer.parallel.all_reduce import peer_sum, shots
from jaxinfer.parallel.axes import VOCAB_AXES


def tensor_sum(x: jax.Array, peers: jax.Array | None = None) -> jax.Array:
    """Adds the partial products of a row-cut matmul over the tensor axis; over the memory of `peers`, where there is a
    table of them (`peer.connect`), if that is quicker for so many bytes."""
    with jax.named_scope("all_reduce_tensor"):
        if peers is not None and shots(x.nbytes, x.dtype, peers.shape[-2] - 1) is not None:
            return peer_sum(x, peers)
        return jax.lax.psum(x, "tensor")


def from_last_stage(x: jax.Array) -> jax.Array:
    """Gives every stage the last stage's x: the head is cut over the stages too."""
    stages = jax.lax.axis_size("stage")
    if stages == 1:
        return x
    with jax.named_scope("all_reduce_stage"):
        last = jax.lax.axis_index("stage") == stages - 1
        return jax.lax.psum(jnp.where(last, x, 0), "stage")


def to_next_stage(x: jax.Array) -> jax.Array:
    stages = jax.lax.axis_size("stage")
    if stages == 1:
        return x
    with jax.named_scope("send_stage"):
        return jax.lax.ppermute(x, "stage", [(stage, (stage + 1) % stages) for stage in range(stages)])


def vocab_ways() -> int:
    return jax.lax.axis_size("stage") * jax.lax.axis_size("tensor")


def vocab_rank() -> jax.Array:
    return jax.lax.axis_index("stage") * jax.lax.axis_size("tensor") + jax.lax.axis_index("tensor")


def vocab_sum(x: jax.Array, peers: jax.Array | None = None) -> jax.Array:
    if jax.lax.axis_size("stage") == 1:
        return tensor_sum(x, peers)
    with jax.named_scope("all_reduce_stage_tensor"):
        return jax.lax.psum(x, VOCAB_AXES)


def vocab_gather(x: jax.Array) -> jax.Array:
    """Joins every vocabulary shard's x along a new leading axis, on all of them."""
    with jax.named_scope("all_gather_stage_tensor"):
        return jax.lax.all_gather(x, VOCAB_AXES)


def rows_for_columns(x: jax.Array) -> jax.Array:
    """From [rows, V / n] on each of n vocabulary shards to [ceil(rows / n), V]: whole rows, spread over the shards."""
    n = vocab_ways()
    if n == 1:
        return x
    x = jnp.pad(x, ((0, -x.shape[0] % n), (0, 0)))
    with jax.named_scope("all_to_all_stage_tensor"):
        return jax.lax.all_to_all(x, VOCAB_AXES, split_axis=0, concat_axis=1, tiled=True)


def own_rows(x: jax.Array) -> jax.Array:
    """The rows of a replicated [rows, ...] that `rows_for_columns` gives this device."""
    n = vocab_ways()
    if n == 1:
        return x
    x = jnp.pad(x, ((0, -x.shape[0] % n), *((0, 0),) * (x.ndim - 1)))
    size = x.shape[0] // n
    return jax.lax.dynamic_slice_in_dim(x, vocab_rank() * size, size)


def all_rows(x: jax.Array, rows: int) -> jax.Array:
    """Undoes `own_rows`: every device gets all rows."""
    if vocab_ways() == 1:
        return x
    with jax.named_scope("all_gather_stage_tensor"):
        return jax.lax.all_gather(x, VOCAB_AXES, tiled=True)[:rows]


def gather_data(x: jax.Array) -> jax.Array:
    """Stacks every data shard's x along a new leading axis, on all of them, so that each process reads all results."""
    with jax.named_scope("all_gather_data"):
        return jax.lax.all_gather(x, "data")
