"""GPT-2 and GPT-SW3: their weights are [in, out]."""

from convert.target import Names, columns
from jaxinfer.models.config import ModelConfig

_LEAVES = {
    "input_norm": "ln_1.weight",
    "input_norm_bias": "ln_1.bias",
    "o_bias": "attn.c_proj.bias",
    "post_norm": "ln_2.weight",
    "post_norm_bias": "ln_2.bias",
    "up_bias": "mlp.c_fc.bias",
    "down_bias": "mlp.c_proj.bias",
}


def names(config: ModelConfig) -> Names:
    width, mlp = config.hidden_size, config.mlp_width
    qkv = columns(width, width, width)
    return Names(
        prefix="transformer.",
        ends={
            "embed": "wte.weight",
            "positions": "wpe.weight",
            "norm": "ln_f.weight",
            "norm_bias": "ln_f.bias",
        },
        layer="h.{}.",
        leaves=_LEAVES,
        parts={
            "attn.c_attn.weight": ((width, 3 * width), dict(zip("qkv", qkv))),
            "attn.c_attn.bias": ((3 * width,), dict(zip(("q_bias", "k_bias", "v_bias"), qkv))),
            "attn.c_proj.weight": ((width, width), {"o": columns(width)[0]}),
            "mlp.c_fc.weight": ((width, mlp), {"up": columns(mlp)[0]}),
            "mlp.c_proj.weight": ((mlp, width), {"down": columns(width)[0]}),
        },
        ignored=(".attn.bias", ".attn.masked_bias"),
    )
