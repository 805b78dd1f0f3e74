"""The Falcon family: Falcon 7B, 40B and 180B, Falcon2 11B, Falcon-RW."""

from typing import Any

from jaxinfer.models.config import (
    ConfigError,
    ModelConfig,
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

ARCHITECTURES = {"FalconForCausalLM": ("falcon",)}
# what transformers takes for a field that the file leaves out: Falcon-7B's numbers
DEFAULTS = {
    "vocab_size": 65024,
    "hidden_size": 4544,
    "num_hidden_layers": 32,
    "num_attention_heads": 71,
    "layer_norm_epsilon": 1e-5,
    "alibi": False,
    "new_decoder_architecture": False,
    "multi_query": True,
    "parallel_attn": True,
    "bias": False,
    "max_position_embeddings": 2048,
    "activation": "gelu",
    "tie_word_embeddings": True,
    "bos_token_id": 11,
    "eos_token_id": 11,
}
# fields of the files that came with the authors' own code, before transformers had the family
RENAMED = {"n_head": "num_attention_heads", "n_layer": "num_hidden_layers", "n_head_kv": "num_kv_heads"}
OLD = (
    "'RWForCausalLM' is Falcon before transformers had it: take config.json from the repository's newest revision; if "
    "there is none, write architectures FalconForCausalLM, model_type falcon, num_attention_heads for n_head, "
    "num_hidden_layers for n_layer, num_kv_heads for n_head_kv, and new_decoder_architecture true where model_type was "
    "RefinedWeb"
)


def read(hf: dict[str, Any], generation: dict[str, Any]) -> ModelConfig:
    """Reads a ``config.json`` as transformers would: see `families.from_hf`."""
    for old, name in RENAMED.items():
        if old in hf and name not in hf:
            raise ConfigError(f"{old}: not read by transformers, which calls it {name}: rename it")
    if hf.get("n_embed") is not None:
        hf = hf | {"hidden_size": count(hf, "n_embed")}
    hf = DEFAULTS | hf
    heads, context = count(hf, "num_attention_heads"), count(hf, "max_position_embeddings")
    head_dim = head_width(hf | {"head_dim": None}, "hidden_size", "num_attention_heads")
    legal(hf, "head_dim", hf.get("head_dim") or head_dim, head_dim)
    parallel = given(hf, "parallel_attn", True) or given(hf, "new_decoder_architecture", False)
    alibi = given(hf, "alibi", False)
    rope = None if alibi else read_rope(hf, head_dim, context)
    bias = given(hf, "bias", False)
    return ModelConfig(
        architecture=hf["architectures"][0],
        vocab_size=count(hf, "vocab_size"),
        hidden_size=count(hf, "hidden_size"),
        num_layers=count(hf, "num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=_kv_heads(hf, heads),
        head_dim=head_dim,
        mlp_width=4 * count(hf, "hidden_size") if hf.get("ffn_hidden_size") is None else count(hf, "ffn_hidden_size"),
        norm_eps=number(hf, "layer_norm_epsilon"),
        max_context=stretched(rope, context) if rope else context,
        rope=rope,
        windows=(None,) * count(hf, "num_hidden_layers"),
        activation=activation("activation", hf["activation"]),
        tied=given(hf, "tie_word_embeddings", True),
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=bias,
        norm="layer",
        parallel=parallel,
        parallel_norms=_norms(hf) if parallel else 1,
        alibi=alibi,
        **special_tokens(hf, generation),
    )


def _kv_heads(hf: dict[str, Any], heads: int) -> int:
    kv_heads = heads if hf.get("num_kv_heads") is None else count(hf, "num_kv_heads")
    if given(hf, "new_decoder_architecture", False):
        return check_kv_heads("num_kv_heads", kv_heads, "num_attention_heads", heads)
    if given(hf, "multi_query", True):
        return 1
    legal(hf, "num_kv_heads", kv_heads, heads)  # with neither, every query head has its own
    return heads


def _norms(hf: dict[str, Any]) -> int:
    """Norms of a parallel block. What transformers itself fails on is refused."""
    if not hf["new_decoder_architecture"]:
        legal(hf, "num_ln_in_parallel_attn", hf.get("num_ln_in_parallel_attn"), None, 1)
        return 1
    legal(hf, "parallel_attn", hf["parallel_attn"], True)
    legal(hf, "num_ln_in_parallel_attn", hf.get("num_ln_in_parallel_attn"), None, 1, 2)
    return optional(hf, "num_ln_in_parallel_attn") or 2


def layer_leaves(config: ModelConfig) -> Table:
    second = () if config.parallel and config.parallel_norms == 1 else ("mlp_norm",)
    return norm_leaves(config, "input_norm", *second) | attention_leaves(config) | mlp_leaves(config, "up")
