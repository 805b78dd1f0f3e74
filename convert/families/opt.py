"""OPT."""

from convert.target import Names
from jaxinfer.models.config import ModelConfig

_ENDS = {
    "embed": "decoder.embed_tokens.weight",
    "positions": "decoder.embed_positions.weight",
    "project_in": "decoder.project_in.weight",
    "norm": "decoder.final_layer_norm.weight",
    "norm_bias": "decoder.final_layer_norm.bias",
    "project_out": "decoder.project_out.weight",
}
_LEAVES = {
    "input_norm": "self_attn_layer_norm.weight",
    "input_norm_bias": "self_attn_layer_norm.bias",
    "q": "self_attn.q_proj.weight",
    "k": "self_attn.k_proj.weight",
    "v": "self_attn.v_proj.weight",
    "o": "self_attn.out_proj.weight",
    "q_bias": "self_attn.q_proj.bias",
    "k_bias": "self_attn.k_proj.bias",
    "v_bias": "self_attn.v_proj.bias",
    "o_bias": "self_attn.out_proj.bias",
    "post_norm": "final_layer_norm.weight",
    "post_norm_bias": "final_layer_norm.bias",
    "up": "fc1.weight",
    "up_bias": "fc1.bias",
    "down": "fc2.weight",
    "down_bias": "fc2.bias",
}


def names(config: ModelConfig) -> Names:
    return Names(prefix="model.", ends=_ENDS, layer="decoder.layers.{}.", leaves=_LEAVES)
