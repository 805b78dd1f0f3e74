"""From logits to tokens: penalties on a vocabulary shard, then one token per row of whole rows.

Everything is per row, so requests with different settings share a batch. No vocabulary is sorted: top-k and top-p look
for the threshold of their sets by bisection, and Gumbel noise turns drawing into an argmax (Maddison, Tarlow and Minka,
"A* Sampling", 2014, section 2). `select_plain` says the same with a sort and defines what is right."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

_IN_PROMPT = 1 << 30  # of a token's count: the token is in the prompt; the bits below count it in the output
_TIMES = _IN_PROMPT - 1
NON_FINITE = -2  # in place of a token: the row's greatest logit is NaN or infinite


class SamplingArrays(NamedTuple):
    """Sampling settings of B rows; any leading shape will do, [B] is what the functions below take.

    Attributes:
      temperature: [B] float32, 0 takes the likeliest token.
      top_k: [B] int32, 0 or less is off.
      top_p: [B] float32, 1 is off.
      min_p: [B] float32, 0 is off.
      repetition: [B] float32, 1 is off.
      presence: [B] float32, 0 is off.
      frequency: [B] float32, 0 is off.
      seed: [B] uint32.
      bias_ids: [B, NB] int32, -1 where unused.
      bias_values: [B, NB] float32, added to the logits of bias_ids.
      stop_ids: [B, NS] int32, -1 where unused; impossible before min_new tokens are out.
      min_new: [B] int32.
    """

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    min_p: jax.Array
    repetition: jax.Array
    presence: jax.Array
    frequency: jax.Array
    seed: jax.Array
    bias_ids: jax.Array
    bias_values: jax.Array
    stop_ids: jax.Array
    min_new: jax.Array


def sampling_arrays(batch_shape: tuple[int, ...], n_bias: int = 300, n_stop: int = 80) -> SamplingArrays:
    """Host arrays of greedy rows without any adjustment."""

    def full(value: float, dtype: Any, *columns: int) -> np.ndarray:
        return np.full((*batch_shape, *columns), value, dtype)

    return SamplingArrays(
        temperature=full(0, np.float32),
        top_k=full(0, np.int32),
        top_p=full(1, np.float32),
        min_p=full(0, np.float32),
        repetition=full(1, np.float32),
        presence=full(0, np.float32),
        frequency=full(0, np.float32),
        seed=full(0, np.uint32),
        bias_ids=full(-1, np.int32, n_bias),
        bias_values=full(0, np.float32, n_bias),
        stop_ids=full(-1, np.int32, n_stop),
        min_new=full(0, np.int32),
    )


def set_row(arrays: SamplingArrays, index: Any, params: Any, seed: int, stop_ids: Any) -> None:
    """Writes one request into host arrays, in place.

    Args:
      arrays: of numpy, as `sampling_arrays` makes them.
      index: of the row, an int or a tuple.
      params: anything with the sampling attributes of `SamplingParams`.
      seed: of this sequence; its low 32 bits count.
      stop_ids: token ids that end it.

    Raises:
      ValueError: more biases or stop ids than the arrays have columns.
    """
    bias = params.logit_bias or {}
    stop_ids = sorted(set(stop_ids))
    for name, given, columns in (("logit_bias", bias, arrays.bias_ids), ("stop ids", stop_ids, arrays.stop_ids)):
        if len(given) > columns.shape[-1]:
            raise ValueError(f"{name}: {len(given)} entries, at most {columns.shape[-1]} fit")
    arrays.temperature[index] = params.temperature
    arrays.top_k[index] = params.top_k
    arrays.top_p[index] = params.top_p
    arrays.min_p[index] = params.min_p
    arrays.repetition[index] = params.repetition_penalty
    arrays.presence[index] = params.presence_penalty
    arrays.frequency[index] = params.frequency_penalty
    arrays.seed[index] = seed & 0xFFFFFFFF
    arrays.bias_ids[index] = -1
    arrays.bias_ids[index][: len(bias)] = list(bias.keys())
    arrays.bias_values[index] = 0
    arrays.bias_values[index][: len(bias)] = list(bias.values())
    arrays.stop_ids[index] = -1
    arrays.stop_ids[index][: len(stop_ids)] = stop_ids
    arrays.min_new[index] = params.min_new_tokens


def reset_counts(counts: jax.Array, slots: jax.Array, mask: jax.Array) -> jax.Array:
    """Zeroes the rows slots [R] of counts [Slots, Vl] where mask [R] holds."""
    return counts.at[jnp.where(mask, slots, counts.shape[0])].set(0, mode="drop")


def count_tokens(
    counts: jax.Array, slots: jax.Array, tokens: jax.Array, in_prompt: jax.Array, vocab_start: jax.Array | int
) -> jax.Array:
    """Enters tokens into the rows' counts.

    Args:
      counts: [Slots, Vl] int32, columns vocab_start to vocab_start + Vl of the vocabulary: in the low 30 bits how often
        the token is in the output, in bit 30 whether it is in the prompt.
      slots: [R] rows of counts.
      tokens: [R, T] or [R]; -1 and tokens outside of the columns are left out.
      in_prompt: bool, shape of tokens: mark the token as the prompt's; otherwise count it once more in the output.
      vocab_start: first column's token id, may be traced.
    """
    slots = jnp.broadcast_to(slots.reshape(slots.shape + (1,) * (tokens.ndim - 1)), tokens.shape)
    column, beyond = _columns(tokens, vocab_start, counts.shape[1])
    # every copy of a token writes the same value, so marking twice marks once
    marked = counts.at[slots, column].get(mode="fill", fill_value=0) | _IN_PROMPT
    counts = counts.at[slots, jnp.where(in_prompt, column, beyond)].max(marked, mode="drop")
    return counts.at[slots, jnp.where(in_prompt, beyond, column)].add(1, mode="drop")


def _columns(tokens: jax.Array, vocab_start: jax.Array | int, width: int) -> tuple[jax.Array, int]:
    """Columns of tokens in a shard, and the column beyond its end that stands for "not here" (-1 would wrap around)."""
    column = tokens - vocab_start
    return jnp.where((tokens >= 0) & (column >= 0) & (column < width), column, width), width


def adjust(
    logits: jax.Array,
    counts: jax.Array,
    arrays: SamplingArrays,
    n_out: jax.Array,
    vocab_start: jax.Array | int,
    vocab_size: int,
) -> jax.Array:
    """Penalties, bias and bans on a shard of the vocabulary; a row without any keeps its logits bit by bit.

    The repetition penalty (Keskar et al., "CTRL", 2019, section 4.1; as transformers does, over prompt and output)
    comes first because it depends on the sign of the model's own logit; presence and frequency penalty (both over the
    output) and bias are sums.

    Args:
      logits: [B, Vl] float32, columns vocab_start to vocab_start + Vl; ids from vocab_size on are padding.
      counts: [B, Vl], see `count_tokens`.
      arrays: of the rows.
      n_out: [B] tokens that each row has put out already.
      vocab_start: may be traced.
      vocab_size: V.

    Returns:
      [B, Vl] float32.
    """
    rows, width = logits.shape
    repetition = arrays.repetition[:, None]
    penalized = jnp.where(logits < 0, logits * repetition, logits / repetition)
    logits = jnp.where(counts != 0, penalized, logits)
    times = (counts & _TIMES).astype(jnp.float32)
    logits = logits - jnp.where(times > 0, arrays.presence[:, None] + arrays.frequency[:, None] * times, 0)
    row = jnp.arange(rows)[:, None]
    column, beyond = _columns(arrays.bias_ids, vocab_start, width)
    logits = logits.at[row, column].add(arrays.bias_values, mode="drop")
    column, beyond = _columns(arrays.stop_ids, vocab_start, width)
    too_early = (n_out < arrays.min_new)[:, None]
    logits = logits.at[row, jnp.where(too_early, column, beyond)].set(-jnp.inf, mode="drop")
    return jnp.where(vocab_start + jnp.arange(width) < vocab_size, logits, -jnp.inf)


def select(logits: jax.Array, arrays: SamplingArrays, n_out: jax.Array) -> jax.Array:
    """The next token of each row; it depends on the row's own logits, settings, seed and n_out only.

    Temperature 0 takes the greatest logit, the lowest id of equals. Otherwise the logits are divided by the temperature
    and a token is drawn among those that all three limits leave, applied in this order: min-p keeps what has at least
    min_p times the greatest probability; top-k keeps the k greatest and all that equal the k-th; top-p keeps the
    smallest set, greatest first and lower ids first among equals, that holds the share top_p of what is left, at least
    one token.

    Args:
      logits: [B, V] float32, whole rows, after `adjust`.
      arrays: of the rows.
      n_out: [B] tokens that each row has put out already.

    Returns:
      [B] int32, NON_FINITE where the greatest logit is NaN or infinite.
    """
    return _select(logits, arrays, n_out, kept)


def select_plain(logits: jax.Array, arrays: SamplingArrays, n_out: jax.Array) -> jax.Array:
    """`select` by sorting: slow, and what is right."""
    return _select(logits, arrays, n_out, kept_plain)


def _select(logits: jax.Array, arrays: SamplingArrays, n_out: jax.Array, limits: Any) -> jax.Array:
    greedy = arrays.temperature <= 0
    scaled = _scaled(logits, arrays)
    drawn = jnp.where(limits(logits, scaled, arrays), scaled + _gumbel(arrays.seed, n_out, logits.shape[1]), -jnp.inf)
    chosen = jnp.argmax(jnp.where(greedy[:, None], logits, drawn), axis=1).astype(jnp.int32)
    # the same maximum as in _scaled: XLA reads the logits once for both
    return jnp.where(jnp.isfinite(jnp.max(logits, axis=1)), chosen, NON_FINITE)


def _scaled(logits: jax.Array, arrays: SamplingArrays) -> jax.Array:
    """Logits over temperature, 0 for the greatest: however small the temperature, nothing overflows upwards."""
    best = jnp.max(logits, axis=1, keepdims=True)
    best = jnp.where(jnp.isfinite(best), best, 0)
    return (logits - best) / jnp.where(arrays.temperature <= 0, 1, arrays.temperature)[:, None]


def greatest(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Of each row of x [B, V] the greatest value and its index, the lowest of equals, in one pass. NaN is above all."""

    def greater(one, other):
        (value, at), (rival, place) = one, other
        wins = (value > rival) | ((value != value) & (rival == rival))
        equal = (value == rival) | ((value != value) & (rival != rival))
        return jnp.where(wins, value, rival), jnp.where(wins | (equal & (at < place)), at, place)

    index = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
    nothing = jnp.asarray(-jnp.inf, x.dtype), jnp.asarray(jnp.iinfo(jnp.int32).max, jnp.int32)
    value, at = jax.lax.reduce((x, index), nothing, greater, (1,))
    return value, at


def _gumbel(seed: jax.Array, n_out: jax.Array, size: int) -> jax.Array:
    """Standard Gumbel noise [B, size], from each row's seed and the number of the token to draw."""

    def row(seed, n_out):
        # named, so that no global default changes a request's tokens
        key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), n_out)
        return jax.random.bits(key, (size,), jnp.uint32)

    # The winner has the smallest exponential variate: keep all 32 random bits near 0, where the library's own uniform
    # floats, multiples of 2^-23, would often tie among the tokens of a large vocabulary.
    uniform = jax.vmap(row)(seed, n_out).astype(jnp.float32) * 2.0**-32 + 2.0**-33
    return -jnp.log(-jnp.log1p(-jnp.minimum(uniform, 1 - 2.0**-24)))


def kept(logits: jax.Array, scaled: jax.Array, arrays: SamplingArrays) -> jax.Array:
    """Bool [B, V]: the tokens that min-p, top-k and top-p leave, without a sort; see `select`."""
    rows, size = logits.shape
    draws = arrays.temperature > 0
    keys = _ordered(logits)

    def kth():
        wanted = _top_k(arrays, size)
        return _greatest(rows, lambda least: jnp.sum(keys >= least[:, None], axis=1, dtype=jnp.int32) >= wanted)

    # batches whose rows need no search are common, and a search reads the rows 32 times
    limited = jnp.any(draws & (arrays.top_k > 0) & (arrays.top_k < size))
    least = jax.lax.cond(limited, kth, lambda: jnp.zeros(rows, jnp.uint32))
    keep = (keys >= least[:, None]) & (jnp.exp(scaled) >= arrays.min_p[:, None])
    limited = draws & (arrays.top_p < 1)
    nucleus = jax.lax.cond(jnp.any(limited), lambda: _nucleus(keys, keep, scaled, arrays.top_p), lambda: keep)
    return jnp.where(limited[:, None], nucleus, keep)


def kept_plain(logits: jax.Array, scaled: jax.Array, arrays: SamplingArrays) -> jax.Array:
    """`kept` by sorting."""
    rows, size = logits.shape
    descending = -jnp.sort(-logits, axis=1)
    kth = jnp.take_along_axis(descending, _top_k(arrays, size)[:, None] - 1, axis=1)
    keep = (logits >= kth) & (jnp.exp(scaled) >= arrays.min_p[:, None])
    order = jnp.argsort(-logits, axis=1, stable=True)
    mass, bits = _mass(scaled, keep)
    mass = [jnp.take_along_axis(limb, order, axis=1) for limb in mass]
    target = _target(mass, bits, arrays.top_p)
    before = [jnp.cumsum(limb, axis=1, dtype=jnp.uint32) - limb for limb in mass]
    sorted_nucleus = _to_float(before, bits) < target[:, None]
    nucleus = jnp.zeros_like(keep).at[jnp.arange(rows)[:, None], order].set(sorted_nucleus)
    return jnp.where((arrays.top_p < 1)[:, None], keep & nucleus, keep)


def _top_k(arrays: SamplingArrays, size: int) -> jax.Array:
    return jnp.where((arrays.top_k <= 0) | (arrays.top_k > size), size, arrays.top_k)


def _ordered(x: jax.Array) -> jax.Array:
    """The image of float32 in uint32 that keeps its order; both zeros are one, and nothing maps to 0."""
    bits = jax.lax.bitcast_convert_type(jnp.where(x == 0, 0.0, x), jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def _greatest(rows: int, reached: Any) -> jax.Array:
    """The greatest uint32 [rows] of which `reached` says yes, 0 where none; a yes means yes for all lesser ones."""

    def halve(i, found):
        tried = found | (jnp.uint32(1 << 31) >> i.astype(jnp.uint32))
        return jnp.where(reached(tried), tried, found)

    return jax.lax.fori_loop(0, 32, halve, jnp.zeros(rows, jnp.uint32))


def _mass(scaled: jax.Array, keep: jax.Array) -> tuple[list[jax.Array], int]:
    """Probabilities, unnormalized, as whole numbers in two limbs of `bits` bits: high and low [B, V] uint32.

    Whole numbers add up to the same in any order, so the top-p set is one and the same in every program and beside any
    neighbours, and the two forms agree exactly. The limbs are as wide as lets V of them add up in 32 bits; up to 2^18
    tokens a probability is known to 2^-29 of the greatest one.
    """
    bits = min(14, 32 - (scaled.shape[1] - 1).bit_length())
    weight = jnp.where(keep, jnp.round(jnp.exp(scaled) * (2.0 ** (2 * bits) - 2.0**bits)), 0).astype(jnp.uint32)
    return [weight >> bits, weight & ((1 << bits) - 1)], bits


def _to_float(mass: list[jax.Array], bits: int) -> jax.Array:
    """One rounding of the limbs' value, so that order is kept."""
    high, low = mass
    high, low = high + (low >> bits), low & ((1 << bits) - 1)
    return high.astype(jnp.float32) * 2.0**bits + low.astype(jnp.float32)


def _sum(mass: list[jax.Array], where: Any = True) -> list[jax.Array]:
    return [jnp.sum(jnp.where(where, limb, 0), axis=1, dtype=jnp.uint32) for limb in mass]


def _target(mass: list[jax.Array], bits: int, top_p: jax.Array) -> jax.Array:
    # 1 is less than the greatest token's mass: even top_p = 0 keeps that one
    return jnp.maximum(top_p * _to_float(_sum(mass), bits), 1)


def _nucleus(keys: jax.Array, keep: jax.Array, scaled: jax.Array, top_p: jax.Array) -> jax.Array:
    """Bool [B, V]: of the tokens in keep, those that top-p leaves."""
    rows, size = keys.shape
    mass, bits = _mass(scaled, keep)
    keys = jnp.where(keep, keys, 0)
    target = _target(mass, bits, top_p)
    least = _greatest(rows, lambda least: _to_float(_sum(mass, keys >= least[:, None]), bits) >= target)[:, None]
    above, tied = keys > least, keys == least
    taken, each = _sum(mass, above), [jnp.max(jnp.where(tied, limb, 0), axis=1) for limb in mass]
    short = jnp.zeros(rows, jnp.uint32)  # the most of the tied tokens that do not reach the target yet
    for bit in reversed(range(size.bit_length())):
        tried = short | (1 << bit)
        mass_tried = [a + tried * b for a, b in zip(taken, each)]
        fits = (tried < size) & (_to_float(mass_tried, bits) < target)
        short = jnp.where(fits, tried, short)
    needed = (short + 1)[:, None].astype(jnp.int32)
    ties = jnp.sum(tied, axis=1, keepdims=True, dtype=jnp.int32)
    first = jax.lax.cond(
        jnp.any(ties > needed), lambda: tied & (jnp.cumsum(tied, axis=1, dtype=jnp.int32) <= needed), lambda: tied
    )
    return keep & (above | first)


def token_logprobs(
    logits: jax.Array, tokens: jax.Array, top_n: int
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Log-probabilities by the model itself: before penalties, temperature and limits.

    Args:
      logits: [B, V] float32, as the model gave them.
      tokens: [B] the chosen tokens.
      top_n: how many of the likeliest tokens, at most V.

    Returns:
      chosen [B], the chosen token's; top_ids [B, top_n] and top [B, top_n], greatest first, lower ids first among
      equals; rank [B] int32, 1 and how many tokens are likelier than the chosen one.
    """
    logprobs = jax.nn.log_softmax(logits, axis=1)
    chosen = jnp.take_along_axis(logits, tokens[:, None], axis=1)
    rank = 1 + jnp.sum(logits > chosen, axis=1, dtype=jnp.int32)
    top, top_ids = jax.lax.top_k(logprobs, top_n)
    return jnp.take_along_axis(logprobs, tokens[:, None], axis=1)[:, 0], top_ids, top, rank
