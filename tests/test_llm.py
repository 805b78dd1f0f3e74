"""The Python interface, on the embedded model."""

import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from convert.__main__ import main as convert
from converting import without_checksums
from jaxinfer import LLM, SamplingParams
from jaxinfer.checkpoint.manifest import WithoutChecksums

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


def test_a_checkpoint_without_checksums_is_said_and_damage_to_the_tokenizer_refused(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "ckpt")
    path = copy / "tokenizer" / "tokenizer.json"
    data = path.read_bytes()
    path.write_bytes(data.replace(b"the", b"teh", 1))
    with pytest.raises(ValueError, match=r"tokenizer\.json: its bytes changed .*; the same conversion again mends it"):
        LLM(copy, **SMALL)
    path.write_bytes(data)
    without_checksums(copy)
    with pytest.warns(WithoutChecksums, match="made by an older version, so damage to its manifest") as caught:
        LLM(copy, **SMALL)
    assert len(caught) == 1 and caught[0].filename == __file__


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


@pytest.mark.slow
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


LEGAL = "legal is a text, a list of token ids or a dict of prompt, prompt_token_ids, messages"
USER = {"role": "user", "content": "a"}
NO_PROMPTS = [
    (None, f"prompt 0: found None, {LEGAL}"),
    (5, f"prompt 0: found 5, {LEGAL}"),
    (b"ab", f"prompt 0: found b'ab', {LEGAL}"),
    (["a", None], f"prompt 1: found None, {LEGAL}"),
    (["a", float("nan")], f"prompt 1: found nan, {LEGAL}"),
    (np.array([5.0, np.nan]), "prompt 0: found .*5.0.?, legal is a text"),
    (["a", b"b"], "prompt 1: found b'b', legal"),
    ([{"prompt": "a"}, {"prompt": b"b"}], "prompt 1: prompt: found bytes, legal is a string"),
    (["a", {"prompt": float("nan")}], "prompt 1: prompt: found a number, legal is a string"),
    (["a", {"prompt": None}], "prompt 1: found no prompt; legal is exactly one of"),
    (["a", {5: "b"}], "prompt 1: unknown field 5; legal: id"),
    (["a", {"prompt": "a", "id": 5.0}], "prompt 1: id: found a number, legal is a string or a whole number"),
    (["a", {"prompt": "a", "id": "\ud800"}], r"prompt 1: id: half of a surrogate pair, '\\ud800', stands alone"),
    (["a", {"prompt": "a", "max_new_tokens": "5"}], "prompt 1: max_new_tokens: '5' is not legal"),
    (["a", "caf\udce9"], r"prompt 1: prompt: half of a surrogate pair, '\\udce9' \(byte 0xe9, not UTF-8\), stands"),
    ([[5], [5, "6"]], "prompt 1: prompt_token_ids: found '6' in the list, legal are whole numbers"),
    ([[5], [5, None]], "prompt 1: prompt_token_ids: found None in the list"),
    ([[5], [5, 6.0]], "prompt 1: prompt_token_ids: found 6.0 in the list"),
    ([[5], [5, [6]]], r"prompt 1: prompt_token_ids: found \[6\] in the list"),
    ([True, False], "prompt 0: prompt_token_ids: found True in the list"),
    ([[5], np.array([True])], "prompt 1: prompt_token_ids: found .*True.* in the list"),
    ([[5], {"prompt_token_ids": "56"}], "prompt 1: prompt_token_ids: found a string, legal is a list of whole numbers"),
    ([[5], {"prompt_token_ids": 5}], "prompt 1: prompt_token_ids: found a number, legal is a list"),
    ([[5], {"prompt_token_ids": {5: 6}}], "prompt 1: prompt_token_ids: found an object, legal is a list"),
    ([[5], {"messages": "hi"}], "prompt 1: messages: found a string, legal is a list of messages"),
    ([[5], {"messages": [{"role": "user", "content": "\ud800"}]}], "prompt 1: messages: half of a surrogate pair"),
    ([[5], []], "prompt 1: the prompt is empty"),
]  # fmt: skip


@pytest.mark.parametrize(("prompts", "message"), NO_PROMPTS, ids=[str(each) for each in range(len(NO_PROMPTS))])
def test_what_is_no_prompt_is_refused_and_leaves_nothing(llm, prompts, message):
    for call in (llm.generate, lambda prompts: list(llm.stream(prompts)), llm.score):
        with pytest.raises(ValueError, match=message):
            call(prompts)
    assert not llm.engine.has_unfinished()


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("x", "prompt 0: messages: found a string, legal is a list of messages"),
        (None, "prompt 0: found no prompt"),
        (5, "prompt 0: messages: found a number"),
        ([], r"prompt 0: messages: \[\] is not legal; legal: a list of at least one message"),
        ({"role": "user"}, "prompt 0: messages: found an object"),
        (["x"], "prompt 0: messages: found a string"),
        ([5], "prompt 0: messages: found a number"),
        ([USER, 5], r"prompt 0: messages\[1\]: 5 is not legal; legal: an object with role and content"),
        ([[USER], "x"], "prompt 1: messages: found a string"),
        ([{"role": "user", "content": b"a"}], r"prompt 0: messages\[0\].content: b'a' is not legal; legal: a string"),
        ([{"role": "user", "content": "\ud800"}], "prompt 0: messages: half of a surrogate pair"),
    ],
)
def test_what_is_no_conversation_is_refused(llm, messages, message, monkeypatch):
    monkeypatch.setattr(llm.engine.tokenizer, "chat_template", "{{ messages[0].content }}")
    with pytest.raises(ValueError, match=message):
        llm.chat(messages)
    assert not llm.engine.has_unfinished()


@pytest.mark.parametrize("params", [5, "x", SamplingParams, [5], ["x"], float("nan")])
def test_what_is_no_parameters_is_refused(llm, params):
    with pytest.raises(ValueError, match=r"prompt 0: params: found .*; legal: SamplingParams or a dict of its fields"):
        llm.generate("a", params)
    assert not llm.engine.has_unfinished()


def test_prompts_however_they_are_held(llm):
    short = {"max_new_tokens": 2, "ignore_eos": True}
    [expected] = llm.generate([[5, 6, 7]], short)
    ids = np.array([5, 6, 7], np.int32)
    for prompts in (ids, [ids], ids[None], (5, 6, 7), [tuple(ids)], {"prompt_token_ids": ids}, iter([[5, 6, 7]])):
        [found] = llm.generate(prompts, short)
        assert found == replace(expected, samples=found.samples) and found.token_ids == expected.token_ids
        assert {type(each) for each in found.prompt_token_ids} == {int}
    a, b = llm.generate(np.array(["Once", "The"]), [short, None])
    assert [len(a.token_ids), len(b.token_ids)] == [2, 64] and a.prompt_token_ids == llm.generate("Once")[
        0
    ].prompt_token_ids


@pytest.mark.slow
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
    # a text of exactly max_context tokens needs no room for another
    ids = [5 + place % 90 for place in range(256)]
    full, shorter = llm.score([ids, ids[:255]])
    assert full.logprobs[:255] == pytest.approx([None, *shorter.logprobs[1:]], abs=1e-4) and full.logprobs[255] < 0
    with pytest.raises(ValueError, match=r"prompt 1: the prompt has 257 tokens; legal: up to 256 \(max_context\)"):
        llm.score([[5], [*ids, 5]])
    [empty] = llm.generate([ids], {"max_new_tokens": 0, "logprobs": 1})
    assert (empty.text, empty.token_ids, empty.limit, empty.samples[0].logprobs) == ("", [], "max_new_tokens", [])
    [capped] = llm.generate([ids[:250]], {"max_new_tokens": 7, "ignore_eos": True})
    assert (len(capped.token_ids), capped.finish_reason, capped.limit) == (6, "length", "context")


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
