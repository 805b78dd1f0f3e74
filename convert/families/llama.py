"""LLaMA, Mistral, Qwen2."""

from convert.target import Names
from jaxinfer.models.config import ModelConfig

_LEAVES = {
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


def names(config: ModelConfig) -> Names:
    return Names(
        prefix="model.",
        ends={"embed": "embed_tokens.weight", "norm": "norm.weight"},
        layer="layers.{}.",
        leaves=_LEAVES,
        ignored=(".rotary_emb.inv_freq",),
    )
