"""The LLaMA family: LLaMA, Mistral, Qwen2 and 3, Gemma 1 and 2, Phi-3."""

from typing import Any

from jaxinfer.models.config import (
    ConfigError,
    ModelConfig,
    RopeConfig,
    activation,
    check_kv_heads,
    count,
    given,
    head_width,
    legal,
    number,
    optional,
    read_rope,
    special_tokens,
    stretched,
)
from jaxinfer.models.leaves import Table, attention_leaves, mlp_leaves, norm_leaves

ARCHITECTURES = {
    "LlamaForCausalLM": ("llama",),
    "MistralForCausalLM": ("mistral",),
    "Qwen2ForCausalLM": ("qwen2",),
    "Qwen3ForCausalLM": ("qwen3",),
    "GemmaForCausalLM": ("gemma",),
    "Gemma2ForCausalLM": ("gemma2",),
    "Phi3ForCausalLM": ("phi3",),
}
GEMMA = ("GemmaForCausalLM", "Gemma2ForCausalLM")
MAY_HAVE_BIAS = ("LlamaForCausalLM", "Qwen3ForCausalLM", *GEMMA)  # the others ignore the field
_TANH = "gelu_pytorch_tanh"
# what transformers takes for a field that is left out, where it is not what it takes for LLaMA
_GEMMA = {"head_dim": 256, "hidden_act": _TANH, "tie_word_embeddings": True, "bos_token_id": 2, "eos_token_id": 1}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "MistralForCausalLM": {"sliding_window": 4096},
    "Qwen2ForCausalLM": {"sliding_window": 4096, "max_window_layers": 28},
    "Qwen3ForCausalLM": {"sliding_window": 4096, "max_window_layers": 28, "head_dim": 128},
    "GemmaForCausalLM": _GEMMA,
    "Gemma2ForCausalLM": _GEMMA
    | {
        "sliding_window": 4096,
        "hidden_activation": _TANH,
        "query_pre_attn_scalar": 256,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
    "Phi3ForCausalLM": {"original_max_position_embeddings": 4096, "bos_token_id": 1, "eos_token_id": 32000},
}


def read(hf: dict[str, Any], generation: dict[str, Any]) -> ModelConfig:
    """Reads a ``config.json`` as transformers would: see `families.from_hf`."""
    architecture = hf["architectures"][0]
    hf = _DEFAULTS.get(architecture, {}) | hf
    if "head_dim" in _DEFAULTS.get(architecture, {}):
        count(hf, "head_dim")  # null is not the width's share of a head there
    layers, heads = count(hf, "num_hidden_layers"), count(hf, "num_attention_heads")
    head_dim = head_width(hf, "hidden_size", "num_attention_heads")
    bias = given(hf, "attention_bias", False) and architecture in MAY_HAVE_BIAS
    context = count(hf, "max_position_embeddings")
    rope = _rope(hf, architecture, head_dim, context)
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
        activation=_activation(hf, architecture),
        tied=given(hf, "tie_word_embeddings", False),
        qkv_bias=bias or architecture == "Qwen2ForCausalLM",
        o_bias=bias,
        mlp_bias=given(hf, "mlp_bias", False) and architecture == "LlamaForCausalLM",
        qk_norm=architecture == "Qwen3ForCausalLM",
        **_gemma(hf, architecture),
        **special_tokens(hf, generation),
    )


def _gemma(hf: dict[str, Any], architecture: str) -> dict[str, Any]:
    """What Gemma does otherwise."""
    if architecture not in GEMMA:
        return {}
    both_ways = hf.get("use_bidirectional_attention") or False
    legal(hf, "use_bidirectional_attention", both_ways, False)
    more = {"norm": "rms+1", "embed_scale": count(hf, "hidden_size") ** 0.5}
    if architecture == "GemmaForCausalLM":
        return more
    caps = {"attention_softcap": "attn_logit_softcapping", "logit_softcap": "final_logit_softcapping"}
    more |= {field: None if hf[name] is None else float(number(hf, name)) for field, name in caps.items()}
    return more | {"output_norms": True, "query_scale": number(hf, "query_pre_attn_scalar") ** -0.5}


def _activation(hf: dict[str, Any], architecture: str) -> str:
    if architecture == "Gemma2ForCausalLM":
        return activation("hidden_activation", hf["hidden_activation"])
    found = activation("hidden_act", hf.get("hidden_act", "silu"))
    if architecture != "GemmaForCausalLM":
        return found
    found = _TANH if found == "gelu" else found  # what its first files called it
    # transformers 4 took this field where it was given, 5 does not
    legal(hf, "hidden_activation", activation("hidden_activation", hf.get("hidden_activation") or found), found)
    return found


def _rope(hf: dict[str, Any], architecture: str, head_dim: int, context: int) -> RopeConfig:
    if architecture != "Phi3ForCausalLM":
        return read_rope(hf, head_dim, context)
    scaling = given(hf, "rope_scaling", {}) or given(hf, "rope_parameters", {})
    if (scaling.get("rope_type") or scaling.get("type")) in ("su", "yarn"):  # what its first files called it
        hf = hf | {"rope_scaling": scaling | {"rope_type": "longrope"}}
    # where decoding passes the trained length, transformers computes the keys so far anew with the long factors; here
    # they keep the short ones, as transformers has it for all others
    rope = read_rope(hf, head_dim, context)
    legal(hf, "rope_type", rope.kind, "default", "longrope")
    return rope


def _kv_heads(hf: dict[str, Any], architecture: str, heads: int) -> int:
    # null means one per query head; not all may leave it out (the others' defaults are a 7B model's numbers)
    if architecture in ("LlamaForCausalLM", "Phi3ForCausalLM") or "num_key_value_heads" in hf:
        hf = hf | {"num_key_value_heads": optional(hf, "num_key_value_heads") or heads}
    return check_kv_heads("num_key_value_heads", count(hf, "num_key_value_heads"), "num_attention_heads", heads)


def _windows(hf: dict[str, Any], architecture: str, layers: int) -> tuple[int | None, ...]:
    if architecture == "Phi3ForCausalLM":
        return (optional(hf, "sliding_window"),) * layers
    if architecture == "MistralForCausalLM":  # with layer_types, transformers takes it for Ministral, which is the same
        window, sliding = optional(hf, "sliding_window"), range(layers)
    elif architecture == "Gemma2ForCausalLM":
        window, sliding = count(hf, "sliding_window"), range(0, layers, 2)
    elif given(hf, "use_sliding_window", False) and architecture in ("Qwen2ForCausalLM", "Qwen3ForCausalLM"):
        window = optional(hf, "sliding_window")
        sliding = range(count(hf, "max_window_layers") if hf["max_window_layers"] != 0 else 0, layers)
    else:
        return (None,) * layers
    kinds = given(hf, "layer_types", [])
    kinds = kinds or ["sliding_attention" if i in sliding else "full_attention" for i in range(layers)]
    if len(kinds) != layers:
        raise ConfigError(f"layer_types: expected {layers}, as num_hidden_layers says, found {len(kinds)}")
    for kind in kinds:
        legal(hf, "layer_types", kind, "sliding_attention", "full_attention")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def layer_leaves(config: ModelConfig) -> Table:
    outputs = ("o_norm", "down_norm") if config.output_norms else ()
    norms = norm_leaves(config, "input_norm", "post_norm", *outputs)
    return norms | attention_leaves(config) | mlp_leaves(config, "gate", "up")
