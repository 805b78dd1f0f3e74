"""How fast a layout will be, from bytes, floating-point operations and link speeds.

A decode tick of a stage reads its weights and the cached keys and values of its rows, multiplies, launches its layers'
kernels and sums over ``tensor``; a token takes one tick of every stage. The shares and the costs per layer are fitted
to the figures of benchmarks/README.md (H200, JAX 0.11); for other GPUs they are assumed to be the same.
"""

from math import ceil, prod

import attrs
import jax.numpy as jnp

from jaxinfer.engine.costs import cache_numbers, matrices, prefill_flops
from jaxinfer.engine.fit import Fitted
from jaxinfer.engine.shapes import TICK_TOKENS, row_buckets
from jaxinfer.models.config import ModelConfig
from jaxinfer.models.llama import in_one_launch
from jaxinfer.ops.decode_layers import MOST_ROWS
from jaxinfer.parallel.all_reduce import shots
from jaxinfer.parallel.peer import RANKS
from jaxinfer.parallel.placement import MeshSizes, Rules, local_shape
from jaxinfer.plan.hardware import Gpus, GpuType, Link

READ = 0.855  # of the datasheet's bandwidth: a copy's 4.1 TB/s of 4.8
MATMUL = 0.8  # of the datasheet's rate: 790 TFLOP/s of 989 for large bfloat16 matmuls
THIN, WIDE = 0.96, 0.82  # of READ, by matmuls of a few rows and of more; the one launch of all layers has all of it
DECODE_MATMUL = 0.8  # of MATMUL, where rows are many enough to compute and not to read
PREFILL_MATMUL = 0.8  # of MATMUL, a whole tick
FUSED, KERNELS, PLAIN = 9e-6, 15e-6, 50e-6  # seconds per layer: one launch for all, kernels, plain forms
PLAIN_READS = 2.0  # times that plain attention moves the cache of its whole block table
PEER_S, PEER_BYTES_PER_S = 6e-6, {1: 40e9, 2: 100e9}  # a sum over peer memory, in so many hops
RING = 0.56  # of a link's rate, by NCCL's large all-reduces
VOCABULARY = 3  # small collectives of a tick: embedding, and two for the largest logit


@attrs.frozen
class Workload:
    """`batch` sequences in flight, over all data shards, of `context` tokens each; the last `new_tokens` are made."""

    batch: int
    context: int
    new_tokens: int

    @property
    def prompt(self) -> int:
        return max(1, self.context - self.new_tokens)

    @property
    def cached(self) -> float:
        """Tokens that a decode step finds in the cache, on average."""
        return self.prompt + self.new_tokens / 2


@attrs.frozen
class Prediction:
    """Seconds; `parts` of a token: weights, cache, layers (launches and waits), links. `first_s` is until all prompts
    have their first token, and tokens/s counts new tokens of a whole round, that included."""

    tpot_s: float
    first_s: float
    tokens_per_s: float
    parts: dict[str, float]


@attrs.frozen
class Place:
    """A model on a layout of GPUs."""

    model: ModelConfig
    fitted: Fitted
    sizes: MeshSizes
    gpus: Gpus
    dtype: str

    @property
    def item(self) -> int:
        return 4 if self.dtype == "float32" else 2

    @property
    def type(self) -> GpuType:
        return self.gpus.type

    @property
    def bandwidth(self) -> float:
        return READ * self.type.bandwidth

    @property
    def matmul(self) -> float:
        return MATMUL * self.type.matmul[self.dtype]

    @property
    def gathers(self) -> bool:
        """Attention in its plain form, which moves whole block tables."""
        return self.fitted.decoder.kernels == "off" or self.model.alibi

    @property
    def tensor_link(self) -> Link:
        """Of a group's slowest pair; ``tensor`` is the innermost axis."""
        return self.type.between if self.gpus.per_node % self.sizes["tensor"] else self.type.inside

    @property
    def stage_link(self) -> Link:
        """``stage`` is the outermost axis, so that it crosses nodes if anything does."""
        return self.type.between if self.gpus.nodes > 1 else self.type.inside


def predict(place: Place, work: Workload) -> Prediction:
    sizes = place.sizes
    shard = ceil(work.batch / sizes["data"])
    rows = ceil(shard / sizes["stage"])
    parts = {name: sizes["stage"] * each for name, each in _tick(place, rows, work.cached).items()}
    tpot = sum(parts.values())
    first = _prefill(place, [work.prompt] * shard)
    took = first + (work.new_tokens - 1) * tpot
    return Prediction(tpot, first, work.batch * work.new_tokens / took, parts)


def _tick(place: Place, rows: int, cached: float) -> dict[str, float]:
    """Seconds of one stage's part of a decode step of `rows` rows."""
    model, fitted, sizes = place.model, place.fitted, place.sizes
    slots = len(fitted.decoder.slots)
    most = ceil(fitted.config.max_batch / sizes["stage"])
    padded = next(each for each in row_buckets(max(most, rows)) if each >= rows)
    weights = fitted.memory.weights
    if not model.tied:  # of that table it needs a row per sequence
        table = fitted.decoder.parameters()["ends"]["embed"]
        weights -= prod(local_shape(table, Rules(), sizes)) * place.item
    share = 1 if _in_one_launch(place, padded) else THIN if padded <= MOST_ROWS else WIDE
    reading = weights / (share * place.bandwidth)
    computing = 2 * padded * weights / place.item / (DECODE_MATMUL * place.matmul)
    activations = padded * slots * place.item * (10 * model.hidden_size + 4 * model.mlp_width / sizes["tensor"])
    return {
        "weights": max(reading, computing),
        "cache": _attention(place, rows, cached) / place.bandwidth,
        "layers": slots * _layer_seconds(place, padded) + activations / place.bandwidth,
        "links": _links(place, padded, slots),
    }


def _attention(place: Place, rows: int, cached: float) -> float:
    """Bytes that a stage's decode attention moves on each device."""
    model, fitted = place.model, place.fitted
    per_token = fitted.memory.page / fitted.config.page_size
    whole = 2 * model.num_kv_heads * model.head_dim * model.num_layers
    if not place.gathers:
        return rows * per_token * cache_numbers(model, cached) / whole
    widths = fitted.config.table_widths(ceil(cached) + fitted.config.page_size)
    tokens = next(width for width in widths if width * fitted.config.page_size >= cached) * fitted.config.page_size
    return PLAIN_READS * rows * per_token * tokens


def _layer_seconds(place: Place, rows: int) -> float:
    if place.fitted.decoder.kernels == "off":
        return PLAIN
    return FUSED if _in_one_launch(place, rows) else KERNELS


def _in_one_launch(place: Place, rows: int) -> bool:
    able = place.fitted.decoder.kernels == "on" and place.sizes["tensor"] == 1
    return able and rows <= MOST_ROWS and in_one_launch(place.model)


def _links(place: Place, rows: int, slots: int) -> float:
    model, sizes = place.model, place.sizes
    size = rows * model.hidden_size * place.item
    seconds = slots * model.reduces_per_layer * _sum(place, size, decodes=True)
    if sizes["tensor"] * sizes["stage"] > 1:
        slowest = place.stage_link if sizes["stage"] > 1 else place.tensor_link
        seconds += VOCABULARY * slowest.latency_s
    if sizes["stage"] > 1:  # x to the next stage, and the last stage's to all
        link = place.stage_link
        seconds += 2 * (link.latency_s + size / link.bytes_per_s)
    return seconds


def _sum(place: Place, size: int, decodes: bool) -> float:
    """Seconds of an all-reduce of `size` bytes over ``tensor``."""
    ranks, link = place.sizes["tensor"], place.tensor_link
    if ranks == 1:
        return 0.0
    peers = place.fitted.decoder.kernels == "on" and ranks in RANKS and link is place.type.inside
    hops = shots(size, jnp.dtype(place.dtype), ranks) if decodes and peers else None
    if hops is not None:
        return PEER_S + size / PEER_BYTES_PER_S[hops]
    return link.latency_s + 2 * (ranks - 1) / ranks * size / (RING * link.bytes_per_s)


def _prefill(place: Place, lengths: list[int]) -> float:
    """Seconds until the prompts of one data shard have their first tokens, from the first tick's start."""
    model, fitted, sizes = place.model, place.fitted, place.sizes
    chunk, slots = fitted.config.prefill_chunk, len(fitted.decoder.slots)
    devices = sizes["stage"] * sizes["tensor"]
    ticks = ceil(sum(lengths) / chunk)
    computing = prefill_flops(model, lengths) / (PREFILL_MATMUL * place.matmul * devices)
    least = TICK_TOKENS * 2 * matrices(model) / (PREFILL_MATMUL * place.matmul * devices)  # a tick's cost beside tokens
    tick = max(computing / ticks, fitted.memory.weights / (WIDE * place.bandwidth), least) + slots * PLAIN
    tokens = min(chunk, sum(lengths))
    if place.gathers:  # scores of a whole table, in float32, written and read
        heads = model.num_heads / sizes["tensor"]
        tick += 3 * 2 * 4 * heads * tokens * max(lengths) * slots / place.bandwidth
    tick += slots * model.reduces_per_layer * _sum(place, tokens * model.hidden_size * place.item, decodes=False)
    return (ticks + sizes["stage"] - 1) * tick
