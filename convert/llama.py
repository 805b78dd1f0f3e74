"""The LLaMA family's tensor names at Hugging Face, and which leaf of the checkpoint each one becomes."""

from dataclasses import dataclass
from math import prod

from jaxinfer.models.config import ModelConfig
from jaxinfer.models.leaves import Leaf, leaves

# Hugging Face holds a matmul as [out, in]: such a tensor is transposed; how many of the leaf's dimensions are "in"
_IN_DIMS = {"q": 1, "k": 1, "v": 1, "o": 2, "gate": 1, "up": 1, "down": 1, "head": 1}
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
    """The leaf that a tensor becomes, and the shape that the tensor must have."""

    leaf: str
    spec: Leaf
    source_shape: tuple[int, ...]
    transposed: bool


def targets(config: ModelConfig) -> dict[str, Target]:
    """Hugging Face tensor name to its `Target`, for every leaf of the model."""
    table = {}
    for leaf, spec in leaves(config).items():
        prefix, _, short = leaf.rpartition(".")
        name = f"model.{prefix}.{_LAYER[short]}" if prefix else _ENDS[leaf]
        in_dims = _IN_DIMS.get(short, 0)
        if in_dims:
            shape = (prod(spec.shape[in_dims:]), prod(spec.shape[:in_dims]))
        else:
            shape = (prod(spec.shape),) if name.endswith(".bias") else spec.shape
        table[name] = Target(leaf, spec, shape, in_dims > 0)
    return table
