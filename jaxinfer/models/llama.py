"""The LLaMA family's layer."""

import jax
import jax.numpy as jnp

from jaxinfer.models.block import Block, Ops
from jaxinfer.models.config import ModelConfig

# whose layers are Touvron et al.'s to the letter
PLAIN = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM")


class Layer(Block):
    """Touvron et al., "LLaMA", 2023, section 2.2."""

    arrays = {  # noqa: RUF012
        "input_norm": (0, ("input_norm",)),
        "qkv": (1, ("q", "k", "v")),
        "o": (2, ("o",)),
        "post_norm": (0, ("post_norm",)),
        "gate_up": (1, ("gate", "up")),
        "down": (1, ("down",)),
    }

    def __call__(self, x: jax.Array, delta: jax.Array | None, ops: Ops) -> tuple[jax.Array, jax.Array]:
        with jax.named_scope("attention"):
            x, normed = self.add_norm(x, delta, "input_norm", ops)
            delta = self.matmul(self.attention(normed, ops), "o", ops.reduce)
        with jax.named_scope("mlp"):
            x, normed = self.add_norm(x, delta, "post_norm", ops)
            gate, up = jnp.split(self.matmul(normed, "gate_up"), 2, axis=-1)
            return x, self.matmul(self.act(gate) * up, "down", ops.reduce)


def in_one_launch(config: ModelConfig) -> bool:
    """Whether a layer is what the kernel of `ops/decode_layers.py` computes."""
    return config.architecture in PLAIN
