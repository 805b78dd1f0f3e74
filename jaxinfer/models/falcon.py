"""The Falcon family's layer."""

import jax

from jaxinfer.models.block import Block, Ops
from jaxinfer.ops.linear import linear


class Layer(Block):
    """Almazrouei et al., "The Falcon Series of Open Language Models", 2023: attention and MLP in
    parallel, or in Falcon-RW one after the other."""

    arrays = {  # noqa: RUF012
        "input_norm": (0, ("input_norm",)),
        "qkv": (1, ("q", "k", "v")),
        "o": (2, ("o",)),
        "mlp_norm": (0, ("mlp_norm",)),
        "up": (1, ("up",)),
        "down": (1, ("down",)),
    }

    def __call__(self, x: jax.Array, delta: jax.Array | None, ops: Ops) -> tuple[jax.Array, jax.Array]:
        if self.config.parallel:
            return self.parallel(x, delta, ops)
        with jax.named_scope("attention"):
            x, normed = self.add_norm(x, delta, "input_norm", ops)
            delta = self.matmul(self.attention(normed, ops), "o", ops.reduce)
        with jax.named_scope("mlp"):
            x, normed = self.add_norm(ops.needed(x), delta, "mlp_norm", ops)
            return x, self.matmul(self.wide(normed), "down", ops.reduce)

    def parallel(self, x: jax.Array, delta: jax.Array | None, ops: Ops) -> tuple[jax.Array, jax.Array]:
        with jax.named_scope("attention"):
            x, normed = self.add_norm(x, delta, "input_norm", ops)
            heads = self.attention(normed, ops)
            with jax.named_scope("o"):
                attended = linear(heads, self.o[...])
        with jax.named_scope("mlp"):
            x = ops.needed(x)
            normed = self.norm(x, "mlp_norm") if self.config.parallel_norms == 2 else ops.needed(normed)
            wide = self.wide(normed)
            with jax.named_scope("down"):
                # both are parts of sums over `tensor`: added first, one sum does for the layer
                out = ops.reduce(attended + linear(wide, self.down[...]))
            return x, self.add_bias(self.add_bias(out, "o"), "down")

    def wide(self, normed: jax.Array) -> jax.Array:
        """Normed x [B, T, H] to the MLP's [B, T, F]."""
        return self.act(self.matmul(normed, "up"))
