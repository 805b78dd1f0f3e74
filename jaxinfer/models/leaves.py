"""What a checkpoint of the LLaMA family holds: every leaf's shape and logical axes, the one place that says so."""

from dataclasses import dataclass

from jaxinfer.models.config import ModelConfig


@dataclass(frozen=True)
class Leaf:
    """An array of the checkpoint: its shape and, per dimension, the logical axis (parallel/placement.py `Rules`)."""

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]


def leaves(config: ModelConfig) -> dict[str, Leaf]:
    """Leaf name to `Leaf`, matmul weights as [out, in], as Hugging Face has them."""
    sizes = {
        "vocab": config.vocab_size,
        "embed": config.hidden_size,
        "heads": config.num_heads,
        "kv_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "mlp": config.mlp_width,
    }

    def leaf(*axes: str) -> Leaf:
        return Leaf(tuple(sizes[axis] for axis in axes), axes)

    layer = {
        "input_norm": leaf("embed"),
        "q": leaf("heads", "head_dim", "embed"),
        "k": leaf("kv_heads", "head_dim", "embed"),
        "v": leaf("kv_heads", "head_dim", "embed"),
        "o": leaf("embed", "heads", "head_dim"),
        "post_norm": leaf("embed"),
        "gate": leaf("mlp", "embed"),
        "up": leaf("mlp", "embed"),
        "down": leaf("embed", "mlp"),
    }
    if config.qkv_bias:
        layer |= {"q_bias": leaf("heads", "head_dim"), "k_bias": leaf("kv_heads", "head_dim")}
        layer |= {"v_bias": leaf("kv_heads", "head_dim")}
    if config.o_bias:
        layer["o_bias"] = leaf("embed")
    if config.mlp_bias:
        layer |= {"gate_bias": leaf("mlp"), "up_bias": leaf("mlp"), "down_bias": leaf("embed")}
    table = {"embed": leaf("vocab", "embed"), "norm": leaf("embed")}
    if not config.tied:
        table["head"] = leaf("vocab", "embed")
    for index in range(config.num_layers):
        table |= {f"layers.{index}.{name}": each for name, each in layer.items()}
    return table
