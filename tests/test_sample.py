"""When a sample ends, and what of its last tokens is text: tokens as the engine hands them in, without a model."""

from types import SimpleNamespace

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from jaxinfer.engine.params import SamplingParams
from jaxinfer.engine.request import Request
from jaxinfer.engine.sample import Sample

A, B, C, END, TURN = range(5)


@pytest.fixture(scope="module")
def tokenizer():
    backend = Tokenizer(models.BPE({"a": A, "b": B, "c": C}, []))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    backend.add_special_tokens(["<end>", "<turn>"])
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def begin(tokenizer, **params):
    params = SamplingParams(**params)
    sequence = SimpleNamespace(index=0, params=params)
    return Sample(Request("x", [A], params), sequence, tokenizer, (END,), "float32", "context", 0.0)


def add(tokenizer, tokens, chunk=2, **params):
    """The output of these tokens, in pieces."""
    sample = begin(tokenizer, **params)
    pieces = [tokens[start : start + chunk] for start in range(0, len(tokens), chunk)] or [[]]
    outputs = (sample.add(piece, None, "decode", 1.0).output for piece in pieces)
    return next(output for output in outputs if output is not None)


@pytest.mark.parametrize("chunk", [1, 2, 3, 6])
@pytest.mark.parametrize(
    ("stop", "text", "count"),
    [
        ("<turn>", "ab", 3),
        ("b<turn>", "a", 3),
        ("<turn>c", "ab", 4),
        ("c<end>", "ab", 5),  # the model's end token completes it
        ("<end>", "abc", 5),
        ("cb", "abc", 5),  # nothing is after the end token
    ],
)
def test_stop_strings_with_special_tokens(tokenizer, stop, text, count, chunk):
    output = add(tokenizer, [A, B, TURN, C, END, B], chunk, stop=stop)
    assert (output.text, output.completion_tokens, output.finish_reason) == (text, count, "stop")
    assert output.token_ids == [A, B, TURN, C, END][:count]


def test_the_end_token_may_be_one_of_many(tokenizer):
    tokens = [A, END, B, END, TURN, C]
    assert add(tokenizer, tokens, stop="<end><turn>", ignore_eos=True).token_ids == tokens[:5]
    output = add(tokenizer, tokens, min_new_tokens=3, stop="b<end>")
    assert (output.text, output.token_ids) == ("a", tokens[:4])


@pytest.mark.parametrize(
    ("tokens", "stop", "expected"),
    [
        ([A, B], "x", ("ab", "length", "context")),
        ([A, B], "b", ("a", "stop", None)),
        ([A, END], "x", ("a", "stop", None)),
        ([], "x", ("", "length", "context")),
    ],
)
def test_a_length_says_of_which_limit(tokenizer, tokens, stop, expected):
    output = add(tokenizer, tokens, stop=stop, max_new_tokens=len(tokens))
    assert (output.text, output.finish_reason, output.limit) == expected
    assert begin(tokenizer).aborted(1.0).output.limit is None


def test_a_stop_token_that_is_text_is_no_part_of_the_text(tokenizer):
    output = add(tokenizer, [A, B, C], stop_token_ids=[B], stop="ab")
    assert (output.text, output.token_ids, output.finish_reason) == ("a", [A, B], "stop")
