"""The Python interface, on the embedded model."""

import math
from pathlib import Path

import pytest

from convert.__main__ import main as convert
from jaxinfer import LLM, SamplingParams

MODEL = Path(__file__).resolve().parents[1] / "examples" / "tinystories" / "model"
SMALL = {"max_batch": 4, "prefill_chunk": 32, "decode_steps": 4, "max_context": 256}
GREEDY = SamplingParams(max_new_tokens=16, ignore_eos=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    output = tmp_path_factory.mktemp("llm") / "ckpt"
    convert(["--source", str(MODEL), "--output", str(output), "--dtype", "float32"])
    return output


@pytest.fixture(scope="module")
def llm(folder):
    return LLM(folder, mesh={"tensor": 2}, cpu_devices=8, **SMALL)


def test_one_completion_per_prompt_in_order(llm):
    prompts = ["Once upon a time", {"prompt": "One day", "max_new_tokens": 3}, [5, 6, 7]]
    completions = llm.generate(prompts, GREEDY)
    assert completions[0].text.startswith(", there was a little girl named")
    assert [len(each.token_ids) for each in completions] == [16, 3, 16]
    assert completions[2].prompt_token_ids == [5, 6, 7]
    assert {each.finish_reason for each in completions} == {"length"}
    assert llm.generate("Once upon a time", GREEDY)[0].text == completions[0].text
    assert llm.generate([5, 6, 7], {"max_new_tokens": 16, "ignore_eos": True})[0].token_ids == completions[2].token_ids
    assert llm.generate([]) == []


def test_parameters_for_each_prompt(llm):
    params = [SamplingParams(max_new_tokens=2), {"max_new_tokens": 4, "n": 3, "temperature": 1}]
    short, several = llm.generate(["a", "b"], params)
    assert len(short.token_ids) == 2
    assert [sample.index for sample in several.samples] == [0, 1, 2]
    assert len({tuple(sample.token_ids) for sample in several.samples}) > 1
    assert llm.generate(["a", "b"], params)[1].samples[2].token_ids == several.samples[2].token_ids
    with pytest.raises(ValueError, match="params: found 1 for 2 prompts; legal: one for all or one for each"):
        llm.generate(["a", "b"], [GREEDY])


def test_a_stream_adds_up(llm):
    prompts = ["Once upon a time", "The dog"]
    whole = llm.generate(prompts, GREEDY)
    texts, ids, ended = {"0": "", "1": ""}, {"0": [], "1": []}, {}
    pieces = 0
    for update in llm.stream(prompts, GREEDY):
        texts[update.request_id] += update.text
        ids[update.request_id] += update.token_ids
        pieces += 1
        if update.output is not None:
            ended[update.request_id] = update.output
    assert pieces > 4
    for place, completion in enumerate(whole):
        assert texts[str(place)] == completion.text == ended[str(place)].text
        assert ids[str(place)] == completion.token_ids


def test_a_stream_that_is_left_makes_room(llm):
    stream = llm.stream(["Once", "The"], GREEDY)
    next(stream)
    with pytest.raises(RuntimeError, match="2 requests of this LLM are unfinished"):
        llm.generate("a")
    stream.close()
    assert not llm.engine.has_unfinished()
    assert len(llm.generate("a", GREEDY)[0].token_ids) == 16


def test_a_bad_prompt_stops_all_and_leaves_nothing(llm):
    with pytest.raises(ValueError, match="prompt 1: token id 4096 is out of range; legal: 0 to 4095"):
        llm.generate(["a", [4096]])
    with pytest.raises(ValueError, match=r"prompt 0: unknown field 'max_tokens'; did you mean 'max_new_tokens'\?"):
        llm.generate({"prompt": "a", "max_tokens": 3})
    with pytest.raises(ValueError, match="prompt 1: the prompt has 256 tokens; legal: up to 255"):
        llm.generate([[5], [5] * 256])
    assert not llm.engine.has_unfinished()
    assert llm.generate("a", GREEDY)[0].token_ids


def test_a_score_is_the_logprob_of_the_text(llm):
    good, bad = llm.score(["Once upon a time there was a girl.", "Upon girl was there time a once."])
    assert good.logprobs[0] is None and all(each < 0 for each in good.logprobs[1:])
    assert len(good.logprobs) == len(good.token_ids)
    assert good.total == pytest.approx(math.fsum(good.logprobs[1:]))
    assert good.total / len(good.token_ids) > bad.total / len(bad.token_ids)
    # the score of what the model says greedily is what the model said of it
    [said] = llm.generate("Once upon a time", {"max_new_tokens": 5, "logprobs": 0})
    [again] = llm.score([said.prompt_token_ids + said.token_ids])
    expected = [each.logprob for each in said.samples[0].logprobs]
    assert again.logprobs[-5:] == pytest.approx(expected, abs=1e-4)


def test_chat_needs_a_template(llm):
    talk = [{"role": "user", "content": "Tell me a story."}]
    with pytest.raises(ValueError, match="prompt 0: messages: the checkpoint's tokenizer has no chat template"):
        llm.chat(talk)
    tokenizer = llm.engine.tokenizer
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    try:
        [answer] = llm.chat(talk, GREEDY)
        assert tokenizer.decode(answer.prompt_token_ids) == "Tell me a story. "
        assert [each.token_ids for each in llm.chat([talk, talk], GREEDY)] == [answer.token_ids] * 2
    finally:
        tokenizer.chat_template = None


def test_options_are_checked_before_anything_loads(folder):
    for options, message in (
        ({"max_bach": 3}, "max_bach: no such option; legal: mesh, dtype,"),
        ({"mesh": "tensor=two"}, "tensor='two' is not a positive whole number"),
        ({"mesh": "stage=2", "stage_layers": (1, 4)}, "adds up to 5 layers, the model has 6"),
        ({"dtype": "int3"}, "dtype: 'int3' is not one of"),
    ):
        with pytest.raises(ValueError, match=message):
            LLM(folder, **options)
