"""What a layout takes of each device, counted before anything is allocated; what to say if it was too little."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import ceil, prod
from typing import Any

import jax
import numpy as np

from jaxinfer.engine.config import EngineConfig
from jaxinfer.engine.emit import SCORED_TOGETHER
from jaxinfer.engine.forward import Decoder
from jaxinfer.parallel.axes import LayoutError
from jaxinfer.parallel.placement import MeshSizes, Parameter, Rules, local_shape, local_size

MIB = 2**20
SMALL_CHUNK, LARGE_CHUNK = 512, 8192  # tokens
BATCHES = (64, 128, 256, 512, 1024)
LEAST_TOKENS = 256  # of cache for each row of a batch: with fewer rows, short requests would leave memory idle


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes per device; `pages` counts one data shard's pages, the null page included, and `share` is how much of
    `limit`, the whole device, all of it together may take."""

    weights: int
    page: int
    workspace: int
    pages: int
    page_size: int
    limit: int
    share: float

    @property
    def cache(self) -> int:
        return self.pages * self.page

    @property
    def needed(self) -> int:
        return self.weights + self.workspace + self.cache

    @property
    def headroom(self) -> int:
        """What is left of the share; below 0 where the plan does not fit."""
        return int(self.limit * self.share) - self.needed

    def rows(self) -> list[tuple[str, int, str]]:
        """(what, bytes, note), for a table."""
        return [
            ("weights", self.weights, ""),
            ("workspace", self.workspace, "activations, logits"),
            ("cache", self.cache, f"{self.pages:,} pages of {self.page_size} tokens"),
            ("headroom", self.headroom, "" if self.headroom >= 0 else "does not fit"),
            ("limit", int(self.limit * self.share), f"{100 * self.share:.3g}% of {self.limit / MIB:,.0f} MiB"),
        ]

    def __str__(self) -> str:
        lines = [f"  {name:9} {size / MIB:>11,.0f} MiB  {note}".rstrip() for name, size, note in self.rows()]
        return "\n".join(["  per device", *lines])


class DoesNotFit(LayoutError):
    """Refused before anything is allocated; `plan` holds what was counted, for one context."""

    def __init__(self, text: str, plan: MemoryPlan):
        super().__init__(text)
        self.plan = plan


class OutOfMemory(RuntimeError):
    """A device had less room than planned; `plan` holds what was counted."""

    def __init__(self, text: str, plan: MemoryPlan):
        super().__init__(text)
        self.plan = plan


@contextmanager
def explained(plan: MemoryPlan, config: EngineConfig, doing: str) -> Iterator[None]:
    """Raises:
    OutOfMemory: in place of JAX's error when a device's memory ran out in here, with the numbers to change.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        asked = re.search(r"allocat\w* (?:of )?(\d+) bytes", str(error))
        size = f" ({int(asked[1]) / MIB:,.0f} MiB more were asked for)" if asked else ""
        numbers = [
            f"--memory-fraction {max(config.memory_fraction - 0.1, 0.1):.2g} (it was {config.memory_fraction:g})"
        ]
        if config.pages is not None:
            numbers = [f"--pages below {config.pages}, or none: they take what is left"]
        if config.prefill_chunk > 64:
            numbers.append(f"--prefill-chunk {config.prefill_chunk // 2} (it was {config.prefill_chunk})")
        if config.max_batch > 1:
            numbers.append(f"--max-batch {config.max_batch // 2} (it was {config.max_batch})")
        raise OutOfMemory(
            f"memory: a device's memory ran out in {doing}{size}, beside the plan's {plan.needed / MIB:,.0f} of "
            f"{plan.limit / MIB:,.0f} MiB; change {', or '.join(numbers)}; nothing else may use the device",
            plan,
        ) from error


def choose_batch(
    decoder: Decoder, config: EngineConfig, rules: Rules, sizes: MeshSizes, dtype: Any, max_context: int, limit: int
) -> int:
    """`max_batch`, or where none is set the best: the plain form of attention gathers the pages of every row; with
    kernels, as many as short requests fill the cache with. How many of them run is up to `engine/admission.py`."""
    if config.max_batch is not None:
        return config.max_batch
    if decoder.kernels != "on" or decoder.config.alibi:
        return BATCHES[0]
    item = np.dtype(dtype).itemsize
    free = limit * config.memory_fraction - weights_bytes(decoder, rules, sizes, item)
    row = _page(decoder, config, rules, sizes, item) * ceil(min(max_context, LEAST_TOKENS) / config.page_size)
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
    if decoder.kernels != "on" or decoder.config.alibi:
        return chunk
    free = limit * config.memory_fraction - weights_bytes(decoder, rules, sizes, item)
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
    DoesNotFit: weights, workspace and the cache of one full context (or `pages`); the message gives each.
    """
    item = np.dtype(dtype).itemsize
    weights = weights_bytes(decoder, rules, sizes, item)
    page = _page(decoder, config, rules, sizes, item)
    workspace = _workspace(decoder, config, rules, sizes, item, max_context)

    needed = ceil(max_context / config.page_size) + 1
    useful = config.max_batch * ceil(max_context / config.page_size) + 1
    # one row may decode alone at the end, whatever the batch
    alone = _one_row(decoder, rules, sizes, item)
    if config.max_batch == 1:
        workspace = max(workspace, alone)
    budget = int(limit * config.memory_fraction) - weights - max(workspace, alone)
    if config.pages is not None and config.pages < needed:
        raise LayoutError(
            f"pages: {config.pages} is too few for one context of {max_context} tokens; legal: at least {needed} pages "
            f"of {config.page_size} tokens (one is the null page), or a smaller max-context"
        )
    pages = int(config.pages or min(useful, max(needed, budget // page)))
    plan = MemoryPlan(weights, page, workspace, pages, config.page_size, limit, config.memory_fraction)
    if plan.headroom < 0:
        share = f"{100 * config.memory_fraction:.3g}% of {limit / MIB:.0f}"
        raise DoesNotFit(
            f"memory: needs {plan.needed / MIB:.0f} MiB per device "
            f"(weights {weights / MIB:.0f}, workspace {workspace / MIB:.0f}, cache {plan.cache / MIB:.0f}: {pages} "
            f"pages of {config.page_size} tokens, {needed} for a context of {max_context}), but "
            f"{share} MiB is {limit * config.memory_fraction / MIB:.0f}",
            plan,
        )
    return plan


def weights_bytes(decoder: Decoder, rules: Rules, sizes: MeshSizes, item: int) -> int:
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
    plain attention, which alibi has everywhere, gathered pages and scores."""
    model, shapes = decoder.config, config.prefill_shapes()
    chunk = max(config.max_batch, *(rows * tokens for rows, tokens in shapes))
    heads = local_size("heads", model.num_heads, rules, sizes)
    kv_heads = local_size("kv_heads", model.num_kv_heads, rules, sizes)
    mlp = local_size("mlp", model.mlp_width, rules, sizes)
    vocabulary = local_size("vocab", model.vocab_size, rules, sizes)
    rows = max(config.max_batch, max(rows for rows, _ in shapes))
    activations = chunk * (4 * model.hidden_size + 3 * mlp + 3 * heads * model.head_dim) * item
    between = sum(rows * tokens for rows, tokens in shapes) * model.hidden_size * item if sizes["stage"] > 1 else 0
    logits = 3 * 4 * max(rows, min(chunk, SCORED_TOGETHER)) * vocabulary
    if decoder.kernels != "off" and not model.alibi:
        return activations + between + logits
    gathered = 2 * 2 * rows * max_context * kv_heads * model.head_dim * item
    scores = 3 * 4 * heads * chunk * max_context
    return activations + between + logits + gathered + scores


def _one_row(decoder: Decoder, rules: Rules, sizes: MeshSizes, item: int) -> int:
    """What XLA takes on a GPU while it looks for the best form of one row times the head: forms that write the weight
    out in float32 are among those that it tries."""
    model = decoder.config
    head = local_size("vocab", model.vocab_size, rules, sizes) * (model.embed_width or model.hidden_size)
    return head * (item + 4) if decoder.kernels == "on" and item < 4 else 0
