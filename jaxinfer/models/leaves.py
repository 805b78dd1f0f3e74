"""What a checkpoint holds: every leaf's shape and logical axes. Here are the two ends and the words for the layers;
what a layer is made of is in its family's file."""

from collections.abc import Callable
from dataclasses import dataclass

from jaxinfer.models.config import ModelConfig


@dataclass(frozen=True)
class Leaf:
    """An array of the checkpoint: its shape and, per dimension, the logical axis (parallel/placement.py `Rules`)."""

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]


Table = dict[str, Leaf]


def shaper(config: ModelConfig) -> Callable[..., Leaf]:
    """A function from logical axes to the `Leaf` that has them; matmul weights are [out, in], as at Hugging Face."""
    sizes = {
        "vocab": config.vocab_size,
        "embed": config.hidden_size,
        "heads": config.num_heads,
        "kv_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "mlp": config.mlp_width,
    }
    return lambda *axes: Leaf(tuple(sizes[axis] for axis in axes), axes)


def norm_leaves(config: ModelConfig, *names: str) -> Table:
    """Norms over the width; a layer norm has a bias."""
    leaf = shaper(config)("embed")
    table = dict.fromkeys(names, leaf)
    return table | ({f"{name}_bias": leaf for name in names} if config.norm == "layer" else {})


def attention_leaves(config: ModelConfig) -> Table:
    leaf = shaper(config)
    table = {
        "q": leaf("heads", "head_dim", "embed"),
        "k": leaf("kv_heads", "head_dim", "embed"),
        "v": leaf("kv_heads", "head_dim", "embed"),
        "o": leaf("embed", "heads", "head_dim"),
    }
    if config.qk_norm:
        table |= {"q_norm": leaf("head_dim"), "k_norm": leaf("head_dim")}
    if config.qkv_bias:
        table |= {"q_bias": leaf("heads", "head_dim"), "k_bias": leaf("kv_heads", "head_dim")}
        table["v_bias"] = leaf("kv_heads", "head_dim")
    return table | ({"o_bias": leaf("embed")} if config.o_bias else {})


def mlp_leaves(config: ModelConfig, *into: str) -> Table:
    """`into`: the matrices that lead to the MLP's width, ``gate`` and ``up`` or ``up`` alone."""
    leaf = shaper(config)
    table = {name: leaf("mlp", "embed") for name in into} | {"down": leaf("embed", "mlp")}
    if config.mlp_bias:
        table |= {f"{name}_bias": leaf("mlp") for name in into} | {"down_bias": leaf("embed")}
    return table


def end_leaves(config: ModelConfig) -> Table:
    embed = Leaf((config.vocab_size, config.embed_width or config.hidden_size), ("vocab", "embed"))
    table = {"embed": embed}
    if config.learned_positions:
        table["positions"] = Leaf((config.learned_positions, config.hidden_size), (None, "embed"))
    if config.embed_width:
        table["project_in"] = Leaf((config.hidden_size, config.embed_width), ("embed", "embed"))
        table["project_out"] = Leaf((config.embed_width, config.hidden_size), ("embed", "embed"))
    if config.final_norm:
        table |= norm_leaves(config, "norm")
    return table | ({} if config.tied else {"head": embed})
