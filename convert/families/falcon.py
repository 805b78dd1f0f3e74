"""Falcon."""

from convert.target import Names, Pick
from jaxinfer.models.config import ModelConfig

_LEAVES = {
    "o": "self_attention.dense.weight",
    "o_bias": "self_attention.dense.bias",
    "up": "mlp.dense_h_to_4h.weight",
    "up_bias": "mlp.dense_h_to_4h.bias",
    "down": "mlp.dense_4h_to_h.weight",
    "down_bias": "mlp.dense_4h_to_h.bias",
}


def names(config: ModelConfig) -> Names:
    first, second = "input_layernorm", "post_attention_layernorm"
    if config.parallel and config.parallel_norms == 2:
        first, second = "ln_attn", "ln_mlp"
    norms = {"input_norm": first, "mlp_norm": second}
    return Names(
        prefix="transformer.",
        ends={"embed": "word_embeddings.weight", "norm": "ln_f.weight", "norm_bias": "ln_f.bias"},
        layer="h.{}.",
        leaves=_LEAVES
        | {leaf: f"{name}.weight" for leaf, name in norms.items()}
        | {f"{leaf}_bias": f"{name}.bias" for leaf, name in norms.items()},
        parts=_attention(config),
    )


def _attention(config: ModelConfig) -> dict[str, tuple[tuple[int, ...], dict[str, Pick]]]:
    # one KV head's group after the other, its queries, then its key, then its value; the 7B has one such group, and
    # the RW models have one per query head: the same layout in all three
    groups, each = config.num_kv_heads, config.num_heads // config.num_kv_heads + 2

    def part(which: slice) -> Pick:
        return lambda tensor: tensor.reshape(groups, each, config.head_dim, *tensor.shape[1:])[:, which]

    picks = {"q": part(slice(None, -2)), "k": part(slice(-2, -1)), "v": part(slice(-1, None))}
    rows = groups * each * config.head_dim
    parts = {"self_attention.query_key_value.weight": ((rows, config.hidden_size), picks)}
    if config.qkv_bias:
        biases = {f"{leaf}_bias": pick for leaf, pick in picks.items()}
        parts["self_attention.query_key_value.bias"] = ((rows,), biases)
    return parts
