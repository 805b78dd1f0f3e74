"""GPT-2, and GPT-SW3, which is one."""

from typing import Any

from jaxinfer.models.config import ModelConfig, activation, count, given, head_width, legal, number, special_tokens
from jaxinfer.models.leaves import Table, attention_leaves, mlp_leaves, norm_leaves

ARCHITECTURES = {"GPT2LMHeadModel": ("gpt2", "gpt-sw3")}

# what transformers takes where a field is left out: the smallest GPT-2
DEFAULTS = {
    "vocab_size": 50257,
    "n_positions": 1024,
    "n_embd": 768,
    "n_layer": 12,
    "n_head": 12,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "bos_token_id": 50256,
    "eos_token_id": 50256,
}
# names that transformers takes too, and that count where a file has both
ALIASES = {
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}


def read(hf: dict[str, Any], generation: dict[str, Any]) -> ModelConfig:
    """Reads a ``config.json`` as transformers would: see `families.from_hf`."""
    hf = DEFAULTS | hf | {ALIASES[name]: count(hf, name) for name in ALIASES if name in hf}
    legal(hf, "scale_attn_weights", given(hf, "scale_attn_weights", True), True)
    # reorder_and_upcast_attn is not looked at: scores are summed in float32 anyway
    for name in ("scale_attn_by_inverse_layer_idx", "add_cross_attention"):
        legal(hf, name, given(hf, name, False), False)
    width, heads, layers = count(hf, "n_embd"), count(hf, "n_head"), count(hf, "n_layer")
    positions = count(hf, "n_positions")
    return ModelConfig(
        architecture=hf["architectures"][0],
        vocab_size=count(hf, "vocab_size"),
        hidden_size=width,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=head_width({"n_embd": width, "n_head": heads}, "n_embd", "n_head"),
        mlp_width=4 * width if hf.get("n_inner") is None else count(hf, "n_inner"),
        norm_eps=number(hf, "layer_norm_epsilon"),
        max_context=positions,
        rope=None,
        windows=(None,) * layers,
        activation=activation("activation_function", hf["activation_function"]),
        tied=given(hf, "tie_word_embeddings", True),
        qkv_bias=True,
        o_bias=True,
        mlp_bias=True,
        norm="layer",
        learned_positions=positions,
        **special_tokens(hf, generation),
    )


def layer_leaves(config: ModelConfig) -> Table:
    return norm_leaves(config, "input_norm", "post_norm") | attention_leaves(config) | mlp_leaves(config, "up")
