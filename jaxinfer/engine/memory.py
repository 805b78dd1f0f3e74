"""What a layout takes of each device, counted before anything is allocated."""

from dataclasses import dataclass, replace
from math import ceil, prod
from typing import Any

import jax
import numpy as np
import psutil

from jaxinfer.engine.config import EngineConfig
from jaxinfer.engine.emit import SCORED_TOGETHER
from jaxinfer.engine.forward import Decoder
from jaxinfer.parallel.mesh import LayoutError
from jaxinfer.parallel.placement import MeshSizes, Parameter, Rules, local_shape, local_size

MIB = 2**20
SMALL_CHUNK, LARGE_CHUNK = 512, 8192  # tokens
BATCHES = (64, 128, 256, 512)


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes per device; `pages` counts one data shard's pages, the null page included."""

    weights: int
    page: int
    workspace: int
    pages: int


def device_limit(device: jax.Device) -> int:
    """Bytes that this process may use on the device; virtual CPU devices share the host's memory."""
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"]
    return psutil.virtual_memory().total // len(jax.local_devices())


def choose_batch(
    decoder: Decoder, config: EngineConfig, rules: Rules, sizes: MeshSizes, dtype: Any, max_context: int, limit: int
) -> int:
    """`max_batch`, or where none is set the best: the plain form of attention gathers the pages of every row; with
    kernels, as many rows as find room in the cache when each holds half a context."""
    if config.max_batch is not None:
        return config.max_batch
    if decoder.kernels != "on":
        return BATCHES[0]
    item = np.dtype(dtype).itemsize
    free = limit * config.memory_fraction - _weights(decoder, rules, sizes, item)
    row = _page(decoder, config, rules, sizes, item) * ceil(max_context / 2 / config.page_size)
    return max([BATCHES[0], *(batch for batch in BATCHES if batch * row <= free)])


def choose_chunk(
    decoder: Decoder, config: EngineConfig, rules: Rules, sizes: MeshSizes, dtype: Any, max_context: int, limit: int
) -> int:
    """`prefill_chunk`, or where none is set the best, once `max_batch` is known: the plain form of attention writes its
    scores out, so that large chunks help it little; with kernels, matmuls get LARGE_CHUNK, but no more than requests
    can fill, and than a quarter of what the weights leave can work on."""
    if config.prefill_chunk is not None:
        return config.prefill_chunk
    chunk, item = SMALL_CHUNK, np.dtype(dtype).itemsize
    if decoder.kernels != "on":
        return chunk
    free = limit * config.memory_fraction - _weights(decoder, rules, sizes, item)
    while 2 * chunk <= min(LARGE_CHUNK, config.max_batch * max_context):
        larger = replace(config, prefill_chunk=2 * chunk)
        if _workspace(decoder, larger, rules, sizes, item, max_context) > free / 4:
            break
        chunk *= 2
    return chunk


def plan_memory(
    decoder: Decoder, config: EngineConfig, rules: Rules, sizes: MeshSizes, dtype: Any, max_context: int, limit: int
) -> MemoryPlan:
    """Raises:
    LayoutError: weights, workspace and the cache of one full context do not fit; the message gives each and what would.
    """
    item = np.dtype(dtype).itemsize
    weights = _weights(decoder, rules, sizes, item)
    page = _page(decoder, config, rules, sizes, item)
    workspace = _workspace(decoder, config, rules, sizes, item, max_context)

    needed = ceil(max_context / config.page_size) + 1
    useful = config.max_batch * ceil(max_context / config.page_size) + 1
    budget = int(limit * config.memory_fraction) - weights - workspace
    if config.pages is not None and config.pages < needed:
        raise LayoutError(
            f"pages: {config.pages} is too few for one context of {max_context} tokens; legal: at least {needed} pages "
            f"of {config.page_size} tokens (one is the null page), or a smaller max-context"
        )
    pages = config.pages or min(useful, max(needed, budget // page))
    if pages * page > budget:
        raise LayoutError(
            f"memory: needs {(weights + workspace + pages * page) / MIB:.0f} MiB per device "
            f"(weights {weights / MIB:.0f}, workspace {workspace / MIB:.0f}, cache {pages * page / MIB:.0f}: {pages} "
            f"pages of {config.page_size} tokens, {needed} for a context of {max_context}), but "
            f"{config.memory_fraction:.0%} of {limit / MIB:.0f} MiB is {limit * config.memory_fraction / MIB:.0f}; use "
            "more devices (tensor, stage), a smaller dtype, max-context, max-batch or prefill-chunk, or fewer pages"
        )
    return MemoryPlan(weights, page, workspace, int(pages))


def _weights(decoder: Decoder, rules: Rules, sizes: MeshSizes, item: int) -> int:
    is_parameter = lambda leaf: isinstance(leaf, Parameter)  # noqa: E731
    parameters = jax.tree.leaves(decoder.parameters(), is_leaf=is_parameter)
    return sum(prod(local_shape(parameter, rules, sizes)) for parameter in parameters) * item


def _page(decoder: Decoder, config: EngineConfig, rules: Rules, sizes: MeshSizes, item: int) -> int:
    """Keys and values of all layer slots of a stage."""
    kv_heads = local_size("kv_heads", decoder.config.num_kv_heads, rules, sizes)
    return 2 * len(decoder.slots) * config.page_size * kv_heads * decoder.config.head_dim * item


def _workspace(
    decoder: Decoder, config: EngineConfig, rules: Rules, sizes: MeshSizes, item: int, max_context: int
) -> int:
    """What a prefill tick holds beside weights and cache: activations, also those between the stages, and logits; for
    plain attention gathered pages and scores."""
    model, shapes = decoder.config, config.prefill_shapes()
    chunk = max(config.max_batch, *(rows * tokens for rows, tokens in shapes))
    heads = local_size("heads", model.num_heads, rules, sizes)
    kv_heads = local_size("kv_heads", model.num_kv_heads, rules, sizes)
    mlp = local_size("mlp", model.mlp_width, rules, sizes)
    vocabulary = local_size("vocab", model.vocab_size, rules, sizes)
    rows = max(config.max_batch, max(rows for rows, _ in shapes))
    activations = chunk * (4 * model.hidden_size + 3 * mlp + 3 * heads * model.head_dim) * item
    between = sum(rows * tokens for rows, tokens in shapes) * model.hidden_size * item
    logits = 3 * 4 * max(rows, min(chunk, SCORED_TOGETHER)) * vocabulary
    if decoder.kernels != "off":
        return activations + between + logits
    gathered = 2 * 2 * rows * max_context * kv_heads * model.head_dim * item
    scores = 3 * 4 * heads * chunk * max_context
    return activations + between + logits + gathered + scores
