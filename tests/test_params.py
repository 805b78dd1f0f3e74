"""Sampling parameters: what is legal, what an error says, and the way to JSON and back."""

import json

import attrs
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxinfer.engine.params import SamplingParams

INTEGERS = {
    "top_k": (-1, 2**31 - 1),
    "seed": (0, 2**32 - 1),
    "n": (1, 4096),
    "min_new_tokens": (0, 64),
    "max_new_tokens": (0, 2**30),
    "logprobs": (0, 20),
    "prompt_logprobs": (0, 20),
}
NUMBERS = {
    "temperature": (0, 1e6),
    "top_p": (0, 1),
    "min_p": (0, 1),
    "repetition_penalty": (0.01, 100),
    "presence_penalty": (-100, 100),
    "frequency_penalty": (-100, 100),
}
OPTIONAL = ("seed", "logprobs", "prompt_logprobs", "logit_bias")


def test_defaults_are_greedy():
    params = SamplingParams()
    assert (params.temperature, params.n, params.max_new_tokens, params.stop) == (0.0, 1, 64, ())
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        params.temperature = 1.0
    assert all(field.metadata["help"] for field in attrs.fields(SamplingParams))


@pytest.mark.parametrize("name", [*INTEGERS, *NUMBERS])
def test_numbers_within_their_bounds(name):
    low, high = (INTEGERS | NUMBERS)[name]
    step = 1 if name in INTEGERS else 1e-3
    for value in (low, high, np.int64(high) if name in INTEGERS else np.float32(high)):
        found = getattr(SamplingParams(**{name: value}), name)
        assert found == value and type(found) is (int if name in INTEGERS else float)
    wrong = [low - step, high + step * max(1, high), "1", True, [1], float("nan"), float("inf"), -float("inf")]
    wrong += [1.5] * (name in INTEGERS) + [None] * (name not in OPTIONAL)
    for value in wrong:
        with pytest.raises(ValueError, match=rf"^{name}: .* is not legal; legal: "):
            SamplingParams(**{name: value})
    if name in OPTIONAL:
        assert getattr(SamplingParams(**{name: None}), name) is None


def test_temperature_is_zero_or_keeps_float32_finite():
    assert SamplingParams(temperature=-0.0).temperature == 0
    with pytest.raises(ValueError, match=r"temperature: 1e-07 is not legal; legal: 0 or a number from 1e-06 to 1e"):
        SamplingParams(temperature=1e-7)


def test_logit_bias():
    assert SamplingParams(logit_bias={"12": 1, 3: -100.0, np.int32(5): 0.5}).logit_bias == {12: 1.0, 3: -100.0, 5: 0.5}
    assert len(SamplingParams(logit_bias=dict.fromkeys(range(300), 1)).logit_bias) == 300
    for value, message in (
        (dict.fromkeys(range(301), 1), "logit_bias: 301 entries are not legal; legal: at most 300"),
        ([[1, 2]], "logit_bias: .* is not legal; legal: at most 300 pairs"),
        ({"x": 1}, "logit_bias: token id: 'x' is not legal; legal: an integer from 0"),
        ({True: 1}, "logit_bias: token id: True is not legal"),
        ({-1: 1}, "logit_bias: token id: -1 is not legal"),
        ({"²": 1}, "logit_bias: token id: '²' is not legal"),
        ({1: 0.5, "1": 0.5}, "logit_bias: token id 1 is given twice"),
        ({7: float("nan")}, "logit_bias: bias of token id 7: nan is not legal; legal: a number from -100 to 100"),
        ({7: "1"}, "logit_bias: bias of token id 7: '1' is not legal"),
        ({7: 100.5}, "logit_bias: bias of token id 7: 100.5 is not legal"),
    ):
        with pytest.raises(ValueError, match=message):
            SamplingParams(logit_bias=value)


def test_stops():
    assert SamplingParams(stop="\n").stop == ("\n",)
    assert SamplingParams(stop=["a", "bc"], stop_token_ids=[2, 0]).stop == ("a", "bc")
    for value in ("", [""], [1], None, {"a": 1}, 5, ["a", None]):
        with pytest.raises(ValueError, match=r"stop: .* is not legal; legal: a string that is not empty, or a list"):
            SamplingParams(stop=value)
    assert len(SamplingParams(stop_token_ids=list(range(64))).stop_token_ids) == 64
    for value, message in (
        (list(range(65)), "stop_token_ids: 65 ids are not legal; legal: a list of at most 64"),
        (3, "stop_token_ids: 3 is not legal; legal: a list"),
        ("12", "stop_token_ids: '12' is not legal"),
        ([1, -1], r"stop_token_ids\[1\]: -1 is not legal"),
        ([True], r"stop_token_ids\[0\]: True is not legal"),
    ):
        with pytest.raises(ValueError, match=message):
            SamplingParams(stop_token_ids=value)


def test_flags_and_fields_that_belong_together():
    for value in (1, 0, "true", None):
        with pytest.raises(ValueError, match=r"ignore_eos: .* is not legal; legal: true, false"):
            SamplingParams(ignore_eos=value)
    with pytest.raises(
        ValueError, match=r"min_new_tokens: 65 is not legal; legal: an integer from 0 to max_new_tokens, 64"
    ):
        SamplingParams(min_new_tokens=65)


def test_unknown_fields_name_what_is_near():
    for make in (SamplingParams.from_dict, SamplingParams().merge):
        with pytest.raises(
            ValueError, match=r"temprature: no such sampling field; did you mean temperature.*legal: .*top_k"
        ):
            make({"temprature": 1})
        with pytest.raises(ValueError, match=r"zzz: no such sampling field; legal: temperature, top_k"):
            make({"zzz": 1})
        with pytest.raises(ValueError, match=r"top_k: 1.5 is not legal"):
            make({"top_k": 1.5})


def test_merge_replaces_and_leaves_the_rest():
    base = SamplingParams(temperature=0.5, stop="x", logit_bias={1: 2.0}, seed=3)
    merged = base.merge({"seed": None, "top_k": 4})
    assert (merged.temperature, merged.stop, merged.logit_bias, merged.seed, merged.top_k) == (
        0.5,
        ("x",),
        {1: 2.0},
        None,
        4,
    )
    assert base.seed == 3 and base.top_k == 0


@given(
    st.fixed_dictionaries(
        {},
        optional={
            **{name: st.integers(low, high) for name, (low, high) in INTEGERS.items() if name != "max_new_tokens"},
            **{name: st.floats(low, high) for name, (low, high) in NUMBERS.items() if name != "temperature"},
            "temperature": st.one_of(st.just(0), st.floats(1e-6, 1e6)),
            "logit_bias": st.dictionaries(st.integers(0, 1000).map(str), st.floats(-100, 100), max_size=5),
            "stop": st.one_of(st.text(min_size=1), st.lists(st.text(min_size=1), max_size=3)),
            "stop_token_ids": st.lists(st.integers(0, 1000), max_size=4),
            "ignore_eos": st.booleans(),
        },
    )
)
def test_json_and_back(fields):
    params = SamplingParams.from_dict(fields)
    data = params.to_dict()
    assert json.loads(json.dumps(data)) == data
    assert SamplingParams.from_dict(json.loads(json.dumps(data))) == params
    assert SamplingParams().merge(data) == params


def test_ids_beyond_the_vocabulary():
    params = SamplingParams(logit_bias={10: 1.0}, stop_token_ids=[11])
    params.check_vocabulary(12)
    with pytest.raises(ValueError, match=r"stop_token_ids: token id 11 is not legal; legal: 0 to 10"):
        params.check_vocabulary(11)
    with pytest.raises(ValueError, match=r"logit_bias: token id 10 is not legal; legal: 0 to 9"):
        params.check_vocabulary(10)
