"""The least time that a device could need, from the model's shapes and what the device was measured to do.

`jaxinfer/engine/costs.py` counts bytes and floating-point operations. The floor of a decode step is the larger of
reading and computing; that of prefill is computing.

Over a mesh: ``tensor`` cuts weights, ``data`` and ``stage`` cut the batch, and each microbatch of a pipeline
reads all weights once, stage by stage: a step of all microbatches takes ``weights / tensor + cache / devices``.
Communication and launches count as nothing, so that no layout can do better.
"""

from collections.abc import Mapping, Sequence
from math import prod

from benchmarks.limits import Limits
from jaxinfer.engine.costs import cache_numbers, decode_flops, decode_weights, prefill_flops
from jaxinfer.models.config import ModelConfig


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
    flops = decode_flops(model, batch, cached) / devices
    return max((weights + cache) / limits.copy_bytes_per_s, flops / limits.matmul_flops_per_s)


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
