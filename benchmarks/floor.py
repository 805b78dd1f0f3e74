"""The least time that a device could need, from the model's shapes and what the device was measured to do.

Letters: B sequences, S cached tokens of each, L layers, H width, N query heads, K KV heads, D head width, V vocabulary.

- A decode step reads every weight once, except an untied embedding's table (a row per sequence is all it needs), and
  each cached key and value once: ``weights + B S 2 L K D`` numbers. It multiplies by every matrix: ``2 B weights``
  floating-point operations, and ``4 B S L N D`` for attention. The floor is the larger of reading and computing.
- Prefill computes ``2 T`` per weight of the layers' matrices for T prompt tokens, ``4 L N D T (T + 1) / 2`` per prompt
  for causal attention, and the head for the last token of each prompt alone.

Over a mesh: ``tensor`` cuts weights, ``data`` and ``stage`` cut the batch, and each microbatch of a pipeline
reads all weights once, stage by stage: a step of all microbatches takes ``weights / tensor + cache / devices``.
Communication and launches count as nothing, so that no layout can do better.
"""

from collections.abc import Mapping, Sequence
from math import prod

from benchmarks.limits import Limits
from jaxinfer.models.config import ModelConfig
from jaxinfer.models.leaves import leaves


def parameters(model: ModelConfig) -> int:
    return sum(prod(leaf.shape) for leaf in leaves(model).values())


def decode_weights(model: ModelConfig) -> int:
    """Numbers that a decode step has to read: all but the table of an untied embedding."""
    return parameters(model) - (0 if model.tied else model.vocab_size * model.hidden_size)


def cache_numbers(model: ModelConfig, cached: float) -> float:
    """Cached keys and values that the next token of a sequence with `cached` tokens looks at."""
    return 2 * model.num_kv_heads * model.head_dim * sum(min(cached, window or cached) for window in model.windows)


def step_bytes(model: ModelConfig, batch: int, cached: float, item: int) -> float:
    """Bytes that a decode step of `batch` sequences reads, with `item` bytes per number."""
    return item * (decode_weights(model) + batch * cache_numbers(model, cached))


def step_seconds(
    model: ModelConfig, batch: int, cached: float, item: int, limits: Limits, mesh: Mapping[str, int]
) -> float:
    """Least time of a decode step of `batch` sequences with `cached` tokens each."""
    devices = prod(mesh.values())
    weights = item * decode_weights(model) / mesh["tensor"]
    cache = item * batch * cache_numbers(model, cached) / devices
    groups = model.num_heads / model.num_kv_heads
    flops = 2 * batch * (decode_weights(model) + groups * cache_numbers(model, cached)) / devices
    return max((weights + cache) / limits.copy_bytes_per_s, flops / limits.matmul_flops_per_s)


def prefill_flops(model: ModelConfig, lengths: Sequence[int]) -> float:
    """Floating-point operations until every prompt of `lengths` tokens has its first output token."""
    matrices = sum(
        prod(leaf.shape)
        for name, leaf in leaves(model).items()
        if name.startswith("layers.") and len(leaf.shape) > 1 and not name.endswith("_bias")
    )
    pairs = sum(_pairs(length, window or length) for length in lengths for window in model.windows)
    attention = 4 * model.num_heads * model.head_dim * pairs
    return 2 * sum(lengths) * matrices + attention + 2 * len(lengths) * model.hidden_size * model.vocab_size


def prefill_seconds(model: ModelConfig, lengths: Sequence[int], limits: Limits, mesh: Mapping[str, int]) -> float:
    """Least time until every prompt has its first output token: all devices at the measured matmul rate."""
    return prefill_flops(model, lengths) / (limits.matmul_flops_per_s * prod(mesh.values()))


def offline_seconds(
    model: ModelConfig,
    lengths: Sequence[int],
    new_tokens: int,
    max_batch: int,
    item: int,
    limits: Limits,
    mesh: Mapping[str, int],
) -> float:
    """Least time of a whole offline run: prefill, then decode steps that are all full, at the mean length."""
    batch = min(max_batch * mesh["data"], len(lengths))
    steps = len(lengths) * (new_tokens - 1) / batch
    cached = sum(lengths) / len(lengths) + new_tokens / 2
    return prefill_seconds(model, lengths, limits, mesh) + steps * step_seconds(
        model, batch, cached, item, limits, mesh
    )


def _pairs(length: int, window: int) -> int:
    """Pairs of a query and a key that it sees."""
    window = min(length, window)
    return window * (window + 1) // 2 + (length - window) * window
