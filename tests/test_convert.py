"""The converter: every tensor arrives where it belongs, what is damaged is refused by name, a killed run goes on."""

import fcntl
import hashlib
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import xxhash
from safetensors.torch import load_file, save_file

from convert.__main__ import main
from convert.families import targets
from convert.plan import make_plan
from convert.run import convert
from convert.safetensors_reader import open_safetensors
from convert.source import open_source
from convert.tensor import ConvertError, blocks
from convert.torch_reader import open_torch
from hf_models import make_hf_folder
from jaxinfer.checkpoint.files import CheckpointError
from jaxinfer.checkpoint.manifest import read_manifest
from jaxinfer.checkpoint.reader import Reader
from jaxinfer.models.config import ConfigError, ModelConfig
from jaxinfer.models.families import from_hf

ROOT = Path(__file__).parent.parent
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
DOWN = "model.layers.0.mlp.down_proj.weight"


def read_all(checkpoint):
    reader = Reader(checkpoint)
    return {
        name: reader.read(name, (slice(None),) * len(each["shape"])) for name, each in reader.manifest.leaves.items()
    }


def as_torch(array):
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def expected_leaves(model):
    """From the torch modules themselves, by what each one computes, not by a table of names."""
    config, heads = model.config, model.config.num_attention_heads
    kv_heads = config.num_key_value_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    table = {"embed": model.get_input_embeddings().weight, "norm": model.model.norm.weight}
    if not config.tie_word_embeddings:
        table["head"] = model.lm_head.weight
    for index, layer in enumerate(model.model.layers):
        attention, mlp = layer.self_attn, layer.mlp
        each = {"input_norm": layer.input_layernorm.weight, "post_norm": layer.post_attention_layernorm.weight}
        for name, module, count in (
            ("q", attention.q_proj, heads),
            ("k", attention.k_proj, kv_heads),
            ("v", attention.v_proj, kv_heads),
        ):
            each[name] = module.weight.view(count, head_dim, config.hidden_size)
            if module.bias is not None:
                each[f"{name}_bias"] = module.bias.view(count, head_dim)
        each["o"] = attention.o_proj.weight.view(config.hidden_size, heads, head_dim)
        if attention.o_proj.bias is not None:
            each["o_bias"] = attention.o_proj.bias
        for name, module in (("gate", mlp.gate_proj), ("up", mlp.up_proj), ("down", mlp.down_proj)):
            each[name] = module.weight
            if module.bias is not None:
                each[f"{name}_bias"] = module.bias
        table |= {f"layers.{index}.{name}": tensor for name, tensor in each.items()}
    return {name: tensor.detach() for name, tensor in table.items()}


def assert_leaves(checkpoint, model, dtype):
    found, expected = read_all(checkpoint), expected_leaves(model)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype.name == dtype
        assert torch.equal(as_torch(found[name]), tensor.to(getattr(torch, dtype))), name


def state_of(folder):
    return load_file(folder / "model.safetensors")


def rewrite(folder, state):
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "model.safetensors")


def to_bin(folder, state):
    (folder / "model.safetensors").unlink(missing_ok=True)
    torch.save(state, folder / "pytorch_model.bin")


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture
def tiny(tmp_path):
    make_hf_folder(tmp_path / "hf", num_hidden_layers=1)
    return tmp_path / "hf"


def refused(folder, tmp_path, message, **settings):
    with pytest.raises((ConvertError, ConfigError), match=message) as error:
        convert(folder, tmp_path / "refused", quiet=True, **settings)
    assert not (tmp_path / "refused" / "manifest.json").exists()
    return str(error.value)


@pytest.mark.parametrize(
    ("family", "source", "target", "shape"),
    [
        ("llama", "float32", "float32", {}),
        ("llama", "float32", "bfloat16", {"attention_bias": True, "mlp_bias": True}),
        ("llama", "float32", "float16", {"head_dim": 12, "num_key_value_heads": 1}),
        ("llama", "bfloat16", "float32", {"vocab_size": 101, "intermediate_size": 45}),
        ("mistral", "bfloat16", "bfloat16", {"num_key_value_heads": 4, "sliding_window": 8}),
        ("qwen2", "float16", "bfloat16", {"tie_word_embeddings": True}),
        ("qwen2", "float32", "float32", {"num_attention_heads": 3, "num_key_value_heads": 3, "hidden_size": 36}),
    ],
)
@pytest.mark.parametrize("form", ["safetensors", "shards", "bin", "bin shards"])
def test_every_tensor_arrives(tmp_path, family, source, target, shape, form):
    size = 12_000 if "shards" in form else "5GB"
    kind = "bin" if "bin" in form else "safetensors"
    model = make_hf_folder(tmp_path / "hf", family, source, max_shard_size=size, format=kind, **shape)
    files = [path.name for path in (tmp_path / "hf").glob(f"*.{kind}")]
    assert (len(files) > 1) == ("shards" in form)
    manifest, written = convert(tmp_path / "hf", tmp_path / "ckpt", target, verify=True, quiet=True)
    assert written
    assert_leaves(tmp_path / "ckpt", model, target)
    assert manifest.parameters == sum(tensor.numel() for tensor in model.parameters())
    assert manifest.dtype == target


def test_manifest_says_what_the_checkpoint_is_and_came_from(tmp_path):
    model = make_hf_folder(tmp_path / "hf", "qwen2", "bfloat16", max_shard_size=12_000)
    hf, ckpt = tmp_path / "hf", tmp_path / "ckpt"
    (hf / "tokenizer.json").write_text('{"a": 1}')
    (hf / "tokenizer_config.json").write_text("{}")
    (hf / "chat_template.jinja").write_text("{{ messages }}")
    (hf / "readme.md").write_text("not a tokenizer file")
    edit_json(hf / "generation_config.json", eos_token_id=[7, 8])
    returned, _ = convert(hf, ckpt, quiet=True)
    manifest = read_manifest(ckpt)
    assert manifest == returned
    assert sorted(path.name for path in ckpt.iterdir()) == ["manifest.json", "params", "tokenizer"]
    assert manifest.dtype == "bfloat16"
    config = ModelConfig.from_json(manifest.model)
    assert (config.architecture, config.num_layers, config.eos_token_ids) == ("Qwen2ForCausalLM", 2, (7, 8))
    weights = [path.name for path in hf.glob("*.safetensors")]
    notes = ["config.json", "generation_config.json", "model.safetensors.index.json"]
    assert len(weights) > 1 and sorted(manifest.sources) == sorted(weights + notes)
    for name, entry in manifest.sources.items():
        data = (hf / name).read_bytes()
        assert entry == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    copied = ["chat_template.jinja", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]
    assert manifest.tokenizer == copied
    assert sorted(path.name for path in (ckpt / "tokenizer").iterdir()) == copied
    assert all((ckpt / "tokenizer" / name).read_bytes() == (hf / name).read_bytes() for name in copied)
    on_disk = {str(path.relative_to(ckpt)) for path in ckpt.glob("params/*/*") if path.name != ".zarray"}
    assert on_disk == set(manifest.files)
    assert manifest.leaves["layers.0.q"] == {"shape": [4, 8, 32], "dtype": "bfloat16", "chunks": [1, 8, 32]}
    assert manifest.parameters == sum(tensor.numel() for tensor in model.parameters())


def test_orbax_restores_a_converted_model(tmp_path):
    ocp = pytest.importorskip("orbax.checkpoint")
    model = make_hf_folder(tmp_path / "hf", dtype="bfloat16", vocab_size=101)
    convert(tmp_path / "hf", tmp_path / "ckpt", quiet=True)
    with ocp.PyTreeCheckpointer() as checkpointer:
        restored = checkpointer.restore(tmp_path / "ckpt" / "params")
    expected = expected_leaves(model)
    assert restored.keys() == expected.keys()
    assert all(torch.equal(as_torch(np.asarray(restored[name])), each) for name, each in expected.items())


def test_buffers_of_older_files_are_skipped_and_do_not_count_for_the_dtype(tiny, tmp_path):
    state = {name: tensor.half() for name, tensor in state_of(tiny).items()}
    state |= {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4), "model.rotary_emb.inv_freq": torch.ones(4)}
    to_bin(tiny, state)
    assert convert(tiny, tmp_path / "ckpt", quiet=True)[0].dtype == "float16"


def test_tied_model_may_repeat_its_embedding_as_head_but_not_hold_another(tmp_path):
    model = make_hf_folder(tmp_path / "hf", num_hidden_layers=1, tie_word_embeddings=True)
    state = state_of(tmp_path / "hf")
    assert HEAD not in state
    rewrite(tmp_path / "hf", state | {HEAD: state[EMBED].clone()})
    convert(tmp_path / "hf", tmp_path / "ckpt", quiet=True)
    assert_leaves(tmp_path / "ckpt", model, "float32")
    other = state[EMBED].clone()
    other[-1, -1] += 1
    rewrite(tmp_path / "hf", state | {HEAD: other})
    refused(tmp_path / "hf", tmp_path, "tie_word_embeddings is true .* lm_head.weight differs")


def test_numbers_beyond_float16_are_refused_by_tensor(tiny, tmp_path):
    state = state_of(tiny)
    state[DOWN][3, 5] = -70000.0
    rewrite(tiny, state)
    assert "70000" in refused(tiny, tmp_path, f"tensor {DOWN} does not fit float16: 1 numbers", dtype="float16")
    state[DOWN][3, 5] = float("inf")  # what the source itself holds is carried over
    rewrite(tiny, state)
    convert(tiny, tmp_path / "ckpt", "float16", quiet=True)
    assert np.isinf(read_all(tmp_path / "ckpt")["layers.0.down"]).sum() == 1


def test_source_of_two_dtypes_needs_the_flag(tiny, tmp_path):
    state = state_of(tiny)
    state[EMBED] = state[EMBED].bfloat16()
    rewrite(tiny, state)
    refused(tiny, tmp_path, "BF16 and F32: choose with --dtype")
    assert convert(tiny, tmp_path / "ckpt", "bfloat16", verify=True, quiet=True)[1]
    rewrite(tiny, {name: tensor.double() for name, tensor in state.items()})
    refused(tiny, tmp_path, "F64: choose with --dtype")
    assert convert(tiny, tmp_path / "wide", "float32", verify=True, quiet=True)[1]


def test_tensors_that_do_not_fit_the_config_are_all_listed(tiny, tmp_path):
    state = state_of(tiny)
    del state[DOWN], state["model.norm.weight"]
    state["model.layers.7.extra.weight"] = torch.ones(2)
    state[HEAD] = torch.ones(95, 32)
    state["model.layers.0.mlp.up_proj.weight"] = torch.ones(48, 32, dtype=torch.int8)
    rewrite(tiny, state)
    message = refused(tiny, tmp_path, "5 tensors do not fit")
    for line in (
        f"{DOWN}: missing",
        "model.norm.weight: missing",
        "model.layers.7.extra.weight: in model.safetensors, but LlamaForCausalLM has no such tensor",
        f"{HEAD}: in model.safetensors, found shape [95, 32], expected [96, 32]",
        "model.layers.0.mlp.up_proj.weight: in model.safetensors, dtype I8",
    ):
        assert line in message


def test_folders_that_are_no_model_are_refused(tiny, tmp_path):
    config = json.loads((tiny / "config.json").read_text())
    refused(tmp_path / "none", tmp_path, "none: no such folder")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", tmp_path, "empty: .* no config.json")
    (tmp_path / "empty" / "config.json").write_text(json.dumps(config))
    (tmp_path / "empty" / "consolidated.00.pth").write_text("")
    refused(tmp_path / "empty", tmp_path, "no weights: neither model.safetensors.*; found consolidated.00.pth")
    (tiny / "config.json").write_text("{")
    refused(tiny, tmp_path, "config.json: damaged, not JSON")
    (tiny / "config.json").write_text(json.dumps(config | {"hidden_act": "what"}))
    refused(tiny, tmp_path, "config.json: hidden_act: 'what'")
    (tiny / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    refused(tiny, tmp_path, "quantization_config: 'gptq'")
    (tiny / "config.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 7\n")
    refused(tiny, tmp_path, "config.json: a git-lfs pointer")


def test_broken_shards_are_refused(tmp_path):
    hf = tmp_path / "hf"
    make_hf_folder(hf, max_shard_size=30_000)
    index = hf / "model.safetensors.index.json"
    mapping = json.loads(index.read_text())["weight_map"]
    first, second = sorted(set(mapping.values()))[:2]
    name = next(name for name, file in mapping.items() if file == first)
    edit_json(index, weight_map=mapping | {name: second})
    refused(hf, tmp_path, f"{name} should be in {second}, but it is in {first}")
    edit_json(index, weight_map=mapping | {"model.new.weight": second})
    refused(hf, tmp_path, f"model.new.weight should be in {second}, but it is in no shard")
    edit_json(index, weight_map=mapping | {name: "../other.safetensors"})
    refused(hf, tmp_path, "'../other.safetensors' is not the name of a .safetensors file in this folder")
    edit_json(index, weight_map=["a"])
    refused(hf, tmp_path, "weight_map must map")
    edit_json(index, weight_map=mapping)
    whole = load_file(hf / second)
    save_file(whole | {name: torch.ones(2)}, hf / second)
    refused(hf, tmp_path, f"found in two shards: {name} \\(in {first} and {second}\\)")
    save_file(whole, hf / second)
    (hf / first).unlink()
    refused(hf, tmp_path, f"shards missing from the folder: {first}")


def _safetensors(path, header, data=b"", length=None):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(raw) if length is None else length).to_bytes(8, "little") + raw + data)


def _entry(begin, end, shape, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


TWICE = b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, "a": {"dtype": "F32", "shape": [1]}}'


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        ({"a": _entry(0, 8, [2]), "b": _entry(4, 12, [2])}, 12, "tensor b .* overlaps tensor a"),
        ({"a": _entry(0, 8, [2]), "b": _entry(12, 20, [2])}, 20, "tensor b .* leaves a gap after tensor a"),
        ({"a": _entry(4, 8, [1])}, 8, "tensor a .* leaves a gap after the header"),
        ({"a": _entry(0, 8, [2])}, 7, "truncated: .* tensor a ends at byte"),
        ({"a": _entry(0, 8, [2]), "b": _entry(8, 1 << 60, [1 << 58])}, 8, "truncated: .* tensor b|tensor b has"),
        ({"a": _entry(0, 8, [3])}, 8, r"tensor a has 8 bytes, F32 \[3\] needs 12"),
        ({"a": _entry(0, 8, [2])}, 9, "1 bytes follow tensor a"),
        ({"a": _entry(8, 0, [2])}, 8, "tensor a has -8 bytes"),
        ({"a": _entry(0, 4, [-1, -1])}, 4, "header is damaged: .*whole numbers"),
        ({"a": _entry(0, 2, [4], "F4")}, 2, "tensor a has the unknown dtype 'F4'"),
        ({"a": {"dtype": "F32", "shape": [1]}}, 4, "header is damaged: KeyError"),
        ({"a": 3}, 4, "header is damaged"),
        ([1, 2], 4, "header is damaged"),
        (b"{", 0, "header is damaged"),
        (TWICE, 8, "listed twice in the header: a"),
    ],
)
def test_damaged_safetensors_are_refused_with_file_and_tensor(tmp_path, header, data, message):
    path = tmp_path / "model-00001-of-00002.safetensors"
    _safetensors(path, header, bytes(data))
    with pytest.raises(ConvertError, match=message) as error:
        open_safetensors(path)
    assert str(path) in str(error.value)


def test_files_that_are_no_safetensors_are_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 123\n")
    with pytest.raises(ConvertError, match=r"model.safetensors: a git-lfs pointer.*git lfs pull"):
        open_safetensors(path)
    for data, message in ((b"abc", "truncated: 3 bytes"), (b"\xff" * 64, "not a safetensors file")):
        path.write_bytes(data)
        with pytest.raises(ConvertError, match=message):
            open_safetensors(path)
    _safetensors(path, b"{}", length=1000)
    with pytest.raises(ConvertError, match="truncated: 10 bytes, its header alone needs 1008"):
        open_safetensors(path)


def test_truncated_source_leaves_no_complete_folder(tiny, tmp_path):
    path = tiny / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    refused(tiny, tmp_path, "model.safetensors: truncated: .* tensor")


def read_tensor(tensor):
    return np.concatenate([block for _, block in blocks(tensor)])


def test_bin_tensors_of_any_stride_and_shared_storage(tmp_path):
    base = torch.arange(60, dtype=torch.float32)
    state = {
        "transposed": torch.randn(5, 7).T,
        "middle": base[10:34].view(4, 6),
        "columns": base.view(6, 10)[:, 2:5],
        "spread": torch.ones(1, 3).expand(4, 3),
        "vector": base[3:50:4],
        "parameter": torch.nn.Parameter(torch.randn(2, 3)),
        "half": torch.randn(3, 3).half(),
        "bfloat": torch.randn(3, 3).bfloat16(),
    }
    torch.save(state, tmp_path / "x.bin")
    found = open_torch(tmp_path / "x.bin")
    assert found.keys() == state.keys()
    for name, tensor in state.items():
        assert torch.equal(as_torch(read_tensor(found[name]).copy()), tensor.detach()), name


def test_bin_with_transposed_weights_converts(tiny, tmp_path):
    state = state_of(tiny)
    to_bin(tiny, {name: tensor.T.contiguous().T if tensor.ndim == 2 else tensor for name, tensor in state.items()})
    convert(tiny, tmp_path / "ckpt", verify=True, quiet=True)
    assert np.array_equal(read_all(tmp_path / "ckpt")["layers.0.down"], state[DOWN].numpy())


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("where", ["value", "key", "attribute"])
def test_code_in_a_pickle_is_refused_by_name_and_does_not_run(tiny, tmp_path, where):
    trap = tmp_path / "ran"
    state = dict(state_of(tiny))
    if where == "value":
        state["extra"] = Evil(trap)
    elif where == "key":
        state[Evil(trap)] = torch.ones(1)
    else:
        from collections import OrderedDict

        state = OrderedDict(state)
        state._metadata = Evil(trap)
    to_bin(tiny, state)
    refused(tiny, tmp_path, "pytorch_model.bin: .*it names posix.mkdir.*refused, not run")
    assert not trap.exists()
    torch.load(tiny / "pytorch_model.bin", weights_only=False)
    assert trap.exists()  # the trap was live


@pytest.mark.parametrize("value", [print, torch.nn.Linear(2, 2), torch.float32, {"nested": torch.ones(1)}, 3])
def test_a_pickle_of_anything_but_tensors_is_refused(tmp_path, value):
    torch.save({"weight": value}, tmp_path / "x.bin")
    with pytest.raises(ConvertError, match=r"it names |not a plain state dict"):
        open_torch(tmp_path / "x.bin")


def test_other_bin_files_are_refused(tmp_path):
    path = tmp_path / "pytorch_model.bin"

    def refused_as(message):
        with pytest.raises(ConvertError, match=message) as error:
            open_torch(path)
        assert str(path) in str(error.value)

    torch.save({"a": torch.ones(3)}, path, _use_new_zipfile_serialization=False)
    refused_as(r"PyTorch before 1.6 .*torch.save\(torch.load")
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 123\n")
    refused_as("git-lfs pointer")
    path.write_bytes(b"<html>404</html>")
    refused_as("not a PyTorch file: it starts with b'<htm'")
    torch.save(torch.ones(3), path)
    refused_as("not a state dict")
    torch.save({"a": torch.ones(3000)}, path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1000])
    refused_as("truncated or damaged zip")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme", "x")
    refused_as("not a torch.save file: 0 entries")


def _edited_zip(path, change, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path) as archive:
        entries = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in change(entries).items():
            archive.writestr(name, data)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda e: {n: d[:-4] if n.endswith("data/0") else d for n, d in e.items()},
            "tensor a: .* 44 bytes.*expected 48",
        ),
        (lambda e: {n: d for n, d in e.items() if not n.endswith("data/0")}, "tensor a: its storage 0 is not in"),
        (lambda e: e | {next(n for n in e if n.endswith("byteorder")): b"big"}, "big-endian"),
        (lambda e: {n: b"\x80\x02]." if n.endswith("data.pkl") else d for n, d in e.items()}, "holds list"),
        (lambda e: {n: d[:-9] if n.endswith("data.pkl") else d for n, d in e.items()}, "pickle cannot be read"),
    ],
)
def test_damaged_bin_is_refused(tmp_path, change, message):
    torch.save({"a": torch.ones(3, 4)}, tmp_path / "x.bin")
    _edited_zip(tmp_path / "x.bin", change)
    with pytest.raises(ConvertError, match=message):
        open_torch(tmp_path / "x.bin")


def test_compressed_bin_is_refused(tmp_path):
    torch.save({"a": torch.ones(3, 400)}, tmp_path / "x.bin")
    _edited_zip(tmp_path / "x.bin", lambda entries: entries, zipfile.ZIP_DEFLATED)
    with pytest.raises(ConvertError, match=r"tensor a: .*stored without compression"):
        open_torch(tmp_path / "x.bin")


class _Forged:
    """Pickles as a tensor of 12 floats whose shape, strides and offset are as given."""

    def __init__(self, offset, shape, strides):
        self.arguments = offset, shape, strides

    def __reduce__(self):
        return torch._utils._rebuild_tensor_v2, (_Storage(), *self.arguments, False, {})


class _Storage:
    pass


class _Pickler(pickle.Pickler):
    def persistent_id(self, value):
        return ("storage", torch.FloatStorage, "0", "cpu", 12) if isinstance(value, _Storage) else None


@pytest.mark.parametrize(
    ("forged", "message"),
    [
        (_Forged(1, (3, 4), (4, 1)), "reaches element 12 of a storage of 12"),
        (_Forged(0, (3, 4), (1 << 40, 1)), "reaches element"),
        (_Forged(0, (3, 4), (1,)), "pickle cannot be read.*strides"),
        (_Forged(-1, (3, 4), (4, 1)), "pickle cannot be read.*offset -1"),
        (_Forged(0, "ab", (4, 1)), "pickle cannot be read"),
    ],
)
def test_forged_bin_tensors_cannot_reach_beyond_their_storage(tmp_path, forged, message):
    path = tmp_path / "x.bin"
    torch.save({"a": torch.ones(3, 4)}, path)
    with open(tmp_path / "forged", "wb") as file:
        _Pickler(file, 2).dump({"a": forged})
    data = (tmp_path / "forged").read_bytes()
    _edited_zip(path, lambda entries: {n: data if n.endswith("data.pkl") else d for n, d in entries.items()})
    with pytest.raises(ConvertError, match=message):
        open_torch(path)


def command(source, output, *more):
    return [sys.executable, "-m", "convert", "--source", str(source), "--output", str(output), *more]


def journal_leaves(ckpt):
    journal = ckpt / "convert.journal.jsonl"
    return journal.read_bytes().count(b'{"leaf"') if journal.exists() else 0


def kill_after(source, ckpt, leaves):
    """Starts a conversion and kills it, as a lost node would, once some leaves are journaled."""
    process = subprocess.Popen(command(source, ckpt), cwd=ROOT, stderr=subprocess.DEVNULL)
    while process.poll() is None and journal_leaves(ckpt) < leaves:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it ended before it was killed"


def inodes(ckpt):
    return {str(path.relative_to(ckpt)): path.stat().st_ino for path in ckpt.glob("params/*/*")}


def same_checkpoint(one, other):
    names = [sorted(str(path.relative_to(folder)) for path in folder.rglob("*")) for folder in (one, other)]
    assert names[0] == names[1]
    for name in names[0]:
        if (one / name).is_file():
            assert (one / name).read_bytes() == (other / name).read_bytes(), name


def test_killed_again_and_again_it_finishes_as_if_undisturbed(tmp_path):
    hf, ckpt = tmp_path / "hf", tmp_path / "ckpt"
    make_hf_folder(hf, num_hidden_layers=12, max_shard_size=60_000)
    (hf / "tokenizer.json").write_text("{}")
    convert(hf, tmp_path / "undisturbed", quiet=True)
    kept = {}
    for leaves in (1, 30, 60):
        kill_after(hf, ckpt, leaves)
        with pytest.raises(CheckpointError, match="incomplete checkpoint"):
            Reader(ckpt)
        assert journal_leaves(ckpt) >= leaves
        now = inodes(ckpt)
        assert all(now.get(name) == inode for name, inode in kept.items())  # what was done was not done again
        lines = (ckpt / "convert.journal.jsonl").read_text().splitlines()
        done = [name for line in lines if '{"leaf"' in line for name in next(iter(json.loads(line)["leaf"].values()))]
        kept = {name: now[name] for name in done}
    _, written = convert(hf, ckpt, verify=True, quiet=True)
    assert written
    now = inodes(ckpt)
    assert all(now[name] == inode for name, inode in kept.items())
    same_checkpoint(ckpt, tmp_path / "undisturbed")


def test_after_a_crash_what_is_damaged_is_written_again(tmp_path):
    hf, ckpt = tmp_path / "hf", tmp_path / "ckpt"
    make_hf_folder(hf, num_hidden_layers=6)
    convert(hf, tmp_path / "undisturbed", quiet=True)
    kill_after(hf, ckpt, 20)
    journal = ckpt / "convert.journal.jsonl"
    leaves = [next(iter(json.loads(line)["leaf"])) for line in journal.read_text().splitlines() if '{"leaf"' in line]
    with open(journal, "ab") as file:
        file.write(b'{"leaf": {"layers.0.q": {"params/lay')  # torn
    flipped, missing, short = (next((ckpt / "params" / leaf).glob("[0-9]*")) for leaf in leaves[:3])
    flipped.write_bytes(bytes([flipped.read_bytes()[0] ^ 1]) + flipped.read_bytes()[1:])
    missing.unlink()
    os.truncate(short, 3)
    (ckpt / "params" / "norm.partial").mkdir(exist_ok=True)
    kill_after(hf, ckpt, 40)  # once more, so that what followed the torn line is read again
    convert(hf, ckpt, quiet=True)
    shutil.rmtree(ckpt / "params" / "norm.partial", ignore_errors=True)
    same_checkpoint(ckpt, tmp_path / "undisturbed")


@pytest.fixture
def unfinished(tmp_path):
    """A folder of several shards and its conversion to float16, which stops at the last tensor: it does not fit."""
    hf, ckpt = tmp_path / "hf", tmp_path / "ckpt"
    make_hf_folder(hf, max_shard_size=30_000)
    tensor = make_plan(open_source(hf))[-1][0]
    state = load_file(tensor.path)
    state[tensor.name] += 1e6
    save_file(state, tensor.path)
    with pytest.raises(ConvertError, match=f"tensor {tensor.name} does not fit float16"):
        convert(hf, ckpt, "float16", quiet=True)
    assert journal_leaves(ckpt) == 20
    return hf, ckpt, tensor


def test_unfinished_folder_does_not_go_on_with_another_dtype_or_config(unfinished):
    hf, ckpt, _ = unfinished
    before = inodes(ckpt)
    with pytest.raises(
        ConvertError, match=r"unfinished conversion with other settings .dtype was 'float16', now 'bfloa"
    ):
        convert(hf, ckpt, "bfloat16", quiet=True)
    edit_json(hf / "config.json", rms_norm_eps=0.5)
    with pytest.raises(ConvertError, match=r"unfinished conversion with other settings .model was"):
        convert(hf, ckpt, "float16", quiet=True)
    assert inodes(ckpt) == before and not (ckpt / "manifest.json").exists()


def test_unfinished_folder_does_not_go_on_with_another_source(unfinished):
    hf, ckpt, tensor = unfinished
    first = sorted(hf.glob("*.safetensors"))[0]
    whole = first.read_bytes()
    first.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ConvertError, match=f"an earlier run converted from another {first.name}"):
        convert(hf, ckpt, "float16", quiet=True)
    first.write_bytes(whole)
    with pytest.raises(ConvertError, match=f"tensor {tensor.name} does not fit"):
        convert(hf, ckpt, "float16", quiet=True)
    assert not (ckpt / "manifest.json").exists()


def test_complete_folder_is_left_alone_and_belongs_to_its_source(tiny, tmp_path):
    ckpt = tmp_path / "ckpt"
    convert(tiny, ckpt, quiet=True)
    before = {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in ckpt.rglob("*")}
    manifest, written = convert(tiny, ckpt, verify=True, quiet=True)
    assert not written and manifest == read_manifest(ckpt)
    with pytest.raises(ConvertError, match="its dtype is float32, asked for bfloat16; choose another --output"):
        convert(tiny, ckpt, "bfloat16", quiet=True)
    state = state_of(tiny)
    state[DOWN][0, 0] += 1
    rewrite(tiny, state)
    with pytest.raises(ConvertError, match=r"it was made from another model\.safetensors"):
        convert(tiny, ckpt, quiet=True)
    edit_json(tiny / "config.json", rms_norm_eps=0.5)
    with pytest.raises(ConvertError, match="its model config is another"):
        convert(tiny, ckpt, quiet=True)
    assert before == {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in ckpt.rglob("*")}


def test_verify_finds_a_tensor_that_differs_and_a_file_that_is_damaged(tiny, tmp_path):
    ckpt = tmp_path / "ckpt"
    convert(tiny, ckpt, quiet=True)
    chunk = ckpt / "params" / "layers.0.down" / "0.1"
    changed = bytearray(chunk.read_bytes())
    changed[0] ^= 1
    chunk.write_bytes(changed)
    with pytest.raises(CheckpointError, match=r"layers.0.down/0.1: its bytes changed"):
        convert(tiny, ckpt, verify=True, quiet=True)
    manifest = json.loads((ckpt / "manifest.json").read_text())
    manifest["files"]["params/layers.0.down/0.1"]["xxh3_128"] = xxhash.xxh3_128_hexdigest(bytes(changed))
    (ckpt / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ConvertError, match=f"1 tensors differ from the source: {DOWN} .layers.0.down."):
        convert(tiny, ckpt, verify=True, quiet=True)


def test_folder_of_something_else_is_not_written_to(tiny, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("x")
    with pytest.raises(ConvertError, match="not empty, and no conversion"):
        convert(tiny, other, quiet=True)
    with pytest.raises(ConvertError, match="is not a folder"):
        convert(tiny, other / "thesis.tex", quiet=True)
    assert [path.name for path in other.iterdir()] == ["thesis.tex"]


def test_two_conversions_do_not_write_the_same_folder(tiny, tmp_path):
    ckpt = tmp_path / "ckpt"
    ckpt.mkdir()
    handle = os.open(ckpt, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    with pytest.raises(ConvertError, match="another conversion is writing here"):
        convert(tiny, ckpt, quiet=True)
    os.close(handle)
    assert convert(tiny, ckpt, quiet=True)[1]


def test_full_disk_is_seen_before_the_start(tmp_path):
    # a vocabulary of a trillion bytes in a sparse file: nothing of it is read before the space is checked
    make_hf_folder(tmp_path / "hf", num_hidden_layers=1, tie_word_embeddings=True, dtype="bfloat16")
    hf, path = tmp_path / "hf", tmp_path / "hf" / "model.safetensors"
    rows = max(10**12, 2 * shutil.disk_usage(tmp_path).free) // 64
    state = {name: tensor for name, tensor in state_of(hf).items() if name != EMBED}
    header, end, data = {}, 0, b""
    for name, tensor in state.items():
        header[name] = _entry(end, end + tensor.nbytes, list(tensor.shape), "BF16")
        data, end = data + tensor.view(torch.int16).numpy().tobytes(), end + tensor.nbytes
    header[EMBED] = _entry(end, end + rows * 64, [rows, 32], "BF16")
    _safetensors(path, header, data)
    try:
        os.truncate(path, path.stat().st_size + rows * 64)
    except OSError as error:
        pytest.skip(f"the file system holds no sparse file of this size: {error}")
    edit_json(hf / "config.json", vocab_size=rows)
    refused(hf, tmp_path, r"refused: needs [\d.]+ GB more, the disk has [\d.]+ GB free")


def test_command_line(tiny, tmp_path, capfd):
    ckpt = tmp_path / "ckpt"
    assert main(["--source", str(tiny), "--output", str(ckpt), "--dtype", "bfloat16", "--verify"]) == 0
    out, err = capfd.readouterr()
    assert "verified against the source" in out and "in bfloat16, without a tokenizer" in out
    assert "hash and convert" in err and "B/s" in err
    assert main(["--source", str(tiny), "--output", str(ckpt), "--dtype", "bfloat16"]) == 0
    assert "already converted" in capfd.readouterr().out
    assert main(["--source", str(tmp_path / "none"), "--output", str(ckpt)]) == 1
    assert capfd.readouterr().err == f"convert: {tmp_path}/none: no such folder\n"
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "--source open_llama_3b_v2 --output" in capfd.readouterr().out


def test_interrupt_says_how_to_go_on(tmp_path):
    hf, ckpt = tmp_path / "hf", tmp_path / "ckpt"
    make_hf_folder(hf, num_hidden_layers=10)
    process = subprocess.Popen(command(hf, ckpt), cwd=ROOT, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and journal_leaves(ckpt) < 3:
        time.sleep(0.001)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate()
    assert process.returncode == 130 and "run the same command again to finish" in err
    assert convert(hf, ckpt, verify=True, quiet=True)[1]


def test_converter_does_not_load_an_accelerator_library(tiny, tmp_path):
    code = (
        f"import sys; from convert.__main__ import main; main({command(tiny, tmp_path / 'ckpt')[3:]!r});"
        "assert not {'jax', 'torch', 'tensorstore', 'transformers'} & sys.modules.keys(), 'loaded'"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    assert (tmp_path / "ckpt" / "manifest.json").exists()


CHILD = """
import re, sys
from convert.__main__ import main
code = main(sys.argv[1:])
# not getrusage: that counts what the test's own process held when it started this one
status = open("/proc/self/status").read()
print("peak", int(re.search(r"VmHWM:\\s+(\\d+) kB", status)[1]) * 1024)
sys.exit(code)
"""


@pytest.mark.slow
def test_four_gigabytes_convert_in_a_little_memory(tmp_path):
    """Peak resident memory stays under three times the largest tensor plus 500 MB, also where the dtype widens."""
    hf, ckpt = tmp_path / "hf", tmp_path / "ckpt"
    sizes = {"vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 29}
    largest, total = _synthetic(hf, sizes, shards=4)
    assert total > 4e9
    try:
        done = subprocess.run(
            [sys.executable, "-c", CHILD, *command(hf, ckpt, "--dtype", "float32", "--verify")[3:]],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        peak = int(done.stdout.split("peak ")[1])
        print(
            done.stdout, f"largest tensor {largest / 1e6:.0f} MB, model {total / 1e9:.2f} GB, peak {peak / 1e6:.0f} MB"
        )
        assert peak < 3 * largest + 500e6
    finally:
        shutil.rmtree(hf, ignore_errors=True)
        shutil.rmtree(ckpt, ignore_errors=True)


def _synthetic(folder, sizes, shards):
    """A bfloat16 LLaMA of mostly zeros (holes in sparse files) with noise at the start of every tensor."""
    folder.mkdir()
    hf = {"architectures": ["LlamaForCausalLM"], "num_attention_heads": 16, "max_position_embeddings": 2048}
    (folder / "config.json").write_text(json.dumps(hf | {"rms_norm_eps": 1e-6} | sizes))
    table = [
        (name, each[0].source_shape) for name, each in targets(from_hf(hf | {"rms_norm_eps": 1e-6} | sizes)).items()
    ]
    rng, mapping, largest, total = np.random.default_rng(0), {}, 0, 0
    for shard in range(shards):
        file, header, end = f"model-{shard}.safetensors", {}, 0
        for name, shape in table[shard::shards]:
            size = 2 * int(np.prod(shape))
            header[name] = _entry(end, end + size, list(shape), "BF16")
            mapping[name], end, largest = file, end + size, max(largest, size)
        raw = json.dumps(header).encode()
        with open(folder / file, "wb") as out:
            out.write(len(raw).to_bytes(8, "little") + raw)
            out.truncate(8 + len(raw) + end)
            for entry in header.values():
                begin, stop = entry["data_offsets"]
                out.seek(8 + len(raw) + begin)
                noise = rng.standard_normal(min(1 << 16, (stop - begin) // 2)).astype(np.float32)
                out.write((noise.view(np.uint32) >> 16).astype(np.uint16).tobytes())
        total += end
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": mapping}))
    return largest, total
