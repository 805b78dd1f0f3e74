"""The LLaMA family: LLaMA, Mistral, Qwen2."""

from typing import Any

from jaxinfer.models.config import (
    ModelConfig,
    activation,
    check_kv_heads,
    count,
    head_width,
    number,
    read_rope,
    special_tokens,
    stretched,
)
from jaxinfer.models.leaves import Table, attention_leaves, mlp_leaves, norm_leaves

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM")


def read(hf: dict[str, Any], generation: dict[str, Any]) -> ModelConfig:
    """Reads a ``config.json`` as transformers would: see `families.from_hf`."""
    architecture = hf["architectures"][0]
    layers, heads = count(hf, "num_hidden_layers"), count(hf, "num_attention_heads")
    head_dim = head_width(hf, "hidden_size", "num_attention_heads")
    llama_bias = bool(hf.get("attention_bias", False)) and architecture == "LlamaForCausalLM"
    context = count(hf, "max_position_embeddings")
    rope = read_rope(hf, head_dim, context)
    return ModelConfig(
        architecture=architecture,
        vocab_size=count(hf, "vocab_size"),
        hidden_size=count(hf, "hidden_size"),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=_kv_heads(hf, architecture, heads),
        head_dim=head_dim,
        mlp_width=count(hf, "intermediate_size"),
        norm_eps=number(hf, "rms_norm_eps"),
        max_context=stretched(rope, context),
        rope=rope,
        windows=_windows(hf, architecture, layers),
        activation=activation("hidden_act", hf.get("hidden_act", "silu")),
        tied=bool(hf.get("tie_word_embeddings", False)),
        qkv_bias=llama_bias or architecture == "Qwen2ForCausalLM",
        o_bias=llama_bias,
        mlp_bias=bool(hf.get("mlp_bias", False)) and architecture == "LlamaForCausalLM",
        **special_tokens(hf, generation),
    )


def _kv_heads(hf: dict[str, Any], architecture: str, heads: int) -> int:
    # null means one per query head; only LLaMA may leave it out (the others' defaults are a 7B model's numbers)
    if architecture == "LlamaForCausalLM" or "num_key_value_heads" in hf:
        hf = hf | {"num_key_value_heads": hf.get("num_key_value_heads") or heads}
    return check_kv_heads("num_key_value_heads", count(hf, "num_key_value_heads"), "num_attention_heads", heads)


def _windows(hf: dict[str, Any], architecture: str, layers: int) -> tuple[int | None, ...]:
    window = hf.get("sliding_window", 4096)  # what transformers takes when the field is left out; null is none
    if architecture == "LlamaForCausalLM" or not window:
        return (None,) * layers
    if architecture == "Qwen2ForCausalLM":
        if not hf.get("use_sliding_window", False):
            return (None,) * layers
        kinds = hf.get("layer_types") or [
            "sliding_attention" if i >= hf.get("max_window_layers", 28) else "full_attention" for i in range(layers)
        ]
        return tuple(window if kind == "sliding_attention" else None for kind in kinds)
    return (window,) * layers


def layer_leaves(config: ModelConfig) -> Table:
    norms = norm_leaves(config, "input_norm", "post_norm")
    return norms | attention_leaves(config) | mlp_leaves(config, "gate", "up")
