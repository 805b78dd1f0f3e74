"""What a model has to read and to multiply, from its shapes: for floors of benchmarks and for predictions.

Letters: B sequences, S cached tokens of each, L layers, H width, N query heads, K KV heads, D head width, V vocabulary.

- A decode step reads every weight once, except an untied embedding's table (a row per sequence is all it needs), and
  each cached key and value once: ``weights + B S 2 L K D`` numbers. It multiplies by every matrix: ``2 B weights``
  floating-point operations, and ``4 B S L N D`` for attention.
- Prefill computes ``2 T`` per weight of the layers' matrices for T prompt tokens, ``4 L N D T (T + 1) / 2`` per prompt
  for causal attention, and the head for the last token of each prompt alone. Of the last layer's products all but those
  that make keys and values are for that token alone, too.
"""

from collections.abc import Sequence
from math import prod

from jaxinfer.models.config import ModelConfig
from jaxinfer.models.families import leaves


def count_parameters(model: ModelConfig) -> int:
    return sum(prod(leaf.shape) for leaf in leaves(model).values())


def decode_weights(model: ModelConfig) -> int:
    """Numbers that a decode step has to read: all but the table of an untied embedding."""
    return count_parameters(model) - (0 if model.tied else prod(leaves(model)["embed"].shape))


def cache_numbers(model: ModelConfig, cached: float) -> float:
    """Cached keys and values that the next token of a sequence with `cached` tokens looks at."""
    return 2 * model.num_kv_heads * model.head_dim * sum(min(cached, window or cached) for window in model.windows)


def decode_flops(model: ModelConfig, batch: int, cached: float) -> float:
    """Floating-point operations of a decode step of `batch` sequences with `cached` tokens each."""
    groups = model.num_heads / model.num_kv_heads
    return 2 * batch * (decode_weights(model) + groups * cache_numbers(model, cached))


def matrices(model: ModelConfig) -> int:
    """Numbers in the layers' matrices."""
    return sum(_matrices(model, "layers.").values())


def _matrices_of_the_last_token(model: ModelConfig) -> int:
    """Of the last layer, without what makes keys and values."""
    last = f"layers.{model.num_layers - 1}."
    return sum(size for name, size in _matrices(model, last).items() if name not in (f"{last}k", f"{last}v"))


def _matrices(model: ModelConfig, prefix: str) -> dict[str, int]:
    return {
        name: prod(leaf.shape)
        for name, leaf in leaves(model).items()
        if name.startswith(prefix) and len(leaf.shape) > 1 and not name.endswith("_bias")
    }


def prefill_flops(model: ModelConfig, lengths: Sequence[int]) -> float:
    """Floating-point operations until every prompt of `lengths` tokens has its first output token."""
    pairs = sum(_pairs(length, window or length) for length in lengths for window in model.windows)
    attention = 4 * model.num_heads * model.head_dim * pairs
    head = 2 * len(lengths) * prod(leaves(model)["embed"].shape)
    of_last = 2 * (sum(lengths) - len(lengths)) * _matrices_of_the_last_token(model)
    return 2 * sum(lengths) * matrices(model) - of_last + attention + head


def _pairs(length: int, window: int) -> int:
    """Pairs of a query and a key that it sees."""
    window = min(length, window)
    return window * (window + 1) // 2 + (length - window) * window
