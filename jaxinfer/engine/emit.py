"""From final hidden states to tokens, the vocabulary cut over all devices of a data shard."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxinfer.models.ends import Ends
from jaxinfer.ops.sampling import NON_FINITE, SamplingArrays, adjust, greatest, select, token_logprobs
from jaxinfer.parallel import collectives

TOP_LOGPROBS = 20  # as many as a request may ask for; the host cuts to what each asked
SCORED_TOGETHER = 512  # tokens of a prompt whose logits are in memory at once


class Features(NamedTuple):
    """What some request needs beyond greedy tokens; part of a program's identity, so that plain runs stay lean.

    Which program ran never changes a row's tokens."""

    sample: bool = False  # a temperature above 0
    adjust: bool = False  # penalties, logit bias, min_new_tokens
    logprobs: bool = False
    score: bool = False  # prompt logprobs

    @property
    def reads_rows(self) -> bool:
        """Whether the program takes the rows' sampling parameters."""
        return self.sample or self.adjust


class Emitted(NamedTuple):
    """Tokens [B], NON_FINITE where the logits give none, and, where asked for, logprob and rank [B], top ids and
    logprobs [B, min(20, V)] (None otherwise)."""

    tokens: jax.Array
    logprob: jax.Array | None = None
    rank: jax.Array | None = None
    top_ids: jax.Array | None = None
    top_logprobs: jax.Array | None = None


def emit(
    ends: Ends,
    x: jax.Array,
    sampling: SamplingArrays | None,
    counts: jax.Array | None,
    n_out: jax.Array,
    features: Features,
) -> Emitted:
    """Final hidden states x [B, H] to the next token of each row.

    counts [B, V / n] is this device's part of the rows' token counts; n_out [B] numbers the output token to choose.
    """
    raw = _padding_masked(ends.logits(x), ends.config.vocab_size)
    with jax.named_scope("sample"):
        logits = raw
        if features.adjust:
            start = collectives.vocab_rank() * raw.shape[1]
            logits = adjust(raw, counts, sampling, n_out, start, ends.config.vocab_size)
        if features.sample:
            own = jax.tree.map(collectives.own_rows, sampling)
            chosen = select(collectives.rows_for_columns(logits), own, collectives.own_rows(n_out))
            tokens = collectives.all_rows(chosen, x.shape[0])
        else:
            tokens = _greedy(logits)
    with jax.named_scope("logprobs"):
        return _with_logprobs(raw, tokens, ends.config.vocab_size) if features.logprobs else Emitted(tokens)


def score(ends: Ends, x: jax.Array, targets: jax.Array) -> Emitted:
    """Logprobs of known next tokens: x [R, C, H], targets [R, C]."""
    together = SCORED_TOGETHER if targets.size % SCORED_TOGETHER == 0 else targets.size

    @jax.named_scope("logprobs")
    def part(arguments):
        hidden, tokens = arguments
        logits = _padding_masked(ends.logits(hidden), ends.config.vocab_size)
        return _with_logprobs(logits, tokens, ends.config.vocab_size)

    emitted = jax.lax.map(part, (x.reshape(-1, together, x.shape[-1]), targets.reshape(-1, together)))
    return jax.tree.map(lambda each: each.reshape(*targets.shape, *each.shape[2:]), emitted)


@jax.named_scope("head")
def _padding_masked(logits: jax.Array, vocab_size: int) -> jax.Array:
    width = logits.shape[1]
    if width * collectives.vocab_ways() == vocab_size:
        return logits
    column = collectives.vocab_rank() * width + jnp.arange(width)
    return jnp.where(column < vocab_size, logits, -jnp.inf)


def _greedy(logits: jax.Array) -> jax.Array:
    value, best = greatest(logits)
    if collectives.vocab_ways() > 1:
        # shards are in vocabulary order and the first of equals is taken: the lowest id wins, as on one device
        ids = collectives.vocab_gather(best + collectives.vocab_rank() * logits.shape[1])
        value, shard = greatest(collectives.vocab_gather(value).T)
        best = jnp.take_along_axis(ids, shard[None], axis=0)[0]
    return jnp.where(jnp.isfinite(value), best, NON_FINITE)


def _with_logprobs(raw: jax.Array, tokens: jax.Array, vocab_size: int) -> Emitted:
    rows = collectives.rows_for_columns(raw)
    # beside the vocabulary there is padding, which is no token
    chosen, top_ids, top, rank = token_logprobs(rows, collectives.own_rows(tokens), min(TOP_LOGPROBS, vocab_size))
    whole = [collectives.all_rows(each, tokens.shape[0]) for each in (chosen, rank, top_ids, top)]
    return Emitted(tokens, *whole)
