"""The LLaMA family's tensor names at Hugging Face, and which leaf of the checkpoint each one becomes."""

from dataclasses import dataclass

from jaxinfer.models.config import ModelConfig
from jaxinfer.models.leaves import Leaf, leaves

_ENDS = {"embed": "model.embed_tokens.weight", "norm": "model.norm.weight", "head": "lm_head.weight"}
_LAYER = {
    "input_norm": "input_layernorm.weight",
    "q": "self_attn.q_proj.weight",
    "k": "self_attn.k_proj.weight",
    "v": "self_attn.v_proj.weight",
    "o": "self_attn.o_proj.weight",
    "q_bias": "self_attn.q_proj.bias",
    "k_bias": "self_attn.k_proj.bias",
    "v_bias": "self_attn.v_proj.bias",
    "o_bias": "self_attn.o_proj.bias",
    "post_norm": "post_attention_layernorm.weight",
    "gate": "mlp.gate_proj.weight",
    "up": "mlp.up_proj.weight",
    "down": "mlp.down_proj.weight",
    "gate_bias": "mlp.gate_proj.bias",
    "up_bias": "mlp.up_proj.bias",
    "down_bias": "mlp.down_proj.bias",
}
# buffers that older transformers saved; they follow from the config
IGNORED = (".rotary_emb.inv_freq",)


@dataclass(frozen=True)
class Target:
    """The leaf that a tensor becomes, and the shape that the tensor must have: the same numbers in the same order."""

    leaf: str
    spec: Leaf
    source_shape: tuple[int, ...]


def targets(config: ModelConfig) -> dict[str, Target]:
    """Hugging Face tensor name to its `Target`, for every leaf of the model."""
    table = {}
    for leaf, spec in leaves(config).items():
        prefix, _, short = leaf.rpartition(".")
        name = f"model.{prefix}.{_LAYER[short]}" if prefix else _ENDS[leaf]
        table[name] = Target(leaf, spec, _source_shape(spec))
    return table


def _source_shape(spec: Leaf) -> tuple[int, ...]:
    shape: list[int] = []
    for axis, size in zip(spec.axes, spec.shape):
        if axis == "head_dim":  # Hugging Face does not tell heads from their width
            shape[-1] *= size
        else:
            shape.append(size)
    return tuple(shape)
