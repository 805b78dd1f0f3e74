"""The two device programs: a block of decode steps and a prefill tick. Both run under one `jax.shard_map`.

Time is cut into ticks. In a tick each stage works on one microbatch and passes it on; decode has as many microbatches
as stages, so in steady decode no stage idles. What is in flight between the stages stays on the devices across
dispatches (`State.x`), so a block neither fills nor drains the pipeline. Letters: M microbatches = stages, b rows of
one, K steps, R rows and C tokens of a prefill tick, W table width in pages."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxinfer.engine.emit import Emitted, Features, emit, score
from jaxinfer.engine.forward import Decoder
from jaxinfer.ops.sampling import SamplingArrays, count_tokens, reset_counts
from jaxinfer.parallel import collectives


class State(NamedTuple):
    """All that lives on the devices between dispatches; donated to every program. Global shapes, Dp data shards."""

    k: list[jax.Array]  # per layer slot [stage, Dp, P, page_size, K, D]
    v: list[jax.Array]
    token: jax.Array  # [Dp, M, b] the last token chosen, not in the cache yet
    position: jax.Array  # [Dp, M, b] tokens in the cache
    flying: jax.Array  # [Dp, M, b] bool: the row's pass through the stages counts
    x: jax.Array  # [stage, Dp, b, 1, H] what each stage receives in the next decode tick
    prefill_x: dict[str, jax.Array]  # "RxC" -> [stage, Dp, R, C, H], where there are several stages
    counts: jax.Array | None  # [Dp, M * b, V] see ops/sampling.py; None until a request needs them


class DecodeInputs(NamedTuple):
    """What the host says of the first r rows of each microbatch, [Dp, M * r] and tables [Dp, M * r, W]."""

    active: jax.Array
    keep: jax.Array  # same sequence as in the previous block: its pass in flight counts
    limit: jax.Array  # positions at and beyond it are not fed
    prompt_length: jax.Array
    tables: jax.Array


class PrefillInputs(NamedTuple):
    """The entering tokens [Dp, R, C]; for every stage what it works on, [stage, Dp, R] and tables [stage, Dp, R, W];
    whole [stage, Dp, R] tokens of a row's sequence in all ticks together (None where no frequency goes by that);
    targets [Dp, R, C] are the tokens after those that leave the last stage (None unless scored)."""

    tokens: jax.Array
    start: jax.Array
    count: jax.Array
    prompt_length: jax.Array
    slot: jax.Array
    final: jax.Array
    tables: jax.Array
    whole: jax.Array | None
    targets: jax.Array | None


def _own_shard(tree: Any, axis: int = 0) -> Any:
    data = jax.lax.axis_index("data")
    return jax.tree.map(lambda each: jax.lax.dynamic_index_in_dim(each, data, axis, keepdims=False), tree)


@jax.named_scope("bookkeeping")
def _token_of_each(x: jax.Array, index: jax.Array) -> jax.Array:
    """Of each row of x [R, C, H] the token at `index` [R], as [R, H]."""
    return jnp.take_along_axis(x, index[:, None, None], axis=1)[:, 0]


def decode_block(
    decoder: Decoder,
    features: Features,
    steps: int,
    params: Any,
    state: State,
    inputs: DecodeInputs,
    sampling: SamplingArrays | None,
) -> tuple[State, Emitted]:
    """K decode steps of the first r rows of every microbatch, r being the row bucket of `inputs`; other rows stay as
    they are. Emitted arrays are [K, Dp, M * r, ...], tokens -1 where a row emitted nothing."""
    stages = jax.lax.axis_size("stage")
    stage = jax.lax.axis_index("stage")
    ends = decoder.ends(params["ends"])
    all_rows, rows = state.token.shape[2], inputs.active.shape[1] // stages

    @jax.named_scope("bookkeeping")
    def by_microbatch(tree):
        return jax.tree.map(lambda each: each.reshape(stages, -1, *each.shape[1:])[:, :rows], _own_shard(tree))

    inputs, sampling = by_microbatch(inputs), by_microbatch(sampling)
    counts = None if state.counts is None else state.counts[0]

    def tick(carry, t):
        k, v, token, position, flying, x, counts = carry
        with jax.named_scope("bookkeeping"):
            entering, here, leaving = t % stages, (t - stage) % stages, (t + 1) % stages
            enters = inputs.active[entering] & (position[entering] < inputs.limit[entering])
            flying = flying.at[entering].set(enters)
        with jax.named_scope("embed"):
            fed = ends.embedding(token[entering], position[entering], params.get("peers"))[:, None]
            x = jnp.where(stage == 0, fed, x) if stages > 1 else fed
        with jax.named_scope("bookkeeping"):
            at = jnp.where(flying[here], position[here], -1)[:, None]
            of_layers = at, inputs.prompt_length[here], inputs.tables[here]
        x, (k, v) = decoder.run_stage(params, (k, v), x, *of_layers)
        last = collectives.from_last_stage(x)[:, 0]
        with jax.named_scope("bookkeeping"):
            n_out = position[leaving] + 1 - inputs.prompt_length[leaving]
            slots = leaving * all_rows + jnp.arange(rows)
            own_counts = None if counts is None else jax.lax.dynamic_slice_in_dim(counts, leaving * all_rows, rows)
            row_sampling = jax.tree.map(lambda each: each[leaving], sampling)
        emitted = emit(ends, last, row_sampling, own_counts, n_out, features)
        with jax.named_scope("bookkeeping"):
            counted = flying[leaving]
            chosen = jnp.where(counted, emitted.tokens, -1)
            if features.adjust:
                start = collectives.vocab_rank() * counts.shape[1]
                counts = count_tokens(counts, slots, chosen, jnp.zeros_like(counted), start)
            token = token.at[leaving].set(jnp.where(counted, emitted.tokens, token[leaving]))
            position = position.at[leaving].add(counted.astype(jnp.int32))
        return (k, v, token, position, flying, collectives.to_next_stage(x), counts), emitted._replace(tokens=chosen)

    with jax.named_scope("bookkeeping"):
        # rows beyond have nothing in flight; when a wider block takes them in, `keep` says that x is not theirs
        token, position, flying = (each[0, :, :rows] for each in (state.token, state.position, state.flying))
        carry = (state.k, state.v, token, position, flying & inputs.keep, state.x[0, 0, :rows], counts)
    (k, v, token, position, flying, x, counts), emitted = jax.lax.scan(tick, carry, jnp.arange(steps * stages))

    @jax.named_scope("bookkeeping")
    def collect(each):
        # tick t emits microbatch (t + 1) % M
        each = jnp.roll(each.reshape(steps, stages, *each.shape[1:]), 1, axis=1)
        each = each.reshape(steps, stages * rows, *each.shape[3:])
        return jnp.moveaxis(collectives.gather_data(each), 0, 1)

    with jax.named_scope("bookkeeping"):
        state = state._replace(
            k=k,
            v=v,
            token=state.token.at[0, :, :rows].set(token),
            position=state.position.at[0, :, :rows].set(position),
            flying=state.flying.at[0, :, :rows].set(flying),
            x=state.x.at[0, 0, :rows].set(x),
            counts=None if counts is None else counts[None],
        )
    return state, jax.tree.map(collect, emitted)


def prefill_tick(
    decoder: Decoder,
    features: Features,
    params: Any,
    state: State,
    inputs: PrefillInputs,
    sampling: SamplingArrays | None,
) -> tuple[State, Emitted, Emitted | None]:
    """One tick of prefill. Returns the first tokens [Dp, R] of final rows that leave (-1 elsewhere) and, when scored,
    the logprobs [Dp, R, C, ...] of the targets."""
    stage = jax.lax.axis_index("stage")
    stages = jax.lax.axis_size("stage")
    ends = decoder.ends(params["ends"])
    with jax.named_scope("bookkeeping"):
        targets = None if inputs.targets is None else _own_shard(inputs.targets)
        tokens, sampling = _own_shard(inputs.tokens), _own_shard(sampling)
        of_stage = _own_shard(inputs._replace(tokens=None, targets=None), axis=1)
        entering, here, leaving = (jax.tree.map(lambda each: each[s], of_stage) for s in (0, stage, stages - 1))
    rows, length = tokens.shape
    key = f"{rows}x{length}"

    def positions(of):
        offset = jnp.arange(length)[None]
        return jnp.where(offset < of.count[:, None], of.start[:, None] + offset, -1)

    counts = None if state.counts is None else state.counts[0]
    start_column = None if counts is None else collectives.vocab_rank() * counts.shape[1]
    if features.adjust:
        with jax.named_scope("bookkeeping"):
            counts = reset_counts(counts, entering.slot, (entering.start == 0) & (entering.count > 0))
            at = positions(entering)
            prompt = at < entering.prompt_length[:, None]
            counts = count_tokens(counts, entering.slot, jnp.where(at < 0, -1, tokens), prompt, start_column)

    with jax.named_scope("embed"):
        fed = ends.embedding(tokens, positions(entering))
        x = jnp.where(stage == 0, fed, state.prefill_x[key][0, 0]) if stages > 1 else fed
    only_last = stages == 1 and not features.score
    with jax.named_scope("bookkeeping"):
        index = jnp.maximum(leaving.count - 1, 0)
        lengths = here.prompt_length if here.whole is None else here.whole
        of_layers = positions(here), lengths, here.tables, index if only_last else None
    x, (k, v) = decoder.run_stage(params, (state.k, state.v), x, *of_layers)

    if only_last:
        scored, last = None, x[:, 0]
    elif features.score:
        everything = collectives.from_last_stage(x)
        scored = jax.tree.map(collectives.gather_data, score(ends, everything, targets))
        last = _token_of_each(everything, index)
    else:
        scored = None
        last = collectives.from_last_stage(_token_of_each(x, index))
    with jax.named_scope("bookkeeping"):
        done = leaving.start + leaving.count
        row_sampling = jax.tree.map(lambda each: each[leaving.slot], sampling)
        own_counts = None if counts is None else counts[leaving.slot]
    emitted = emit(ends, last, row_sampling, own_counts, done - leaving.prompt_length, features)
    with jax.named_scope("bookkeeping"):
        chosen = jnp.where(leaving.final, emitted.tokens, -1)
        if features.adjust:
            counts = count_tokens(counts, leaving.slot, chosen, jnp.zeros_like(leaving.final), start_column)

    @jax.named_scope("bookkeeping")
    def put(slots_array, values):
        flat = slots_array[0].reshape(-1)
        slot = jnp.where(leaving.final, leaving.slot, flat.size)  # beyond the end: dropped
        return flat.at[slot].set(values, mode="drop").reshape(slots_array.shape)

    state = state._replace(
        k=k,
        v=v,
        token=put(state.token, emitted.tokens),
        position=put(state.position, done),
        prefill_x=state.prefill_x | {key: collectives.to_next_stage(x)[None, None]} if stages > 1 else {},
        counts=None if counts is None else counts[None],
    )
    return state, jax.tree.map(collectives.gather_data, emitted._replace(tokens=chosen)), scored
