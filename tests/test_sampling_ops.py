"""Sampling ops against their plain forms, transformers' processors, float64 and exact distributions."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from jaxinfer.engine.params import SamplingParams
from jaxinfer.ops import sampling
from jaxinfer.ops.sampling import (
    adjust,
    count_tokens,
    reset_counts,
    sampling_arrays,
    select,
    select_plain,
    set_row,
    token_logprobs,
)

ROWS, VOCAB = 8, 67
drawn = partial(SamplingParams, temperature=1.0)


def rows(count, seeds=None, stop_ids=(), n_bias=4, n_stop=4, **fields):
    """Arrays of equal rows."""
    arrays = sampling_arrays((count,), n_bias, n_stop)
    for index in range(count):
        set_row(arrays, index, drawn(**fields), index if seeds is None else seeds[index], stop_ids)
    return arrays


@partial(jax.jit, static_argnums=0)
def masks(form, logits, arrays):
    return form(logits, sampling._scaled(logits, arrays), arrays)


jit_select, jit_plain = jax.jit(select), jax.jit(select_plain)
jit_count, jit_adjust = jax.jit(count_tokens), jax.jit(adjust, static_argnums=5)
inf = np.float32(np.inf)


def make_row(kind, rng):
    x = rng.normal(size=VOCAB).astype(np.float32) * 3
    if kind == "ties":
        x = np.round(x / 3)
    elif kind == "near ties":
        x = np.nextafter(np.float32(1), rng.choice([-inf, np.float32(1), inf], VOCAB), dtype=np.float32)
    elif kind == "flat":
        x = np.full(VOCAB, rng.choice([-1e30, -1.0, 0.0, -0.0, 7.0]))
    elif kind == "zeros of both signs":
        x = rng.choice(np.array([0.0, -0.0, 1e-30], np.float32), VOCAB)
    elif kind == "one hot":
        x = np.full(VOCAB, -inf)
        x[rng.integers(VOCAB)] = rng.normal()
    elif kind == "nothing":
        x = np.full(VOCAB, -inf)
    elif kind == "holes":
        x[rng.random(VOCAB) < 0.5] = -inf
    elif kind == "steep":
        x = x * 1e37
    return x.astype(np.float32)


KINDS = ("plain", "ties", "near ties", "flat", "zeros of both signs", "one hot", "nothing", "holes", "steep")
ROW = st.tuples(
    st.sampled_from(KINDS),
    st.sampled_from([0.0, 1e-6, 0.3, 1.0, 1.0, 50.0]),
    st.sampled_from([-1, 0, 0, 1, 2, 7, VOCAB - 1, VOCAB, VOCAB + 1, 2**31 - 1]),
    st.one_of(st.sampled_from([0.0, 0.5, 0.9, 0.99999994, 1.0]), st.floats(0, 1, width=32)),
    st.sampled_from([0.0, 0.0, 0.05, 1.0]),
)


@settings(max_examples=200, deadline=None)
@given(st.lists(ROW, min_size=ROWS, max_size=ROWS), st.integers(0, 2**32 - 1))
def test_threshold_search_equals_sort(settings_of_rows, seed):
    rng = np.random.default_rng(seed)
    arrays = sampling_arrays((ROWS,), 1, 1)
    logits = np.stack([make_row(kind, rng) for kind, *_ in settings_of_rows])
    for index, (_, *limits) in enumerate(settings_of_rows):
        for name, value in zip(("temperature", "top_k", "top_p", "min_p"), limits):
            getattr(arrays, name)[index] = value
    arrays.seed[:] = rng.integers(0, 2**32, ROWS)
    n_out = rng.integers(0, 1000, ROWS).astype(np.int32)
    fast, plain = (np.asarray(masks(form, logits, arrays)) for form in (sampling.kept, sampling.kept_plain))
    draws = arrays.temperature > 0  # the others' limits are not even looked at
    np.testing.assert_array_equal(fast[draws], plain[draws])
    tokens = np.asarray(jit_select(logits, arrays, n_out))
    np.testing.assert_array_equal(tokens, jit_plain(logits, arrays, n_out))
    alive = np.isfinite(logits).any(axis=1)
    expected = np.where(alive, logits.argmax(axis=1), sampling.NON_FINITE)
    np.testing.assert_array_equal(tokens[~draws | ~alive], expected[~draws | ~alive])
    assert np.isfinite(logits[np.arange(ROWS), tokens])[alive].all()


def exact_kept(logits, temperature, top_k, top_p, min_p):
    """The definition in float64 for one row: tokens left, and how far the closest decision of top-p was."""
    scaled = (logits.astype(np.float64) - logits.max()) / temperature
    order = np.lexsort((np.arange(len(logits)), -logits))
    weight = np.exp(scaled)
    keep = weight >= min_p
    if 0 < top_k < len(logits):
        keep &= logits >= logits[order[top_k - 1]]
    weight = np.where(keep, weight, 0)[order] / weight[keep].sum()
    before = np.cumsum(weight) - weight
    if top_p < 1:
        nucleus = np.zeros_like(keep)
        nucleus[order] = (before < top_p) | (np.arange(len(logits)) == 0)
        keep &= nucleus
    return keep, np.abs(before - top_p).min()


@pytest.mark.parametrize("vocab", [50, 32003])
def test_limits_in_float64(vocab):
    rng = np.random.default_rng(vocab)
    count, compared = 12, 0
    logits = rng.normal(size=(count, vocab)).astype(np.float32) * rng.uniform(0.5, 4, (count, 1)).astype(np.float32)
    arrays = sampling_arrays((count,), 1, 1)
    arrays.temperature[:] = rng.choice([0.5, 1, 1.7], count)
    arrays.top_k[:] = rng.choice([0, 1, 40, vocab], count)
    arrays.top_p[:] = rng.choice([0, 0.3, 0.9, 0.999, 1], count)
    arrays.min_p[:] = rng.choice([0, 0.01, 0.2], count)
    found = np.asarray(masks(sampling.kept, logits, arrays))
    for index in range(count):
        limits = [float(each[index]) for each in (arrays.temperature, arrays.top_k, arrays.top_p, arrays.min_p)]
        keep, margin = exact_kept(logits[index], limits[0], int(limits[1]), limits[2], limits[3])
        if margin > 1e-7:
            compared += 1
            np.testing.assert_array_equal(found[index], keep, err_msg=f"row {index}: {limits}")
    assert compared >= count / 2


def test_top_p_splits_ties_by_id_and_top_k_keeps_them():
    logits = np.full((ROWS, VOCAB), -inf, np.float32)
    logits[:, :8] = [1, 3, 2, 3, 2, 2, 2, 0]
    weight = np.exp(logits[0].astype(np.float64) - 3)
    share = (2 + 1.5 * weight[2]) / weight.sum()  # both threes, one two and half of the next
    found = masks(sampling.kept, logits, rows(ROWS, n_bias=1, n_stop=1, top_p=share))
    assert np.flatnonzero(found[0]).tolist() == [1, 2, 3, 4]
    found = masks(sampling.kept, logits, rows(ROWS, n_bias=1, n_stop=1, top_k=3))
    assert np.flatnonzero(found[0]).tolist() == [1, 2, 3, 4, 5, 6]


def test_limits_agree_with_transformers():
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(6, 500)).astype(np.float32) * 2
    scores = torch.from_numpy(logits)
    for fields in (
        {"temperature": 0.6, "top_k": 30},
        {"temperature": 1.4, "top_p": 0.85},
        {"temperature": 0.9, "min_p": 0.07},
        {"temperature": 1.2, "min_p": 0.01, "top_k": 60, "top_p": 0.7},
        {"top_k": 10_000, "top_p": 1.0},
    ):
        chain = [TemperatureLogitsWarper(fields.get("temperature", 1.0))]
        for name, warper in (("min_p", MinPLogitsWarper), ("top_k", TopKLogitsWarper), ("top_p", TopPLogitsWarper)):
            if name in fields:
                chain.append(warper(fields[name]))
        expected = scores
        for each in chain:
            expected = each(None, expected)
        arrays = rows(6, **fields)
        np.testing.assert_array_equal(masks(sampling.kept, logits, arrays), torch.isfinite(expected), str(fields))
        scaled = np.asarray(sampling._scaled(jnp.asarray(logits), arrays))
        unlimited = chain[0](None, scores).numpy()
        np.testing.assert_allclose(scaled, unlimited - unlimited.max(axis=1, keepdims=True), atol=2e-5)


def test_greedy_takes_the_lowest_of_equals():
    logits = np.zeros((ROWS, VOCAB), np.float32)
    logits[1, [7, 4]] = 2
    logits[2, :9] = -inf
    arrays = rows(ROWS, n_bias=1, n_stop=1, temperature=0.0)
    assert jit_select(logits, arrays, np.zeros(ROWS, np.int32)).tolist()[:4] == [0, 4, 9, 0]


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"temperature": 0.6},
        {"temperature": 1.5, "top_k": 12},
        {"top_p": 0.8},
        {"min_p": 0.1, "top_k": 30, "top_p": 0.9},
    ],
    ids=str,
)
def test_frequencies_follow_the_distribution(fields):
    count, repeats = 4000, 6
    logits = np.random.default_rng(2).normal(size=40).astype(np.float32) * 1.5
    arrays = rows(count, **fields)
    tokens = [jit_select(np.tile(logits, (count, 1)), arrays, np.full(count, i, np.int32)) for i in range(repeats)]
    params = drawn(**fields)
    keep, _ = exact_kept(logits, params.temperature, params.top_k, params.top_p, params.min_p)
    p = np.where(keep, np.exp(logits.astype(np.float64) / params.temperature), 0)
    p /= p.sum()
    found = np.bincount(np.concatenate(tokens), minlength=40)
    assert not found[~keep].any()
    assert scipy.stats.chisquare(found[keep], p[keep] * count * repeats).pvalue > 1e-3


def test_draws_of_other_seeds_and_steps_are_independent():
    count, vocab = 20_000, 6
    logits = np.tile(np.linspace(0, 1, vocab, dtype=np.float32), (count, 1))
    step = [np.asarray(jit_select(logits, rows(count), np.full(count, i, np.int32))) for i in range(2)]
    for one, other in ((step[0], step[1]), (step[0][:-1], step[0][1:])):
        table = np.zeros((vocab, vocab))
        np.add.at(table, (one, other), 1)
        assert scipy.stats.chi2_contingency(table).pvalue > 1e-3


def test_noise_of_a_large_vocabulary_has_one_winner():
    noise = jax.jit(sampling._gumbel, static_argnums=2)(np.arange(64, dtype=np.uint32), np.zeros(64, np.int32), 2**18)
    first_two = np.asarray(jax.lax.top_k(noise, 2)[0])
    assert (first_two[:, 0] > first_two[:, 1]).all()
    # the greatest of n standard Gumbel variates, less log n, is one again
    assert scipy.stats.kstest(first_two[:, 0] - 18 * np.log(2), "gumbel_r").pvalue > 1e-3
    assert np.isfinite(np.asarray(noise)).all()


def test_a_row_depends_on_itself_only():
    rng = np.random.default_rng(3)
    own = rng.normal(size=VOCAB).astype(np.float32)
    tokens = set()
    for place in (0, 3, ROWS - 1, *rng.integers(0, ROWS, 5)):
        arrays = sampling_arrays((ROWS,), 1, 1)
        for name, values in (
            ("temperature", [0, 0.5, 1]),
            ("top_k", [0, 1, 9]),
            ("top_p", [0, 0.5, 1]),
            ("min_p", [0, 0.3]),
        ):
            getattr(arrays, name)[:] = rng.choice(values, ROWS)
        arrays.seed[:] = rng.integers(0, 2**32, ROWS)
        logits = rng.normal(size=(ROWS, VOCAB)).astype(np.float32)
        n_out = rng.integers(0, 99, ROWS).astype(np.int32)
        logits[place], n_out[place] = own, 5
        set_row(arrays, place, drawn(top_k=20, top_p=0.95), 77, ())
        tokens.add(int(jit_select(logits, arrays, n_out)[place]))
    alone = rows(1, seeds=[77], top_k=20, top_p=0.95)
    tokens.add(int(jit_plain(own[None], alone, np.array([5], np.int32))[0]))
    assert len(tokens) == 1


def test_full_size_needs_no_sort_and_little_memory():
    count, vocab = 256, 2**18
    arrays = jax.tree.map(lambda each: jax.ShapeDtypeStruct(each.shape, each.dtype), sampling_arrays((count,)))
    logits = jax.ShapeDtypeStruct((count, vocab), jnp.float32)
    compiled = jax.jit(select).lower(logits, arrays, jax.ShapeDtypeStruct((count,), jnp.int32)).compile()
    assert " sort(" not in compiled.as_text()
    assert compiled.memory_analysis().temp_size_in_bytes <= 12 * count * vocab * 4


# ---- penalties, bias, bans, counts


def history(rng, count, vocab, length):
    """Prompts and outputs of rows, and their counts as the engine builds them: chunks of prompt, then step by step."""
    prompt, output = (rng.integers(0, vocab, (count, length)).astype(np.int32) for _ in range(2))
    counts = jnp.zeros((count, vocab), jnp.int32)
    slots = np.arange(count, dtype=np.int32)
    for chunk in np.split(prompt, 2, axis=1):
        counts = jit_count(counts, slots, chunk, np.ones_like(chunk, bool), 0)
    for step in output.T:
        counts = jit_count(counts, slots, step, np.zeros_like(step, bool), 0)
    return prompt, output, counts


def test_penalties_agree_with_transformers():
    rng = np.random.default_rng(4)
    count, vocab = 3, 40
    prompt, output, counts = history(rng, count, vocab, 8)
    logits = rng.normal(size=(count, vocab)).astype(np.float32) * 2
    logits[0, prompt[0, 0]] = -inf
    ids, scores = torch.from_numpy(np.concatenate([prompt, output], axis=1)).long(), torch.from_numpy(logits)
    n_out = np.full(count, 8, np.int32)

    def found(stop_ids=(), **fields):
        return np.asarray(jit_adjust(logits, counts, rows(count, stop_ids=stop_ids, **fields), n_out, 0, vocab))

    for penalty in (1.3, 0.7):
        expected = RepetitionPenaltyLogitsProcessor(penalty)(ids, scores)
        np.testing.assert_allclose(found(repetition_penalty=penalty), expected, rtol=1e-6)
    bias = {3: 1.5, 39: -100.0, 0: 2.0}
    expected = SequenceBiasLogitsProcessor({(token,): value for token, value in bias.items()})(ids, scores)
    np.testing.assert_allclose(found(logit_bias=bias), expected, rtol=1e-6)
    for least in (8, 9):
        expected = MinNewTokensLengthLogitsProcessor(8, least, [5, 7], device="cpu")(ids, scores)
        np.testing.assert_array_equal(found(stop_ids=[5, 7], min_new_tokens=least), expected)


def test_presence_and_frequency_count_the_output_only():
    rng = np.random.default_rng(5)
    prompt, output, counts = history(rng, 3, 20, 10)
    logits = rng.normal(size=(3, 20)).astype(np.float32)
    arrays = rows(3, presence_penalty=0.75, frequency_penalty=-0.5)
    found = jit_adjust(logits, counts, arrays, np.zeros(3, np.int32), 0, 20)
    times = np.stack([np.bincount(row, minlength=20) for row in output])
    np.testing.assert_allclose(found, logits - 0.75 * (times > 0) + 0.5 * times, rtol=1e-6, atol=1e-6)
    assert (times > 1).any() and any(set(p) - set(o) for p, o in zip(prompt, output))


def test_neutral_rows_stay_as_they_are():
    rng = np.random.default_rng(6)
    _, _, counts = history(rng, 3, 20, 10)
    logits = rng.normal(size=(3, 20)).astype(np.float32)
    logits[0, :3] = [0.0, -0.0, -inf]
    found = np.asarray(jit_adjust(logits, counts, rows(3, stop_ids=[3]), np.zeros(3, np.int32), 0, 20))
    np.testing.assert_array_equal(found.view(np.uint32), logits.view(np.uint32))


def test_a_vocabulary_in_shards_is_the_whole_one():
    rng = np.random.default_rng(7)
    count, vocab, width, length = 4, 26, 7, 9  # 4 shards, two padding ids
    tokens = rng.integers(-1, vocab, (3, count, length)).astype(np.int32)
    in_prompt = rng.random((3, count, length)) < 0.5
    logits = rng.normal(size=(count, 4 * width)).astype(np.float32)
    arrays = rows(
        count,
        stop_ids=[0, 6, 7, 25],
        logit_bias={0: 5.0, 6: -1.0, 7: 2.0, 27: 3.0},
        repetition_penalty=1.2,
        presence_penalty=0.3,
        frequency_penalty=0.1,
        min_new_tokens=2,
    )
    n_out = np.array([0, 1, 2, 3], np.int32)

    @jax.jit
    def run(counts, logits, start):
        for step, prompt in zip(tokens, in_prompt):
            counts = count_tokens(counts, np.arange(count), step, prompt, start)
        return counts, adjust(logits, counts, arrays, n_out, start, vocab)

    whole_counts, whole = run(jnp.zeros((count, 4 * width), jnp.int32), logits, 0)
    shards = [
        run(jnp.zeros((count, width), jnp.int32), logits[:, start : start + width], start)
        for start in range(0, 4 * width, width)
    ]
    np.testing.assert_array_equal(np.concatenate([counts for counts, _ in shards], axis=1), whole_counts)
    np.testing.assert_array_equal(np.concatenate([part for _, part in shards], axis=1), whole)
    assert (np.asarray(whole)[:, vocab:] == -inf).all()
    assert (np.asarray(whole)[:2, [0, 6, 7, 25]] == -inf).all() and np.isfinite(np.asarray(whole)[2:, :vocab]).all()


TOKENS = st.lists(
    st.tuples(st.integers(0, 3), st.lists(st.tuples(st.integers(-1, 9), st.booleans()), min_size=5, max_size=5)),
    min_size=1,
    max_size=4,
)


@settings(max_examples=60, deadline=None)
@given(st.lists(TOKENS, max_size=3))
def test_counts_are_what_counting_gives(calls):
    counts, expected = jnp.zeros((4, 10), jnp.int32), np.zeros((4, 10), int)
    for call in calls:
        call = call + [(0, [(-1, True)] * 5)] * (4 - len(call))
        slots = np.array([slot for slot, _ in call], np.int32)
        tokens, in_prompt = (np.array([[each[i] for each in row] for _, row in call]) for i in range(2))
        counts = jit_count(counts, slots, tokens.astype(np.int32), in_prompt.astype(bool), 0)
        for slot, row in call:
            for token, prompt in row:
                if token >= 0:
                    expected[slot, token] = expected[slot, token] | 1 << 30 if prompt else expected[slot, token] + 1
    np.testing.assert_array_equal(counts, expected)


def test_reset_zeroes_the_masked_rows():
    counts = jnp.ones((5, 3), jnp.int32)
    found = reset_counts(counts, np.array([1, 0, 4, 0]), np.array([True, False, True, False]))
    assert found.sum(axis=1).tolist() == [3, 0, 3, 3, 0]


@pytest.mark.parametrize("name", ["count_tokens", "reset_counts"])
def test_counts_change_in_place(name):
    counts = jax.ShapeDtypeStruct((64, 32000), jnp.int32)
    slots, tokens = jax.ShapeDtypeStruct((4,), jnp.int32), jax.ShapeDtypeStruct((4, 32), jnp.int32)
    flags = jax.ShapeDtypeStruct((4, 32), bool)
    if name == "count_tokens":
        lowered = jax.jit(count_tokens, donate_argnums=0).lower(counts, slots, tokens, flags, 0)
    else:
        lowered = jax.jit(reset_counts, donate_argnums=0).lower(counts, slots, jax.ShapeDtypeStruct((4,), bool))
    memory = lowered.compile().memory_analysis()
    assert memory.alias_size_in_bytes == 64 * 32000 * 4
    assert memory.temp_size_in_bytes < 64 * 32000 * 4


def test_set_row_overwrites_the_row_and_no_other():
    arrays = sampling_arrays((2, 3), n_bias=3, n_stop=2)
    before = jax.tree.map(np.copy, arrays)
    crowded = drawn(logit_bias={1: 1.0, 2: 2.0, 3: -3.0}, top_k=5, min_new_tokens=2)
    set_row(arrays, (1, 2), crowded, 2**32 + 9, [4, 4, 8])
    assert arrays.bias_ids[1, 2].tolist() == [1, 2, 3] and arrays.bias_values[1, 2].tolist() == [1, 2, -3]
    assert arrays.stop_ids[1, 2].tolist() == [4, 8] and arrays.seed[1, 2] == 9 and arrays.min_new[1, 2] == 2
    for now, then in zip(arrays, before):
        np.testing.assert_array_equal(now[0], then[0])
        np.testing.assert_array_equal(now[1, :2], then[1, :2])
    set_row(arrays, (1, 2), SamplingParams(), 0, ())
    for now, then in zip(arrays, before):
        np.testing.assert_array_equal(now, then)
    with pytest.raises(ValueError, match="logit_bias: 4 entries, at most 3"):
        set_row(arrays, (0, 0), drawn(logit_bias=dict.fromkeys(range(4), 0.0)), 0, ())
    with pytest.raises(ValueError, match="stop ids: 3 entries, at most 2"):
        set_row(arrays, (0, 0), drawn(), 0, [1, 2, 3])


# ---- logprobs


def test_logprobs_are_the_models_own():
    rng = np.random.default_rng(8)
    logits = rng.normal(size=(4, 30)).astype(np.float32) * 5
    logits[1, :28] = -inf
    logits[2, [3, 9, 12]] = 40
    tokens = np.array([5, 29, 12, int(logits[3].argmax())], np.int32)
    chosen, top_ids, top, rank = token_logprobs(jnp.asarray(logits), tokens, 3)
    expected = torch.log_softmax(torch.from_numpy(logits).double(), -1).numpy()
    np.testing.assert_allclose(chosen, expected[np.arange(4), tokens], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(top, -np.sort(-expected, axis=1)[:, :3], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(top_ids[2], [3, 9, 12])
    np.testing.assert_array_equal(np.take_along_axis(logits, np.asarray(top_ids), 1), -np.sort(-logits, axis=1)[:, :3])
    assert rank.tolist() == [1 + (logits[0] > logits[0, 5]).sum(), 1 + (logits[1] > logits[1, 29]).sum(), 1, 1]
    assert token_logprobs(jnp.asarray(logits), tokens, 0)[1].shape == (4, 0)
