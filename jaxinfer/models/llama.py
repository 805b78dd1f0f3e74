"""The LLaMA family's layer."""

import jax
import jax.numpy as jnp

from jaxinfer.models.block import Block, Ops
from jaxinfer.models.config import ModelConfig

# whose layers are Touvron et al.'s to the letter
PLAIN = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Phi3ForCausalLM")


class Layer(Block):
    """Touvron et al., "LLaMA", 2023, section 2.2; with norms of attention's and the MLP's outputs, Gemma Team,
    "Gemma 2", 2024, section 2."""

    arrays = {  # noqa: RUF012
        "input_norm": (0, ("input_norm",)),
        "qkv": (1, ("q", "k", "v")),
        "q_norm": (0, ("q_norm",)),
        "k_norm": (0, ("k_norm",)),
        "o": (2, ("o",)),
        "o_norm": (0, ("o_norm",)),
        "post_norm": (0, ("post_norm",)),
        "gate_up": (1, ("gate", "up")),
        "down": (1, ("down",)),
        "down_norm": (0, ("down_norm",)),
    }

    def __call__(self, x: jax.Array, delta: jax.Array | None, ops: Ops) -> tuple[jax.Array, jax.Array]:
        with jax.named_scope("attention"):
            x, normed = self.add_norm(x, delta, "input_norm", ops)
            delta = self._out(self.attention(normed, ops), "o", ops)
        with jax.named_scope("mlp"):
            x, normed = self.add_norm(ops.needed(x), delta, "post_norm", ops)
            gate, up = jnp.split(self.matmul(normed, "gate_up"), 2, axis=-1)
            return x, self._out(self.act(gate) * up, "down", ops)

    def _out(self, x: jax.Array, name: str, ops: Ops) -> jax.Array:
        out = self.matmul(x, name, ops.reduce)
        return self.norm(out, f"{name}_norm") if self.config.output_norms else out


def in_one_launch(config: ModelConfig) -> bool:
    """Whether a layer is what the kernel of `ops/decode_layers.py` computes."""
    return config.architecture in PLAIN
