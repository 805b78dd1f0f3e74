"""The same greedy and seeded tokens on every mesh as on one device, in float32."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from convert.run import convert
from engine_run import finish, make_engine, run, tokens
from hf_models import make_hf_folder
from jaxinfer.engine.params import SamplingParams
from jaxinfer.engine.request import Request

pytestmark = pytest.mark.slow

VOCABULARY = 131  # prime: padded on every mesh
PARAMS = {
    "a": SamplingParams(max_new_tokens=13, ignore_eos=True),
    "b": SamplingParams(max_new_tokens=11, ignore_eos=True, temperature=1.0, seed=3, top_p=0.9),
    "c": SamplingParams(max_new_tokens=9, ignore_eos=True, repetition_penalty=1.5, frequency_penalty=0.5, logprobs=3),
    "d": SamplingParams(max_new_tokens=12, ignore_eos=True, temperature=0.7, top_k=20, min_p=0.01, n=2),
    "e": SamplingParams(max_new_tokens=6, ignore_eos=True, prompt_logprobs=2, logit_bias={5: 4.0}),
    "f": SamplingParams(max_new_tokens=13, min_new_tokens=8, stop_token_ids=tuple(range(0, VOCABULARY, 3))),
}
LENGTHS = dict(zip(PARAMS, (1, 40, 17, 33, 50, 5)))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("meshes"), layers=4)


def make_checkpoint(folder, layers):
    sizes = {"vocab_size": VOCABULARY, "num_attention_heads": 8, "num_key_value_heads": 2}
    make_hf_folder(folder / "hf", num_hidden_layers=layers, tie_word_embeddings=False, **sizes)
    convert(folder / "hf", folder / "ckpt", quiet=True)
    return folder / "ckpt"


def prompts():
    rng = np.random.default_rng(0)
    return {name: rng.integers(3, VOCABULARY, length).tolist() for name, length in LENGTHS.items()}


@pytest.fixture(scope="module")
def one_device(checkpoint):
    return run(make_engine(checkpoint, prefill_chunk=16), prompts(), PARAMS)


def meshes() -> list:
    sizes = product((1, 2, 4, 8), repeat=3)
    even = [f"stage={s},data={d},tensor={t}" for s, d, t in sizes if 1 < s * d * t <= 8 and s < 8]
    uneven = [("stage=3", (1, 2, 1)), ("stage=2,tensor=2", (1, 3)), ("stage=3,data=2", (2, 1, 1))]
    return [(mesh, None) for mesh in even] + uneven


@pytest.mark.slow
@pytest.mark.parametrize("mesh, stage_layers", meshes(), ids=str)
def test_mesh_agrees_with_one_device(checkpoint, one_device, mesh, stage_layers):
    agrees(checkpoint, one_device, mesh, stage_layers)


@pytest.mark.parametrize(
    "mesh, stage_layers",
    [pytest.param("stage=2,data=2,tensor=2", None, marks=pytest.mark.slow), ("stage=3", (1, 2, 1))],
    ids=str,
)
def test_some_meshes_agree_with_one_device(checkpoint, one_device, mesh, stage_layers):
    agrees(checkpoint, one_device, mesh, stage_layers)


@pytest.mark.slow
def test_eight_stages_agree_with_one_device(tmp_path):
    checkpoint = make_checkpoint(tmp_path, layers=8)
    expected = run(make_engine(checkpoint, prefill_chunk=16), prompts(), PARAMS)
    agrees(checkpoint, expected, "stage=8", None)


@pytest.mark.slow
def test_decode_blocks_that_narrow_and_widen_agree_with_one_device(checkpoint):
    lengths = {str(i): 24 - 2 * i if i < 9 else 30 for i in range(12)}
    own = {name: SamplingParams(max_new_tokens=new, ignore_eos=True) for name, new in lengths.items()}
    own |= {
        name: own[name].merge({"temperature": 1.0, "seed": 3, "frequency_penalty": 0.5}) for name in ("0", "4", "7")
    }
    rng = np.random.default_rng(1)
    texts = {name: rng.integers(3, VOCABULARY, 3 + int(name)).tolist() for name in own}
    expected = run(make_engine(checkpoint), texts, own)
    engine = make_engine(checkpoint, "stage=2", max_batch=8)  # buckets of 1 and 4 rows in each of 2 microbatches
    engine.scheduler.config = replace(engine.scheduler.config, patience=1)
    rows, schedule = [], engine.scheduler.schedule

    def watched():
        dispatch = schedule()
        rows.append(getattr(dispatch, "rows", None))
        return dispatch

    engine.scheduler.schedule = watched
    outputs = {}
    for name in own:
        if name == "9":  # the narrow blocks become wide again
            while 1 not in rows:
                outputs |= {(each.request_id, 0): each.output for each in engine.step() if each.output}
        engine.add(Request(name, texts[name], own[name]))
    outputs |= finish(engine)
    assert tokens(outputs) == tokens(expected)
    assert 4 in rows[: rows.index(1)] and 4 in rows[rows.index(1) :]


def agrees(checkpoint, one_device, mesh, stage_layers):
    found = run(make_engine(checkpoint, mesh, stage_layers=stage_layers, prefill_chunk=16), prompts(), PARAMS)
    assert tokens(found) == tokens(one_device)
    for key, output in one_device.items():
        assert found[key].finish_reason == output.finish_reason
        for kind in ("logprobs", "prompt_logprobs"):
            compare_logprobs(getattr(found[key], kind), getattr(output, kind))


def compare_logprobs(found, expected):
    if expected is None:
        assert found is None
        return
    assert len(found) == len(expected)
    for one, other in zip(found, expected):
        if other is None:
            assert one is None
            continue
        assert one.token_id == other.token_id
        assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
        assert [value for _, value in one.top] == pytest.approx([value for _, value in other.top], abs=1e-4)


def test_steady_decode_has_no_bubble(checkpoint):
    engine = make_engine(checkpoint, "stage=4", max_batch=4)
    run(engine, {str(i): [5 + i] * 4 for i in range(4)}, SamplingParams(max_new_tokens=40, ignore_eos=True))
    assert engine.stats.steady_stage_ticks > 0
    assert engine.stats.steady_idle_stage_ticks == 0
