"""JSON that is made to take memory or time, or to end in a traceback: refused wherever a user's JSON is read."""

import json

import pytest

from convert.__main__ import main, printable
from convert.safetensors_reader import open_safetensors
from convert.source import open_source
from convert.tensor import ConvertError
from converting import edit_json, header_entry, rewrite, state_of, write_safetensors
from jaxinfer.engine.params import SamplingParams
from jaxinfer.inputs import read_file
from jaxinfer.models.config import ConfigError
from jaxinfer.models.families import from_hf
from jaxinfer.outputs import OutputError, find_finished
from jaxinfer.plan.source import read_source
from jaxinfer.plot import PlotError, read_run
from jaxinfer.tokenizer import load_tokenizer
from slurm.shards import ShardError, merge
from test_model_config import BASE, SMALL

DEEP = "[" * 100_000 + "]" * 100_000


def x_of(value):
    return '{"x": ' + value + "}"


# 65 deep is what the parser itself would take
TEXTS = {
    x_of(DEEP): "nested too deeply",
    x_of(DEEP[100_000 - 65 : 100_000 + 65]): "nested too deeply, legal is 64 deep",
    x_of('{"a":' * 100_000 + "1" + "}" * 100_000): "nested too deeply",
    x_of("1" + "0" * 5000): "a number of more than 4300 digits",
    '{"x": "\udcff"}': r"not UTF-8: byte 0xff at byte 8",
    "[]": "found list, legal is an object",
    "": "not JSON: Expecting value",
}


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "model.safetensors.index.json"])
@pytest.mark.parametrize("text", TEXTS, ids=TEXTS.values())
def test_every_file_of_a_folder_is_parsed_within_bounds(tmp_path, name, text, little_memory):
    (tmp_path / "config.json").write_text(json.dumps(BASE))
    (tmp_path / name).write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ConvertError, match=f"{name}: .*{TEXTS[text]}") as error:
        open_source(tmp_path)
    assert len(str(error.value)) < 300


def test_a_file_of_gigabytes_is_not_read(tmp_path, little_memory):
    with open(tmp_path / "config.json", "wb") as file:
        file.truncate(4 << 30)
    with pytest.raises(ConvertError, match=r"config.json: longer than 32 MiB"):
        open_source(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(BASE))
    write_safetensors(tmp_path / "model.safetensors", {"a": header_entry(0, 4, [1])}, bytes(4))
    with open(tmp_path / "tokenizer.json", "wb") as file:
        file.truncate(4 << 30)
    with pytest.raises(ConvertError, match=r"tokenizer.json: longer than 256 MiB"):
        open_source(tmp_path)
    with open(tmp_path / "model.safetensors", "wb") as file:
        file.write((1 << 31).to_bytes(8, "little"))
        file.truncate(4 << 30)
    with pytest.raises(ConvertError, match=r"model.safetensors: .*header of 2147483648 bytes"):
        open_safetensors(tmp_path / "model.safetensors")


HUGE = (10**9, 2**31, 10**400, 10**4000)


@pytest.mark.parametrize("case", SMALL)
def test_no_number_of_a_config_is_too_large_to_be_refused(case, little_memory):
    """Layers are what memory is taken for before a tensor is looked at."""
    hf = SMALL[case]
    layers = "n_layer" if "n_layer" in hf else "num_hidden_layers"
    for value in (1001, *HUGE):
        with pytest.raises(ConfigError, match=f"{layers}: expected a (whole )?number up to 1"):
            from_hf(hf | {layers: value})
    changes = [({name: value}, name) for name in hf for value in HUGE[1:]]
    for outer in ("rope_scaling", "rope_parameters"):
        changes += [({outer: hf[outer] | {name: value}}, name) for name in hf.get(outer, {}) for value in HUGE[1:]]
    for change, name in changes:
        try:
            json.dumps(from_hf(hf | change).to_json())
        except ConfigError as error:
            assert name in str(error)
        else:
            assert type(next(iter(change.values()))) is not int or 2**31 in change.values(), change
    with pytest.raises(ConfigError, match="eos_token_id: expected a token's number"):
        from_hf(hf, {"eos_token_id": [2, 2**31]})


def test_a_context_stretched_beyond_counting_is_refused():
    for kind in ("linear", "dynamic", "yarn"):
        with pytest.raises(ConfigError, match=f"{kind} rope's factor: 1e.308 times 64 positions is above"):
            from_hf(BASE | {"rope_scaling": {"rope_type": kind, "factor": 1e308}})


BOMBS = {
    "a name many times": (b'{"a":0,' + b'"b":0,' * 300_000 + b'"c":0}', "listed twice in the header: b"),
    "nested": (b'{"a":' + DEEP.encode() + b"}", "nested too deeply"),
    "a million dimensions": (
        json.dumps({"a": header_entry(0, 4, [9] * 1_000_000)}).encode(),
        "header is damaged: tensor a needs a dtype",
    ),
    "numbers of thousands of digits": (
        b'{"a":{"dtype":"F32","shape":[' + b",".join([b"9" * 4000] * 500) + b'],"data_offsets":[0,4]}}',
        "header is damaged: tensor a needs a dtype",
    ),
    "true for 1": (b'{"a":{"dtype":"F32","shape":[true],"data_offsets":[0,4]}}', "header is damaged: tensor a needs"),
    "no text for a dtype": (b'{"a":{"dtype":["F32"],"shape":[1],"data_offsets":[0,4]}}', "unknown dtype"),
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_headers_that_take_time(tmp_path, bomb, little_memory):
    header, message = BOMBS[bomb]
    write_safetensors(tmp_path / "x.safetensors", header, bytes(4))
    with pytest.raises(ConvertError, match=message) as error:
        open_safetensors(tmp_path / "x.safetensors")
    assert len(str(error.value)) < 300


def test_lines_of_prompts(tmp_path):
    lines = DEEP, x_of(DEEP[99_900:100_100]), x_of("1" + "0" * 5000), '{"prompt": "a", "n": 1' + "0" * 400 + "}"
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    found = [each.message for each in read_file(str(tmp_path / "in.jsonl"), SamplingParams())]
    deep = "bad JSON: nested too deeply, legal is 64 deep"
    assert found[:3] == [deep, deep, "bad JSON: a number of more than 4300 digits"]
    assert found[3].endswith("legal: an integer from 1 to 4096")


LINES = (DEEP, "[" * 60, "[]", "3", '{"id": [1], "index": 0}', '{"id": {}, "index": 0}', '{"id": "a", "index": [0]}')


@pytest.mark.parametrize(
    "line", [*LINES, '{"id": "a", "ttft_s": 1' + "0" * 400 + ', "latency_s": 1, "completion_tokens": 1}']
)
def test_lines_of_results_that_no_run_wrote(tmp_path, line):
    path = tmp_path / "out.jsonl"
    path.write_text(f"{line}\n{line}\n")
    with pytest.raises(OutputError, match=r"out.jsonl, line 1: not a result"):
        find_finished(path, lambda name: 1)
    with pytest.raises(PlotError, match=r"out.jsonl, line 1: not a result"):
        read_run(path, "out")
    if line in LINES:
        with pytest.raises(ShardError, match=r"out.jsonl, line 1: not a result"):
            merge(tmp_path / "in.jsonl", [path], tmp_path / "merged.jsonl")


@pytest.mark.parametrize("model", ["tokenizer.json", "tokenizer.model", "spiece.model"])
def test_a_tokenizer_whose_json_is_nested_is_refused(tmp_path, model, little_memory):
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    (folder / model).write_text(x_of(DEEP))
    (folder / "tokenizer_config.json").write_text(x_of(DEEP))
    with pytest.raises(ValueError, match=f"{folder}: the tokenizer cannot be loaded"):
        load_tokenizer(tmp_path)


def test_names_and_lists_of_a_file_do_not_flood_or_drive_the_terminal(tiny, tmp_path, capfd):
    state = state_of(tiny)
    odd = next(iter(state.values()))[:1].clone()
    rewrite(tiny, {"model.\x1b[2J\u202e": odd} | {f"model.extra.{number}": odd.clone() for number in range(100)})
    assert main(["--source", str(tiny), "--output", str(tmp_path / "ckpt")]) == 1
    error = capfd.readouterr().err
    assert error.count("\n") == 42 and error.endswith("more\n") and "\x1b" not in error and "\u202e" not in error
    assert printable("a" * 30_000).endswith("a... and 10000 characters more")
    edit_json(tiny / "config.json", hidden_act="x" * 1_000_000)
    assert main(["--source", str(tiny), "--output", str(tmp_path / "ckpt")]) == 1
    assert len(capfd.readouterr().err) < 21_000


def test_the_plan_reads_config_json_within_the_same_bounds(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(x_of(DEEP))
    with pytest.raises(ValueError, match=r"config.json: damaged, not JSON: nested too deeply"):
        read_source(None, None, path)
