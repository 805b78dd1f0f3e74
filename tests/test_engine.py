"""The engine against transformers, against itself alone, and under pressure: few pages, many requests."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from convert.run import convert
from engine_run import finish, make_engine, run, tokens
from greedy_reference import STORIES, agree_up_to_ties, equal_to_transformers, story_prompts
from hf_models import make_hf_folder
from jaxinfer.engine.params import SamplingParams
from jaxinfer.engine.request import Request

STORIES260K = Path(__file__).parents[2] / "shared" / "data" / "stories260K"


@pytest.fixture(scope="module")
def stories(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stories")
    convert(STORIES, folder / "ckpt", dtype="float32", quiet=True)
    return folder / "ckpt"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    make_hf_folder(folder / "hf", max_position_embeddings=256)
    convert(folder / "hf", folder / "ckpt", quiet=True)
    return folder / "ckpt"


@pytest.mark.slow
def test_greedy_tokens_of_the_embedded_model_equal_transformers(stories):
    lengths = [1, 2, 15, 16, 17, 31, 100, 255, 256, 257, 500, 700, 899, 900, *random.Random(0).sample(range(1, 900), 6)]
    prompts = story_prompts(lengths)
    engine = make_engine(stories, max_batch=6, prefill_chunk=256, pages=200)
    found = run(engine, prompts, SamplingParams(max_new_tokens=40, ignore_eos=True))
    equal_to_transformers(found, prompts)


@pytest.mark.slow
@pytest.mark.skipif(not STORIES260K.exists(), reason="needs ../shared/data/stories260K, which does not ship")
def test_stories260k_goldens(tmp_path):
    convert(STORIES260K, tmp_path / "ckpt", quiet=True)
    golden = json.loads((STORIES260K / "golden_greedy.json").read_text())["cases"]
    prompts = {str(i): case["prompt_ids"] for i, case in enumerate(golden)}
    found = run(make_engine(tmp_path / "ckpt"), prompts, SamplingParams(max_new_tokens=128, ignore_eos=True))
    whole = 0
    for i, case in enumerate(golden):
        whole += agree_up_to_ties(found[str(i), 0].token_ids, case["new_ids"], case["margins"])
    assert whole >= len(golden) - 1


def test_a_model_of_many_ends_leaves_room_for_as_many_stops_as_a_request_may_have(tmp_path):
    make_hf_folder(tmp_path / "hf", num_hidden_layers=1, vocab_size=128)
    (tmp_path / "hf" / "generation_config.json").write_text(json.dumps({"eos_token_id": list(range(3, 33))}))
    convert(tmp_path / "hf", tmp_path / "ckpt", quiet=True)
    asks = SamplingParams(max_new_tokens=3, stop_token_ids=list(range(33, 97)), min_new_tokens=2)
    found = run(make_engine(tmp_path / "ckpt"), {"a": [40, 41]}, asks)
    assert 2 <= len(found["a", 0].token_ids) <= 3


def random_requests(count: int, seed: int):
    rng = random.Random(seed)
    prompts, params = {}, {}
    for i in range(count):
        length = rng.choice([1, 3, 15, 16, 17, 40, 90, rng.randint(1, 200)])
        prompts[str(i)] = [rng.randrange(3, 96) for _ in range(length)]
        params[str(i)] = SamplingParams(
            max_new_tokens=rng.randint(1, 50),
            temperature=rng.choice([0.0, 0.0, 1.0]),
            seed=i,
            top_p=rng.choice([1.0, 0.8]),
            frequency_penalty=rng.choice([0.0, 0.3]),
            stop_token_ids=(rng.randrange(3, 96),),
            n=rng.choice([1, 1, 2]),
        )
    return prompts, params


@pytest.fixture(scope="module")
def each_alone(tiny):
    prompts, params = random_requests(200, seed=4)
    engine, outputs = make_engine(tiny), {}
    for name, prompt in prompts.items():
        outputs |= run(engine, {name: prompt}, params)
    return outputs


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["", "stage=2,data=2"])
def test_hundreds_of_requests_through_few_pages_equal_each_alone(tiny, each_alone, mesh):
    # pages for one and a half contexts: admission, growth and preemption all happen
    crowded = make_engine(tiny, mesh, max_batch=8, page_size=8, pages=49)
    crowded.scheduler._admission._surely_carries = lambda place, seq: True  # lets in more than the pages carry
    found = run(crowded, *random_requests(200, seed=4))
    assert crowded.stats.preemptions > 0
    assert crowded.scheduler.free_pages == [48] * crowded.mesh.shape["data"]
    assert tokens(found) == tokens(each_alone)
    assert all(found[key].finish_reason == output.finish_reason for key, output in each_alone.items())


def test_slots_are_refilled_while_others_run(tiny):
    engine = make_engine(tiny, max_batch=2)
    params = {"long": SamplingParams(max_new_tokens=60, ignore_eos=True)}
    params |= {str(i): SamplingParams(max_new_tokens=4, ignore_eos=True) for i in range(5)}
    for name, each in params.items():
        engine.add(Request(name, [5, 6, 7], each))
    order = []
    while engine.has_unfinished():
        order += [update.request_id for update in engine.step() if update.output]
    assert order[-1] == "long" and len(order) == 6


@pytest.mark.slow
def test_what_waiting_requests_need_is_compiled_before_they_run(tiny):
    engine = make_engine(tiny, max_batch=8)
    lengths = [3, 200, 40, 17, 17, 30, 120, 5, 64, 31]
    for i, length in enumerate(lengths):
        params = SamplingParams(max_new_tokens=20 + i, ignore_eos=True, temperature=float(i == 2))
        engine.add(Request(str(i), [5] * length, params))
    engine.prepare()
    foreseen = set(engine._runner.programs.compiled())
    finish(engine)
    used = set(engine._runner.programs.compiled())
    assert used == foreseen and {program.kind for program in used} == {"prefill", "decode"}


def test_a_long_prompt_does_not_stall_decoding(tiny):
    engine = make_engine(tiny, max_batch=2, prefill_chunk=16, prefill_ticks=1)
    engine.add(Request("short", [5], SamplingParams(max_new_tokens=60, ignore_eos=True)))
    while not any(update.request_id == "short" for update in engine.step()):
        pass
    engine.add(Request("long", [5] * 200, SamplingParams(max_new_tokens=4, ignore_eos=True)))
    before_long = 0
    while engine.has_unfinished():
        updates = engine.step()
        if any(update.request_id == "long" for update in updates):
            break
        before_long += sum(len(update.token_ids) for update in updates)
    finish(engine)
    assert before_long >= 40, "200 tokens in chunks of 16 leave room for ten decode blocks and more"


@pytest.mark.parametrize(
    "prompt, params, message",
    [
        ([], {}, "empty"),
        ([96], {}, "token id 96 is out of range; legal: 0 to 95"),
        ([5] * 256, {}, "256 tokens; legal: up to 255"),
        ([5] * 257, {"max_new_tokens": 0}, r"257 tokens; legal: up to 256 \(max_context\)"),
        ([5], {"stop_token_ids": (400,)}, "400"),
        ([5], {"stop": "a"}, "stop: the checkpoint has no tokenizer, hence no text to look in; legal: stop_token_ids"),
    ],
)
def test_what_can_never_run_is_refused(tiny, prompt, params, message):
    with pytest.raises(ValueError, match=message):
        make_engine(tiny).add(Request("x", prompt, SamplingParams(**params)))


def test_what_is_no_request_is_refused(tiny):
    engine, params = make_engine(tiny), SamplingParams(max_new_tokens=2, ignore_eos=True)
    for request, message in (
        (Request("x", None, params), "prompt_token_ids: found null, legal is a list of whole numbers"),
        (Request("x", "56", params), "prompt_token_ids: found a string"),
        (Request("x", [5, "6"], params), "prompt_token_ids: found '6' in the list, legal are whole numbers"),
        (Request("x", [5, 6.5], params), "prompt_token_ids: found 6.5 in the list"),
        (Request("x", [5, True], params), "prompt_token_ids: found True in the list"),
        (Request(5, [5], params), "id: found 5, legal is a string"),
        (Request("\ud800", [5], params), "id: half of a surrogate pair"),
        (Request("x", [5], {"max_new_tokens": 2}), "params: found {'max_new_tokens': 2}, legal is SamplingParams"),
    ):
        with pytest.raises(ValueError, match=message):
            engine.add(request)
        assert not engine.has_unfinished()
    found = run(engine, {"x": np.array([5, 6], np.int16)}, params)["x", 0]
    assert found.prompt_tokens == 2 and found.completion_tokens == 2


def test_output_ends_with_the_context(tiny):
    prompts, lengths = {"long": [5] * 250, "just": [5] * 250, "short": [5] * 2}, {"long": 50, "just": 6, "short": 3}
    params = {name: SamplingParams(max_new_tokens=length, ignore_eos=True) for name, length in lengths.items()}
    found = run(make_engine(tiny), prompts, params)
    ends = {name: (each.finish_reason, each.limit, each.completion_tokens) for (name, _), each in found.items()}
    assert ends == {
        "long": ("length", "context", 6),
        "just": ("length", "max_new_tokens", 6),
        "short": ("length", "max_new_tokens", 3),
    }


def test_abort_frees_everything_and_leaves_others_alone(tiny):
    alone = tokens(run(make_engine(tiny), {"b": [9] * 20}, SamplingParams(max_new_tokens=30, ignore_eos=True)))
    engine = make_engine(tiny)
    for name, prompt in {"a": [5] * 20, "b": [9] * 20}.items():
        engine.add(Request(name, prompt, SamplingParams(max_new_tokens=30, ignore_eos=True)))
    while not any(update.request_id == "a" for update in engine.step()):
        pass
    (update,) = engine.abort("a")
    assert update.output.finish_reason == "abort"
    assert tokens(finish(engine)) == alone
    assert engine.scheduler.free_pages == [engine.memory.pages - 1]


def test_prompt_logprobs_equal_transformers(tmp_path):
    model = make_hf_folder(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "ckpt", quiet=True)
    prompt = [(7 * i) % 96 for i in range(75)]
    params = SamplingParams(max_new_tokens=3, prompt_logprobs=4, logprobs=4, ignore_eos=True)
    output = run(make_engine(tmp_path / "ckpt", "stage=2,tensor=2"), {"x": prompt}, params)["x", 0]
    whole = prompt + output.token_ids
    with torch.no_grad():
        expected = model(torch.tensor([whole])).logits[0].log_softmax(-1)
    assert output.prompt_logprobs[0] is None
    for at, entry in enumerate(output.prompt_logprobs[1:] + output.logprobs):
        row = expected[at]
        assert entry.token_id == whole[at + 1]
        assert entry.logprob == pytest.approx(row[whole[at + 1]].item(), abs=2e-4)
        assert [value for _, value in entry.top] == pytest.approx(row.topk(4).values.tolist(), abs=2e-4)
        assert entry.rank == 1 + int((row > row[whole[at + 1]]).sum())


def test_a_prompt_that_fills_the_context_is_scored_without_a_new_token(tmp_path):
    model = make_hf_folder(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "ckpt", quiet=True)
    prompts = {str(size): [(7 * i + size) % 96 for i in range(size)] for size in (128, 1, 127, 33)}
    with torch.no_grad():
        logits = {name: model(torch.tensor([ids])).logits[0].log_softmax(-1) for name, ids in prompts.items()}
    # and one that decodes beside them
    prompts["z"] = [5] * 20
    params = dict.fromkeys(prompts, SamplingParams(max_new_tokens=0, prompt_logprobs=0, n=2))
    params["z"] = SamplingParams(max_new_tokens=9, ignore_eos=True)
    engine = make_engine(tmp_path / "ckpt", "stage=2", max_batch=2, page_size=8, pages=17)
    found = run(engine, prompts, params)
    assert found["z", 0].completion_tokens == 9
    for name, expected in logits.items():
        for index in (0, 1):
            output = found[name, index]
            assert (output.finish_reason, output.limit) == ("length", "max_new_tokens")
            assert (output.token_ids, output.text, output.logprobs) == ([], "", None)
        for at, each in enumerate(found[name, 0].prompt_logprobs[1:]):
            assert each.logprob == pytest.approx(expected[at, prompts[name][at + 1]].item(), abs=2e-4)
    assert engine.scheduler.free_pages == [16]


def test_stop_strings_and_stop_tokens_end_the_text_before_them(stories):
    engine = make_engine(stories)
    prompt = engine.tokenizer.encode("Once upon a time")
    free = run(engine, {"x": prompt}, SamplingParams(max_new_tokens=40, ignore_eos=True))["x", 0]
    at = len(free.text) // 2
    stop = free.text[at : at + 7]
    cut = free.text.index(stop)
    output = run(engine, {"x": prompt}, SamplingParams(max_new_tokens=40, ignore_eos=True, stop=(stop,)))["x", 0]
    assert (output.text, output.finish_reason) == (free.text[:cut], "stop")
    assert output.token_ids == free.token_ids[: output.completion_tokens]
    assert stop in engine.tokenizer.decode(output.token_ids) and output.completion_tokens < 40

    last = free.token_ids[9]
    params = SamplingParams(max_new_tokens=40, ignore_eos=True, stop_token_ids=(last,))
    output = run(engine, {"x": prompt}, params)["x", 0]
    assert output.token_ids == free.token_ids[: free.token_ids.index(last) + 1]
    assert output.text == engine.tokenizer.decode(output.token_ids[:-1])


@pytest.mark.slow
def test_a_requests_tokens_do_not_depend_on_its_neighbours(tiny):
    wanted = SamplingParams(max_new_tokens=30, temperature=1.0, seed=11, n=2, ignore_eos=True, presence_penalty=0.5)
    alone = tokens(run(make_engine(tiny), {"x": [7, 8, 9]}, wanted))
    assert alone["x", 0] != alone["x", 1], "samples of one request draw differently"
    prompts, params = random_requests(12, seed=9)
    crowd = run(make_engine(tiny, max_batch=3), prompts | {"x": [7, 8, 9]}, params | {"x": wanted})
    assert {key: output.token_ids for key, output in crowd.items() if key[0] == "x"} == alone
