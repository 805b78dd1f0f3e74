"""Files of prompts: every line becomes a request or an error that says what is wrong with it."""

import io
import json
import sys
from argparse import ArgumentTypeError

import numpy as np
import pytest

from jaxinfer.engine.params import SamplingParams
from jaxinfer.inputs import InputError, InputRecord, parse_record, read_file, token_ids
from jaxinfer.options import unicode
from slurm.shards import split

DEFAULTS = SamplingParams(temperature=0.5, max_new_tokens=9)


def read(tmp_path, *lines, name="in.jsonl"):
    data = [
        line if isinstance(line, bytes) else (line if isinstance(line, str) else json.dumps(line)).encode()
        for line in lines
    ]
    path = tmp_path / name
    path.write_bytes(b"\n".join(data))
    return read_file(str(path), DEFAULTS)


def test_each_kind_of_prompt_and_its_overrides(tmp_path):
    messages = [{"role": "user", "content": "hi"}]
    records = read(
        tmp_path,
        {"prompt": "a"},
        {"id": "x", "prompt_token_ids": [1, 2], "temperature": 0, "n": 3, "stop": "end"},
        {"id": 7, "messages": messages, "logit_bias": {"5": 1}},
        {"prompt": "a", "meta": {"variant": [1, None]}},
        {"prompt": "a", "meta": None},
        b'{"prompt": "a", "meta": ["\\ud800"]}',
    )
    assert records == [
        InputRecord(1, "1", "prompt", "a", DEFAULTS),
        InputRecord(2, "x", "prompt_token_ids", [1, 2], DEFAULTS.merge({"temperature": 0, "n": 3, "stop": "end"})),
        InputRecord(3, "7", "messages", messages, DEFAULTS.merge({"logit_bias": {5: 1}})),
        InputRecord(4, "4", "prompt", "a", DEFAULTS, {"variant": [1, None]}),
        InputRecord(5, "5", "prompt", "a", DEFAULTS),
        InputError(6, "6", records[-1].message),
    ]
    assert records[-1].message.startswith("meta: half of a surrogate pair")


def test_lines_are_counted_as_an_editor_does(tmp_path):
    records = read(tmp_path, '\ufeff{"prompt": "a"}\r', "", "  ", '{"prompt": "b"}', "")
    assert [(record.line, record.id, record.value) for record in records] == [(1, "1", "a"), (4, "4", "b")]


def test_text_files_have_a_prompt_per_line(tmp_path):
    records = read(tmp_path, " two words \r", "", '{"not": json}', b"caf\xc3\xa9", name="in.txt")
    assert [(record.id, record.value) for record in records] == [
        ("1", " two words "),
        ("3", '{"not": json}'),
        ("4", "café"),
    ]


@pytest.mark.parametrize("name", ["in.jsonl", "in.txt"])
def test_byte_order_marks_are_no_text(tmp_path, name):
    one, two = ('{"prompt": "a"}', '{"prompt": "b"}') if name == "in.jsonl" else ("a", "b")
    for newline in ("\n", "\r\n"):
        whole = f"\ufeff{one}{newline}\ufeff{two}{newline}\ufeff{newline}"  # as cat makes it of three files
        records = read(tmp_path, whole, name=name)
        assert [(record.line, record.value) for record in records] == [(1, "a"), (2, "b")]


def test_shards_are_read_as_the_whole_is(tmp_path):
    path, part = tmp_path / "in.txt", tmp_path / "part.txt"
    path.write_bytes("\ufeffa\r\nb\r\n\ufeffc".encode())
    whole = read_file(str(path), DEFAULTS)
    for shard in range(2):
        split(path, shard, 2, part)
        assert read_file(str(part), DEFAULTS) == whole[shard::2]
    path.write_text("a", "utf-16")
    with pytest.raises(ValueError, match=r"in\.txt: found UTF-16"):
        split(path, 0, 2, part)


@pytest.mark.parametrize("name", ["in.jsonl", "in.txt", "-"])
def test_other_encodings_are_refused(tmp_path, monkeypatch, name):
    path = name if name == "-" else str(tmp_path / name)
    for codec, found in (("utf-16", "UTF-16"), ("utf-16-be", "UTF-16"), ("utf-32", "UTF-32"), ("utf-32-be", "UTF-32")):
        text = "{}" if codec in ("utf-16", "utf-32") else "\ufeff{}"
        data = text.encode(codec)
        if name == "-":
            monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
        else:
            (tmp_path / name).write_bytes(data)
        what = "standard input" if name == "-" else path
        with pytest.raises(ValueError, match=rf"^{what}: found {found} \(by its byte order mark\), legal is UTF-8$"):
            read_file(path, DEFAULTS)


@pytest.mark.parametrize("name", ["in.jsonl", "in.txt"])
def test_a_nul_byte_is_named(tmp_path, name):
    line = '{"prompt": "a"}' if name == "in.jsonl" else "a"
    (tmp_path / name).write_bytes(f"{line}\n".encode() + line.encode("utf-16-le"))
    good, bad = read_file(str(tmp_path / name), DEFAULTS)
    assert good.value == "a" and bad.line == 2 and bad.message.startswith("found a NUL byte, legal is UTF-8 text")


@pytest.mark.parametrize(
    ("text", "values"),
    [
        (b'\n{"prompt": "a"}\n', ["a"]),
        (b"a\n{b\n", ["a", "{b"]),
        (b'\xef\xbb\xbf{"prompt": "a"}\r\n', ["a"]),
        (b'\xef\xbb\xbf\r\n \n\xef\xbb\xbf {"prompt": "a"}', ["a"]),
        (b"\xef\xbb\xbfa\r\n{b", ["a", "{b"]),
    ],
)
def test_standard_input(monkeypatch, text, values):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text)))
    assert [record.value for record in read_file("-", DEFAULTS)] == values


BAD = [
    ("{", "bad JSON: Expecting property name enclosed in double quotes at column 2"),
    ("[1]", "found a list, legal is a JSON object"),
    ("[" * 100_000, "bad JSON: nested too deeply"),
    (b'{"prompt": "\xff"}', "not UTF-8: byte 0xff at byte 13 of the line"),
    ('{"prompt": "caf\\ud800"}', "prompt: half of a surrogate pair, '\\ud800', stands alone at character 4 of 'caf"),
    (
        '{"messages": [{"role": "user", "content": "\\udce9"}]}',
        "messages: half of a surrogate pair, '\\udce9' (byte 0xe9",
    ),
    ('{"prompt": "a", "stop": "\\udfff"}', "stop: half of a surrogate pair, '\\udfff', stands alone at character 1"),
    ('{"prompt": "a", "seed": %s}' % ("9" * 5000), "bad JSON: a number of more than 4300 digits"),
    (
        {"prompt": "a", "max_new_token": 5},
        "unknown field 'max_new_token'; did you mean 'max_new_tokens'? legal: id, prompt,",
    ),
    (
        {"prompt": "a", "variant": "2k"},
        "unknown field 'variant'; legal: id, prompt, prompt_token_ids, messages, meta, temp",
    ),
    ({"id": "x"}, "found no prompt; legal is exactly one of prompt, prompt_token_ids, messages"),
    ({"prompt": "a", "prompt_token_ids": [1]}, "found prompt and prompt_token_ids; legal is exactly one"),
    ({"prompt": 5}, "prompt: found a number, legal is a string"),
    ({"prompt_token_ids": "1 2"}, "prompt_token_ids: found a string, legal is a list of whole numbers"),
    ({"prompt_token_ids": [1, True]}, "prompt_token_ids: found True in the list"),
    ({"prompt_token_ids": [1, 2.0]}, "prompt_token_ids: found 2.0 in the list"),
    ({"messages": {"role": "user"}}, "messages: found an object, legal is a list of messages"),
    ({"id": ["a"], "prompt": "a"}, "id: found a list, legal is a string or a whole number"),
    ({"id": True, "prompt": "a"}, "id: found true or false"),
    ({"prompt": "a", "temperature": "hot"}, "temperature: 'hot' is not legal"),
    ({"prompt": "a", "top_p": None}, "top_p: None is not legal"),
    ({"prompt": "a", "min_new_tokens": 10}, "min_new_tokens: 10 is not legal"),
]


@pytest.mark.parametrize(("line", "message"), BAD, ids=[message[:40] for _, message in BAD])
def test_a_bad_line_says_why_and_the_rest_is_read(tmp_path, line, message):
    before, error, after = read(tmp_path, {"prompt": "a"}, line, {"prompt": "b"})
    assert (before.value, after.value) == ("a", "b")
    assert isinstance(error, InputError)
    assert error.line == 2
    assert error.message.startswith(message)
    assert error.to_json() == {"id": error.id, "line": 2, "error": error.message}


@pytest.mark.parametrize("prompt", ["{}", '{"prompt": 5}', '{"prompt": "a"}'])
def test_an_id_that_is_no_text_is_not_written_to_the_output(tmp_path, prompt):
    fields = prompt.replace("{", '{"id": "\\ud800", ').replace(", }", "}")
    [error] = read(tmp_path, fields)
    assert error.id == "1" and error.message.startswith("id: half of a surrogate pair")


def test_numbers_of_numpy_become_pythons():
    record = parse_record({"prompt_token_ids": np.array([3, 4], np.int32), "n": np.int64(2)}, 1, "1", DEFAULTS)
    assert record.value == [3, 4] and {type(each) for each in record.value} == {int} and type(record.params.n) is int


def test_an_argument_is_utf8_or_an_error():
    """Whatever the locale: what Python could not decode by it is there in halves of surrogate pairs."""
    assert unicode("a\nb") == "a\nb" and unicode("caf\xe9") == "caf\xe9"
    assert unicode("caf\udcc3\udca9") == "café"
    with pytest.raises(ArgumentTypeError, match=r"not UTF-8: byte 0xe9 at byte 4 of 'caf\\udce9'"):
        unicode("caf\udce9")


def test_an_id_is_used_once(tmp_path):
    first, second, third = read(tmp_path, {"id": "2", "prompt": "a"}, {"prompt": "b"}, {"id": "c", "prompt": "c"})
    assert isinstance(first, InputRecord) and isinstance(third, InputRecord)
    assert second == InputError(2, "2", "id: '2' is used by line 1 already")


def test_an_error_keeps_the_id_of_its_line(tmp_path):
    [error] = read(tmp_path, {"id": "mine", "prompt": 3})
    assert error.id == "mine"


def test_file_names(tmp_path):
    with pytest.raises(ValueError, match=r"in\.csv: the name ends in '\.csv', legal is \.jsonl, \.txt or the name -"):
        read(tmp_path, "a", name="in.csv")
    with pytest.raises(FileNotFoundError):
        read_file(str(tmp_path / "absent.txt"), DEFAULTS)


def test_prompts_become_token_ids():
    assert token_ids(InputRecord(1, "1", "prompt_token_ids", [3, 4], DEFAULTS), None) == [3, 4]
    for kind, value in (("prompt", "a"), ("messages", [{"role": "user", "content": "a"}])):
        with pytest.raises(ValueError, match=f"{kind}: the checkpoint has no tokenizer; legal is prompt_token_ids"):
            token_ids(InputRecord(1, "1", kind, value, DEFAULTS), None)
