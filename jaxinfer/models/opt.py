"""OPT's layer."""

import jax

from jaxinfer.models import gpt2
from jaxinfer.models.block import Ops


class Layer(gpt2.Layer):
    """Zhang et al., "OPT", 2022, section 2.1. All published sizes but one are laid out like GPT-2; OPT-350M has each
    norm after the sum (Vaswani et al., "Attention Is All You Need", 2017, section 3.1)."""

    def __call__(self, x: jax.Array, delta: jax.Array | None, ops: Ops) -> tuple[jax.Array, jax.Array | None]:
        if self.config.norm_first:
            return super().__call__(x, delta, ops)
        # such a layer leaves nothing to be added, so that none has a delta to begin with
        with jax.named_scope("attention"):
            x = self.norm(ops.needed(x) + self.matmul(self.attention(x, ops), "o", ops.reduce), "input_norm")
        with jax.named_scope("mlp"):
            return self.norm(x + self.mlp(x, ops), "post_norm"), None
