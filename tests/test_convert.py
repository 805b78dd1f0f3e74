"""Whole conversions: every tensor arrives where it belongs, and what does not fit is refused."""

import hashlib
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from convert.__main__ import main
from convert.families import targets
from convert.run import convert
from converting import (
    DOWN,
    EMBED,
    HEAD,
    ROOT,
    as_torch,
    command,
    edit_json,
    header_entry,
    read_all,
    refused,
    rewrite,
    state_of,
    to_bin,
)
from hf_models import make_hf_folder
from jaxinfer.checkpoint.files import describe
from jaxinfer.checkpoint.manifest import read_manifest
from jaxinfer.models.config import ModelConfig
from jaxinfer.models.families import from_hf


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
    on_disk = {str(path.relative_to(ckpt)): path.read_bytes() for path in ckpt.rglob("*") if path.is_file()}
    assert manifest.files == {name: describe(data) for name, data in on_disk.items() if name != "manifest.json"}
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
    (tiny / "config.json").write_text(json.dumps(config | {"hidden_act": "x"}), "utf-8-sig")  # read, mark and all
    refused(tiny, tmp_path, "config.json: hidden_act: 'x'")
    (tiny / "config.json").write_text("{")
    refused(tiny, tmp_path, "config.json: damaged, not JSON")
    (tiny / "config.json").write_text(json.dumps(config | {"hidden_act": "what"}))
    refused(tiny, tmp_path, "config.json: hidden_act: 'what'")
    (tiny / "config.json").write_text(json.dumps(config | {"model_type": "mistral"}))
    refused(tiny, tmp_path, "config.json: model_type: 'mistral' is not that of architectures 'LlamaForCausalLM'")
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


def test_choices_for_the_tokenizer_are_said(tiny, tmp_path, capfd):
    model = {"type": "WordLevel", "vocab": {"<s>": 0, "a": 1}, "unk_token": "<s>"}
    vocabulary = {"version": "1.0", "added_tokens": [], "model": model}
    (tiny / "tokenizer.json").write_text(json.dumps(vocabulary))
    config = {"tokenizer_class": "LlamaTokenizerFast", "bos_token": "<s>", "add_bos_token": True}
    (tiny / "tokenizer_config.json").write_text(json.dumps(config))
    arguments = ["--source", str(tiny), "--output", str(tmp_path / "ckpt")]
    assert main(arguments) == 0
    said = (
        "convert: note: tokenizer_config.json has add_bos_token true, tokenizer.json does not put <s> before a prompt"
    )
    assert said in capfd.readouterr().err
    (tiny / "tokenizer.json").write_text("{")
    shutil.rmtree(tmp_path / "ckpt")
    assert main(arguments) == 0  # the weights are as good without
    said = f"convert: note: {tiny}: the tokenizer cannot be used: tokenizer.json: damaged, not JSON: "
    assert said in capfd.readouterr().err


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


@pytest.mark.long
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
            header[name] = header_entry(end, end + size, list(shape), "BF16")
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
