"""GPT-2's layer."""

import jax

from jaxinfer.models.block import Block, Ops


class Layer(Block):
    """Radford et al., "Language Models are Unsupervised Multitask Learners", 2019, section 2.3: Vaswani et al.'s
    decoder with the norms moved to the inputs."""

    arrays = {  # noqa: RUF012
        "input_norm": (0, ("input_norm",)),
        "qkv": (1, ("q", "k", "v")),
        "o": (2, ("o",)),
        "post_norm": (0, ("post_norm",)),
        "up": (1, ("up",)),
        "down": (1, ("down",)),
    }

    def __call__(self, x: jax.Array, delta: jax.Array | None, ops: Ops) -> tuple[jax.Array, jax.Array | None]:
        with jax.named_scope("attention"):
            x, normed = self.add_norm(x, delta, "input_norm", ops)
            delta = self.matmul(self.attention(normed, ops), "o", ops.reduce)
        with jax.named_scope("mlp"):
            x, normed = self.add_norm(ops.needed(x), delta, "post_norm", ops)
            return x, self.mlp(normed, ops)

    def mlp(self, x: jax.Array, ops: Ops) -> jax.Array:
        """Normed x [B, T, H] to the MLP's output."""
        return self.matmul(self.act(self.matmul(x, "up")), "down", ops.reduce)
