"""LLaMA, Mistral, Qwen2 and 3, Gemma 1 and 2, Phi-3."""

from convert.target import Names, Pick, rows
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
    "q_norm": "self_attn.q_norm.weight",
    "k_norm": "self_attn.k_norm.weight",
    "post_norm": "post_attention_layernorm.weight",
    "gate": "mlp.gate_proj.weight",
    "up": "mlp.up_proj.weight",
    "down": "mlp.down_proj.weight",
    "gate_bias": "mlp.gate_proj.bias",
    "up_bias": "mlp.up_proj.bias",
    "down_bias": "mlp.down_proj.bias",
}

# where attention's and the MLP's outputs are normed: the name of LLaMA's second norm is the first output's
_OUTPUT_NORMS = {
    "o_norm": "post_attention_layernorm.weight",
    "post_norm": "pre_feedforward_layernorm.weight",
    "down_norm": "post_feedforward_layernorm.weight",
}


def names(config: ModelConfig) -> Names:
    return Names(
        prefix="model.",
        ends={"embed": "embed_tokens.weight", "norm": "norm.weight"},
        layer="layers.{}.",
        leaves=_LEAVES | (_OUTPUT_NORMS if config.output_norms else {}),
        parts=_fused(config) if config.architecture == "Phi3ForCausalLM" else {},
        ignored=(".rotary_emb.inv_freq",),
    )


def _fused(config: ModelConfig) -> dict[str, tuple[tuple[int, ...], dict[str, Pick]]]:
    width, queries, keys = config.hidden_size, config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    qkv = dict(zip("qkv", rows(queries, keys, keys)))
    gate_up = dict(zip(("gate", "up"), rows(config.mlp_width, config.mlp_width)))
    return {
        "self_attn.qkv_proj.weight": ((queries + 2 * keys, width), qkv),
        "mlp.gate_up_proj.weight": ((2 * config.mlp_width, width), gate_up),
    }
