"""The LLaMA family: LLaMA, Mistral, Qwen2.

Flax modules describe one decoder layer and the two ends; `Parameter` says which checkpoint leaves make up each array.
The calls run on one device's shard inside `jax.shard_map`: head counts and widths are read off the local weights, and
each collective is written out. Matmul weights are [out, in]; q/k/v and gate/up are fused along out."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from jaxinfer.models.config import ModelConfig
from jaxinfer.models.leaves import leaves
from jaxinfer.ops.linear import linear
from jaxinfer.ops.norm import rms_norm
from jaxinfer.parallel import collectives
from jaxinfer.parallel.placement import Parameter

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_pytorch_tanh": jax.nn.gelu,
    "relu": jax.nn.relu,
}

# Attend: qkv [B, T, (N + 2K) * D], not rotated yet -> [B, T, N, D], through whatever cache the engine keeps
Attend = Callable[[jax.Array], jax.Array]
# AddNorm: x and delta [..., H], weight [H] and epsilon -> x + delta and the norm of that
AddNorm = Callable[[jax.Array, jax.Array, jax.Array, float], tuple[jax.Array, jax.Array]]
# Reduce: each device's part of a sum [B, T, H] -> the sum over ``tensor``
Reduce = Callable[[jax.Array], jax.Array]


class Layer(nnx.Module):
    """One decoder layer (Touvron et al., "LLaMA", 2023, section 2.2), layer numbers of its stages in `layers`."""

    def __init__(self, config: ModelConfig, layers: tuple[int | None, ...]):
        self.config = config
        table = leaves(config)
        some = next(layer for layer in layers if layer is not None)

        def weight(in_dims: int, *names: str) -> nnx.Param:
            parts = tuple((f"layers.{{}}.{name}", table[f"layers.{some}.{name}"]) for name in names)
            return nnx.Param(Parameter("+".join(f"layers.{{}}.{name}" for name in names), parts, in_dims, layers))

        self.input_norm = weight(0, "input_norm")
        self.qkv = weight(1, "q", "k", "v")
        self.o = weight(2, "o")
        self.post_norm = weight(0, "post_norm")
        self.gate_up = weight(1, "gate", "up")
        self.down = weight(1, "down")
        if config.qkv_bias:
            self.qkv_bias = weight(0, "q_bias", "k_bias", "v_bias")
        if config.o_bias:
            self.o_bias = weight(0, "o_bias")
        if config.mlp_bias:
            self.gate_up_bias, self.down_bias = weight(0, "gate_bias", "up_bias"), weight(0, "down_bias")

    def __call__(
        self, x: jax.Array, delta: jax.Array | None, attend: Attend, add_norm: AddNorm, reduce: Reduce
    ) -> tuple[jax.Array, jax.Array]:
        """x [B, T, H] and delta, what is still to be added to it (None: nothing); both replicated over ``tensor``.

        Returns the same two: the next norm adds the MLP's output, in one kernel where there is one."""
        eps = self.config.norm_eps
        with jax.named_scope("attention"):
            if delta is None:
                normed = rms_norm(x, self.input_norm[...], eps)
            else:
                x, normed = add_norm(x, delta, self.input_norm[...], eps)
            delta = self._attention(normed, attend, reduce)
        with jax.named_scope("mlp"):
            x, normed = add_norm(x, delta, self.post_norm[...], eps)
            return x, self._mlp(normed, reduce)

    def _attention(self, x: jax.Array, attend: Attend, reduce: Reduce) -> jax.Array:
        qkv = linear(x, self.qkv[...])
        if self.config.qkv_bias:
            qkv = qkv + self.qkv_bias[...]
        mixed = attend(qkv)
        out = reduce(linear(mixed.reshape(*x.shape[:2], -1), self.o[...]))
        return out + self.o_bias[...] if self.config.o_bias else out

    def _mlp(self, x: jax.Array, reduce: Reduce) -> jax.Array:
        both = linear(x, self.gate_up[...])
        if self.config.mlp_bias:
            both = both + self.gate_up_bias[...]
        gate, up = jnp.split(both, 2, axis=-1)
        out = reduce(linear(ACTIVATIONS[self.config.activation](gate) * up, self.down[...]))
        return out + self.down_bias[...] if self.config.mlp_bias else out


class Ends(nnx.Module):
    """Embedding, final norm and head, the vocabulary cut over ``stage`` and ``tensor``."""

    def __init__(self, config: ModelConfig):
        self.config = config
        table = leaves(config)

        def weight(in_dims: int, name: str) -> nnx.Param:
            return nnx.Param(Parameter(name, ((name, table[name]),), in_dims))

        self.embed, self.norm = weight(1, "embed"), weight(0, "norm")
        if not config.tied:
            self.head = weight(1, "head")

    def embedding(self, tokens: jax.Array, peers: jax.Array | None = None) -> jax.Array:
        """Tokens [...] to [..., H] on every device; ids outside this device's rows add zero to the sum."""
        table = self.embed[...]
        row = tokens - collectives.vocab_rank() * table.shape[0]
        mine = (row >= 0) & (row < table.shape[0])
        return collectives.vocab_sum(jnp.where(mine[..., None], table[jnp.where(mine, row, 0)], 0), peers)

    def logits(self, x: jax.Array) -> jax.Array:
        """x [B, H] to float32 logits [B, V / n] of this device's part of the vocabulary."""
        x = rms_norm(x, self.norm[...], self.config.norm_eps)
        with jax.named_scope("head"):
            return linear(x, self.embed[...] if self.config.tied else self.head[...], jnp.float32)
