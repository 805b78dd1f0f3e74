"""OPT."""

from typing import Any

from jaxinfer.models.config import ModelConfig, activation, count, given, head_width, legal, special_tokens
from jaxinfer.models.leaves import Table, attention_leaves, mlp_leaves, norm_leaves

ARCHITECTURES = {"OPTForCausalLM": ("opt",)}

# what transformers takes where a field is left out: the smallest OPT
DEFAULTS = {
    "vocab_size": 50272,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "ffn_dim": 3072,
    "max_position_embeddings": 2048,
    "activation_function": "relu",
    "bos_token_id": 2,
    "eos_token_id": 2,
}
NORM_EPS = 1e-5  # no field says it
OFFSET = 2  # a token's row in the table of positions is its position plus this


def read(hf: dict[str, Any], generation: dict[str, Any]) -> ModelConfig:
    """Reads a ``config.json`` as transformers would: see `families.from_hf`."""
    hf = DEFAULTS | hf
    legal(hf, "layer_norm_elementwise_affine", hf.get("layer_norm_elementwise_affine", True), True)
    width, heads, layers = count(hf, "hidden_size"), count(hf, "num_attention_heads"), count(hf, "num_hidden_layers")
    embed_width = width if hf.get("word_embed_proj_dim") is None else count(hf, "word_embed_proj_dim")
    context, biases = count(hf, "max_position_embeddings"), given(hf, "enable_bias", True)
    norm_first = given(hf, "do_layer_norm_before", True)
    sizes = {"hidden_size": width, "num_attention_heads": heads}
    return ModelConfig(
        architecture=hf["architectures"][0],
        vocab_size=count(hf, "vocab_size"),
        hidden_size=width,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=head_width(sizes, "hidden_size", "num_attention_heads"),
        mlp_width=count(hf, "ffn_dim"),
        norm_eps=NORM_EPS,
        max_context=context,
        rope=None,
        windows=(None,) * layers,
        activation=activation("activation_function", hf["activation_function"]),
        tied=given(hf, "tie_word_embeddings", True),
        qkv_bias=biases,
        o_bias=biases,
        mlp_bias=biases,
        norm="layer",
        norm_first=norm_first,
        final_norm=norm_first and not given(hf, "_remove_final_layer_norm", False),
        learned_positions=context + OFFSET,
        position_offset=OFFSET,
        embed_width=None if embed_width == width else embed_width,
        **special_tokens(hf, generation),
    )


def layer_leaves(config: ModelConfig) -> Table:
    return norm_leaves(config, "input_norm", "post_norm") | attention_leaves(config) | mlp_leaves(config, "up")
