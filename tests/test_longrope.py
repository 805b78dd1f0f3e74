"""Sequences that outgrow longrope's trained length while they decode, against transformers and each other.

All their frequencies change there, those of the tokens that are in the cache already too."""

import numpy as np
import pytest
import torch

from convert.run import convert
from engine_run import finish, make_engine, run, tokens
from hf_models import make_hf_folder
from jaxinfer.engine.params import SamplingParams
from jaxinfer.engine.request import Request
from jaxinfer.engine.sequence import State

TRAINED = 32
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0 + i / 9 for i in range(4)],
    "long_factor": [2.0 + i for i in range(4)],
}
PROMPTS = {str(length): [3 + (7 * i + length) % 90 for i in range(length)] for length in (20, 31, 32, 33, 45)}
NEW = 20
GREEDY = SamplingParams(max_new_tokens=NEW, ignore_eos=True, logprobs=0)
SCORE = SamplingParams(max_new_tokens=0, prompt_logprobs=0)


@pytest.fixture(scope="module")
def phi3(tmp_path_factory):
    folder = tmp_path_factory.mktemp("phi3")
    longrope = {"rope_parameters": LONGROPE, "original_max_position_embeddings": TRAINED}
    model = make_hf_folder(folder / "hf", "phi3", pad_token_id=0, attn_implementation="eager", **longrope)
    convert(folder / "hf", folder / "ckpt", quiet=True)
    return folder / "ckpt", model


@pytest.fixture(scope="module")
def by_transformers(phi3):
    """For each prompt greedy tokens and their logprobs, with cache and without."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a model this small only waits for more
    found = {name: [greedy(phi3[1], prompt, cache) for cache in (True, False)] for name, prompt in PROMPTS.items()}
    torch.set_num_threads(threads)
    return found


def greedy(model, prompt: list[int], use_cache: bool) -> tuple[list[int], list[float]]:
    kept = {"return_dict_in_generate": True, "output_logits": True, "use_cache": use_cache}
    with torch.no_grad():
        made = model.generate(
            torch.tensor([prompt]), max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, eos_token_id=None, **kept
        )
    new = made.sequences[0, len(prompt) :].tolist()
    return new, [float(step[0].log_softmax(-1)[token]) for step, token in zip(made.logits, new, strict=True)]


def logprobs(found) -> list[float | None]:
    return [each and each.logprob for each in found]


@pytest.mark.parametrize("mesh", ["", pytest.param("stage=2,tensor=2", marks=pytest.mark.slow)])
def test_generate_score_and_transformers_agree_on_both_sides(phi3, by_transformers, mesh):
    engine = make_engine(phi3[0], mesh, max_batch=4)
    found = run(engine, PROMPTS, GREEDY)
    for (name, _), output in found.items():
        for expected, theirs in by_transformers[name]:
            assert output.token_ids == expected, name
            np.testing.assert_allclose(logprobs(output.logprobs), theirs, atol=2e-4)
    whole = {name: PROMPTS[name] + found[name, 0].token_ids for name in PROMPTS}
    beyond, within = run(engine, whole, SCORE), run(engine, {n: each[:TRAINED] for n, each in whole.items()}, SCORE)
    for (name, _), output in found.items():
        start = len(PROMPTS[name])
        ours = [*[None] * start, *logprobs(output.logprobs)]
        # a token goes by what is before it: the last one with the trained length before it has short factors yet, and
        # in a text that goes on, long ones
        first = max(start, TRAINED + 1)
        np.testing.assert_allclose(logprobs(beyond[name, 0].prompt_logprobs)[first:], ours[first:], atol=2e-4)
        scored = logprobs(within[name, 0].prompt_logprobs)[start:]
        np.testing.assert_allclose(scored, ours[start:TRAINED], atol=2e-4)


def test_a_prompts_logprobs_are_those_of_the_prompt_alone(phi3):
    engine = make_engine(phi3[0])
    prompts = {name: PROMPTS[name] for name in ("20", "32")}
    grown = run(engine, prompts, SamplingParams(max_new_tokens=16, ignore_eos=True, prompt_logprobs=0))
    for key, output in run(engine, prompts, SCORE).items():
        assert logprobs(grown[key].prompt_logprobs) == logprobs(output.prompt_logprobs)


SAMPLED = {"ignore_eos": True, "temperature": 1.0, "presence_penalty": 0.7}
SETTINGS = {"page_size": 16, "max_context": 112, "prefill_chunk": 16}


def requests() -> list[Request]:
    rng = np.random.default_rng(0)
    return [
        Request(
            str(place),
            rng.integers(3, 96, rng.integers(1, 40)).tolist(),
            SamplingParams(max_new_tokens=int(rng.integers(10, 70)), n=1 + place % 2, seed=place, **SAMPLED),
        )
        for place in range(10)
    ]


@pytest.fixture(scope="module")
def each_alone(phi3):
    engine, outputs = make_engine(phi3[0], max_batch=1, **SETTINGS), {}
    for request in requests():
        engine.add(request)
        outputs |= finish(engine)
    return tokens(outputs)


@pytest.mark.slow
def test_requests_that_outgrow_it_at_any_time_equal_each_alone(phi3, each_alone):
    """Others come and go meanwhile, and one after another loses its pages, on either side."""
    engine, rng, sides = make_engine(phi3[0], "stage=2", **SETTINGS), np.random.default_rng(0), set()
    for request in requests():
        engine.add(request)
        engine.add(Request(f"given up {request.id}", [5] * 28, SamplingParams(max_new_tokens=60, **SAMPLED)))
    updates = []
    while engine.has_unfinished():
        updates += engine.step()
        admission = engine.scheduler._admission
        residents = admission.shards[0].residents
        if residents and engine.steps < 200 and engine.steps % 4 == 0:
            victim = residents[rng.integers(len(residents))]
            if victim.request_id.startswith("given up"):
                engine.abort(victim.request_id)
            else:
                sides.add((victim.state, victim.target > TRAINED))
                admission._preempt(victim)
    found = {(update.request_id, update.index): update.output.token_ids for update in updates if update.output}
    assert sides >= {(State.RUNNING, False), (State.RUNNING, True)}
    assert {key: found[key] for key in each_alone} == each_alone
