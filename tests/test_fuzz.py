"""Files with random damage, from fixed seeds: each is read as it was or refused in the project's own words, in little
memory. `mutations.py` has the kinds."""

import json
import random
import re

import numpy as np
import pytest
import torch

import mutations
from convert.hashing import sha256
from convert.safetensors_reader import open_safetensors
from convert.source import read_json
from convert.tensor import DTYPES, ConvertError, blocks
from convert.torch_reader import open_torch
from converting import header_entry, write_safetensors
from jaxinfer.engine.params import SamplingParams
from jaxinfer.inputs import InputError, InputRecord, read_file
from jaxinfer.models.config import ConfigError
from jaxinfer.models.families import from_hf, leaves
from test_model_config import SMALL

INNARDS = re.compile(r"codec|object (is|at|has)|NoneType|argument|unpack|\b_(Storage|Tensor)|[a-z](Error|Exception)\b")
# how many of each kind
FEW, MANY = 300, pytest.param(20_000, marks=pytest.mark.long)


def _read(tensors):
    return {
        name: np.concatenate([block for _, block in blocks(tensor)]) if tensor.size else np.empty(0)
        for name, tensor in tensors.items()
        if tensor.dtype in DTYPES and tensor.shape
    }


@pytest.fixture(scope="module")
def bin_file(tmp_path_factory):
    """A .bin with what such files have: shared storage, a transposed matrix, a parameter, metadata."""
    path, base = tmp_path_factory.mktemp("bin") / "x.bin", torch.arange(60, dtype=torch.float32)
    module = torch.nn.Linear(3, 5, dtype=torch.bfloat16)
    state = module.state_dict() | {"t": torch.randn(5, 7).T, "m": base[10:34].view(4, 6), "c": base.view(6, 10)[:, 2:5]}
    torch.save(module.state_dict().__class__(state | {"p": torch.nn.Parameter(torch.randn(2, 3))}), path)
    return path


def _torch_kinds(draw, data):
    def pickled(change):
        return mutations.rezipped(data, lambda name, old: change(draw, old) if name.endswith("data.pkl") else old)

    return {
        "bytes": lambda: mutations.bytes_of(draw, data),
        "truncated": lambda: mutations.truncated(draw, data),
        "directory": lambda: mutations.directory_of(draw, data),
        "pickle": lambda: pickled(mutations.pickle_of),
        "pickle's bytes": lambda: pickled(mutations.bytes_of),
    }


@pytest.mark.parametrize("count", [FEW, MANY])
@pytest.mark.parametrize("kind", ["bytes", "truncated", "directory", "pickle", "pickle's bytes"])
def test_a_bin_is_read_as_it_was_or_refused(bin_file, tmp_path, kind, count, little_memory):
    path, right = tmp_path / "x.bin", _read(open_torch(bin_file))
    mutate, whole, held = _torch_kinds(random.Random(kind), bin_file.read_bytes())[kind], 0, "pickle" not in kind
    for number in range(count):
        path.write_bytes(mutate())
        try:
            sha256(path)
            found = _read(open_torch(path))
        except ConvertError as error:
            assert str(path) in str(error) and not INNARDS.search(str(error)), number
        except Exception as error:
            pytest.fail(f"{kind}, {number}: {error!r}")
        else:
            whole += 1
            if held:  # a pickle with a right checksum may say something else
                assert found.keys() == right.keys(), number
                assert all(np.array_equal(found[name], right[name], equal_nan=True) for name in right), number
    assert whole < count


@pytest.mark.parametrize("count", [FEW, MANY])
def test_a_safetensors_file_is_read_or_refused(tmp_path, count, little_memory):
    path = tmp_path / "x.safetensors"
    header = {
        "a": header_entry(0, 24, [2, 3]),
        "b": header_entry(24, 34, [5], "BF16"),
        "__metadata__": {"format": "pt"},
    }
    header |= {"c": header_entry(34, 34, [0, 4]), "d": header_entry(34, 38, [], "F32")}
    write_safetensors(path, header, bytes(range(38)))
    whole, raw, draw = path.read_bytes(), json.dumps(header).encode(), random.Random(0)
    for number in range(count):
        kind = number % 3
        if kind == 0:
            path.write_bytes(mutations.bytes_of(draw, whole[:-38]) + whole[-38:])
        elif kind == 1:
            path.write_bytes(mutations.truncated(draw, whole))
        else:
            write_safetensors(path, mutations.json_of(draw, raw), bytes(range(38)))
        try:
            _read(open_safetensors(path))
        except ConvertError as error:
            assert str(path) in str(error)
        except Exception as error:
            pytest.fail(f"{number}: {error!r}: {path.read_bytes()!r}")


@pytest.mark.parametrize("count", [20, pytest.param(2_000, marks=pytest.mark.long)])
@pytest.mark.parametrize("case", SMALL)
def test_a_config_is_read_or_refused(tmp_path, case, count, little_memory):
    path, raw, draw = tmp_path / "config.json", json.dumps(SMALL[case]).encode(), random.Random(case)
    for number in range(count):
        path.write_bytes(mutations.bytes_of(draw, raw) if number % 4 == 0 else mutations.json_of(draw, raw))
        try:
            config = from_hf(read_json(path))
            json.dumps(config.to_json())
            leaves(config)
        except (ConvertError, ConfigError):
            pass
        except Exception as error:
            pytest.fail(f"{number}: {error!r}: {path.read_bytes()!r}")


PROMPTS = (
    {"id": "a", "prompt": "text \u00e9", "temperature": 0.5, "top_k": 3, "stop": ["x"], "logit_bias": {"5": 1.0}},
    {"id": 7, "prompt_token_ids": [1, 2, 3], "n": 2, "seed": 1, "stop_token_ids": [4], "ignore_eos": True},
    {"messages": [{"role": "user", "content": "hi"}], "max_new_tokens": 9, "min_new_tokens": 1, "logprobs": 2},
)


@pytest.mark.parametrize("count", [FEW, MANY])
def test_a_line_of_prompts_is_a_request_or_an_error(tmp_path, count, little_memory):
    path, draw = tmp_path / "in.jsonl", random.Random(0)
    for number in range(count):
        line = json.dumps(PROMPTS[number % 3], ensure_ascii=number % 2 == 0).encode()
        path.write_bytes(mutations.bytes_of(draw, line) if number % 4 == 0 else mutations.json_of(draw, line))
        try:
            for record in read_file(str(path), SamplingParams()):
                assert isinstance(record, InputRecord | InputError)
                json.dumps(record.params.to_dict() if isinstance(record, InputRecord) else record.to_json()).encode()
        except Exception as error:
            pytest.fail(f"{number}: {error!r}: {path.read_bytes()!r}")
