"""What decoder layers are made of: arrays declared by name, matmuls with their biases, norms.

A family describes its layer over these. The calls run on one device's shard inside `jax.shard_map`: head counts and
widths are read off the local weights, and each collective is written out. Matmul weights are [out, in]; what is used
together is one array, joined along out (q, k and v; gate and up)."""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxinfer.models.config import ModelConfig
from jaxinfer.models.leaves import Table
from jaxinfer.ops.linear import linear
from jaxinfer.ops.norm import norm, rms_norm
from jaxinfer.parallel.placement import Parameter

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_pytorch_tanh": jax.nn.gelu,
    "relu": jax.nn.relu,
}


class Ops(NamedTuple):
    """What the engine brings to a layer.

    attend: qkv [B, T, (N + 2K) * D], not rotated yet -> [B, T, N, D], through whatever cache the engine keeps.
    add_norm: x and delta [..., H], weight [H] and epsilon -> x + delta and the RMS norm of that.
    reduce: each device's part of a sum [B, T, H] -> the sum over ``tensor``.
    needed: [B, T, ...] -> those of the tokens that anything after the layer's attention reads.
    """

    attend: Callable[[jax.Array], jax.Array]
    add_norm: Callable[[jax.Array, jax.Array, jax.Array, float], tuple[jax.Array, jax.Array]]
    reduce: Callable[[jax.Array], jax.Array]
    needed: Callable[[jax.Array], jax.Array]


def declare(module: nnx.Module, arrays: Mapping[str, tuple[int, tuple[str, ...]]], table: Table, **more: Any) -> None:
    """Gives the module its parameters: array name to the number of `in` dimensions and the leaves that it is joined of,
    where `table` has them, and their biases as the array ``NAME_bias``. `more` goes to `Parameter`."""
    prefix = "layers.{}." if "layers" in more else ""
    some = next((layer for layer in more.get("layers", ()) if layer is not None), None)
    for name, (in_dims, leaves) in arrays.items():
        biases = tuple(f"{leaf}_bias" for leaf in leaves)
        for array, dims, parts in ((name, in_dims, leaves), (f"{name}_bias", 0, biases)):
            names = [prefix + part for part in parts]
            found = tuple((each, table[each.format(some)]) for each in names if each.format(some) in table)
            if found:
                setattr(module, array, nnx.Param(Parameter("+".join(names), found, dims, **more)))


class Block(nnx.Module):
    """A decoder layer, layer numbers of its stages in `layers`. A family gives `arrays` and `__call__`:

    x [B, T, H] and delta, what is still to be added to it (None: nothing), both replicated over ``tensor``, to the same
    two: a norm that follows adds it in one kernel where there is one."""

    arrays: ClassVar[Mapping[str, tuple[int, tuple[str, ...]]]]

    def __init__(self, config: ModelConfig, table: Table, layers: tuple[int | None, ...]):
        self.config = config
        declare(self, self.arrays, table, layers=layers)

    def matmul(self, x: jax.Array, name: str, reduce: Callable[[jax.Array], jax.Array] | None = None) -> jax.Array:
        """x [B, T, in] times the array, summed over ``tensor`` where a row-cut one needs it, plus its bias if any."""
        with jax.named_scope(name):
            out = linear(x, getattr(self, name)[...])
            if reduce is not None:
                out = reduce(out)
            return self.add_bias(out, name)

    def add_bias(self, out: jax.Array, name: str) -> jax.Array:
        bias = getattr(self, f"{name}_bias", None)
        return out if bias is None else out + bias[...]

    def attention(self, x: jax.Array, ops: Ops) -> jax.Array:
        """Normed x [B, T, H] to the needed tokens' heads' outputs [B, T', N * D], what the array ``o`` takes."""
        qkv = self.matmul(x, "qkv")
        if self.config.qk_norm:
            with jax.named_scope("qk_norm"):
                qkv = self._norm_qk(qkv)
        heads = ops.needed(ops.attend(qkv))
        return heads.reshape(*heads.shape[:2], -1)

    def _norm_qk(self, qkv: jax.Array) -> jax.Array:
        """qkv [B, T, (N + 2K) * D] with an RMS norm over D of each query and key head, in one pass."""
        width = self.config.head_dim
        heads = qkv.reshape(*qkv.shape[:2], -1, width)
        queries = self.o[...].shape[-1] // width
        keys = (heads.shape[2] - queries) // 2
        parts = ((queries, self.q_norm), (keys, self.k_norm))
        weight = jnp.concatenate([jnp.broadcast_to(norm[...], (count, width)) for count, norm in parts])
        normed = rms_norm(heads[:, :, : queries + keys], weight, self.config.norm_eps)
        return jnp.concatenate([normed, heads[:, :, queries + keys :]], axis=2).reshape(qkv.shape)

    def act(self, x: jax.Array) -> jax.Array:
        return ACTIVATIONS[self.config.activation](x)

    def norm(self, x: jax.Array, name: str) -> jax.Array:
        """Of x [..., H], by the array of that name."""
        config, bias = self.config, getattr(self, f"{name}_bias", None)
        with jax.named_scope(name):
            return norm(config.norm, x, getattr(self, name)[...], None if bias is None else bias[...], config.norm_eps)

    def add_norm(self, x: jax.Array, delta: jax.Array | None, name: str, ops: Ops) -> tuple[jax.Array, jax.Array]:
        """x + delta, and the norm of that."""
        if delta is not None and self.config.norm == "rms":
            with jax.named_scope(name):
                return ops.add_norm(x, delta, getattr(self, name)[...], self.config.norm_eps)
        x = x if delta is None else x + delta
        return x, self.norm(x, name)
