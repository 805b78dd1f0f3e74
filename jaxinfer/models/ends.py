"""Embedding, final norm and head: what is before the first layer and after the last, the same for all families."""

import jax
import jax.numpy as jnp
from flax import nnx

from jaxinfer.models.block import declare
from jaxinfer.models.config import ModelConfig
from jaxinfer.models.leaves import Table
from jaxinfer.ops.linear import linear
from jaxinfer.ops.norm import norm
from jaxinfer.parallel import collectives

ARRAYS = {
    "embed": (1, ("embed",)),
    "positions": (1, ("positions",)),
    "project_in": (1, ("project_in",)),
    "norm": (0, ("norm",)),
    "project_out": (1, ("project_out",)),
    "head": (1, ("head",)),
}


class Ends(nnx.Module):
    """The vocabulary is cut over ``stage`` and ``tensor``; all else is on every device."""

    def __init__(self, config: ModelConfig, table: Table):
        self.config = config
        declare(self, ARRAYS, table)

    def embedding(self, tokens: jax.Array, positions: jax.Array, peers: jax.Array | None = None) -> jax.Array:
        """Tokens [...] at positions [...], below 0 where not live, to [..., H] on every device.

        Ids outside this device's rows add zero to the sum."""
        table = self.embed[...]
        row = tokens - collectives.vocab_rank() * table.shape[0]
        mine = (row >= 0) & (row < table.shape[0])
        x = collectives.vocab_sum(jnp.where(mine[..., None], table[jnp.where(mine, row, 0)], 0), peers)
        if self.config.embed_scale != 1:
            x = x * jnp.asarray(self.config.embed_scale, x.dtype)
        if self.config.embed_width:
            x = linear(x, self.project_in[...])
        if self.config.learned_positions:
            x = x + self.positions[...][jnp.maximum(positions, 0) + self.config.position_offset]
        return x

    def logits(self, x: jax.Array) -> jax.Array:
        """x [B, H] to float32 logits [B, V / n] of this device's part of the vocabulary."""
        config = self.config
        with jax.named_scope("head"):
            if config.final_norm:
                bias = getattr(self, "norm_bias", None)
                x = norm(config.norm, x, self.norm[...], None if bias is None else bias[...], config.norm_eps)
            if config.embed_width:
                x = linear(x, self.project_out[...])
            logits = linear(x, self.embed[...] if config.tied else self.head[...], jnp.float32)
            cap = config.logit_softcap
            return logits if cap is None else cap * jnp.tanh(logits / cap)
