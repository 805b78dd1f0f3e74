"""OPT against transformers: logits of all its shapes, greedy tokens, both generations of names, the tokenizer."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from convert.run import convert
from convert.tensor import ConvertError
from engine_run import make_engine, run
from greedy_reference import equal_to_transformers
from hf_models import make_hf_folder
from jaxinfer.checkpoint.reader import Reader
from jaxinfer.engine.costs import count_parameters
from jaxinfer.engine.params import SamplingParams
from jaxinfer.models.config import ConfigError, ModelConfig
from jaxinfer.models.families import from_hf
from jaxinfer.presets import load_preset
from jaxinfer.tokenizer import encode, load_tokenizer
from model_logits import compare

SHARED = Path(__file__).parents[2] / "shared" / "data"
PUBLISHED, TOKENIZER = SHARED / "model_configs" / "opt-125m" / "config.json", SHARED / "tokenizers" / "gpt2"
POST_NORM = {"do_layer_norm_before": False, "word_embed_proj_dim": 20}  # 350M
WIDER = {"word_embed_proj_dim": 40, "tie_word_embeddings": False}
UNBIASED = {"enable_bias": False, "activation_function": "gelu"}  # Galactica
SIX = {"num_attention_heads": 6, "hidden_size": 36}
slow = pytest.mark.slow


@pytest.mark.parametrize(
    "case",
    [
        {},
        POST_NORM,
        UNBIASED | {"_remove_final_layer_norm": True},
        pytest.param({"do_layer_norm_before": False} | SIX | UNBIASED, marks=slow),
        pytest.param(WIDER, marks=slow),
    ],
    ids=str,
)
def test_variants(tmp_path, case):
    compare(tmp_path, family="opt", **case)


@pytest.mark.parametrize(
    ("mesh", "stage_layers", "case"),
    [
        ("stage=2,tensor=2", (1, 2), POST_NORM),
        pytest.param("tensor=4", None, WIDER, marks=slow),
        pytest.param("tensor=6", None, SIX | UNBIASED | {"ffn_dim": 30}, marks=slow),
        pytest.param("stage=3", None, POST_NORM | {"tie_word_embeddings": False}, marks=slow),
        pytest.param("stage=2,data=2,tensor=2", (2, 1), {}, marks=slow),
    ],
)
def test_meshes(tmp_path, mesh, stage_layers, case):
    compare(tmp_path, family="opt", mesh=mesh, stage_layers=stage_layers, chunks=[35, 35], **case)


@slow
@pytest.mark.parametrize(("mesh", "case"), [("", {}), ("stage=2,tensor=2", POST_NORM)])
def test_greedy_tokens_up_to_the_last_position(tmp_path, mesh, case):
    model = make_hf_folder(tmp_path / "hf", "opt", max_position_embeddings=40, **case)
    convert(tmp_path / "hf", tmp_path / "ckpt", quiet=True)
    rng = np.random.default_rng(2)
    prompts = {str(length): rng.integers(3, 96, length).tolist() for length in (1, 17, 23, 39)}
    engine = make_engine(tmp_path / "ckpt", mesh, max_context=1000)
    assert engine.max_context == 40  # of 42 rows
    found = run(engine, prompts, SamplingParams(max_new_tokens=100, ignore_eos=True))
    for name, prompt in prompts.items():
        assert len(prompt) + len(found[name, 0].token_ids) == 40
    equal_to_transformers(found, prompts, model)


def expected_leaves(model):
    decoder, config = model.model.decoder, model.config
    heads, width = config.num_attention_heads, config.hidden_size
    table = {"embed": decoder.embed_tokens.weight, "positions": decoder.embed_positions.weight}
    for name, module in (("project_in", decoder.project_in), ("project_out", decoder.project_out)):
        table |= {name: module.weight} if module is not None else {}
    if decoder.final_layer_norm is not None:
        table |= {"norm": decoder.final_layer_norm.weight, "norm_bias": decoder.final_layer_norm.bias}
    if not config.tie_word_embeddings:
        table["head"] = model.lm_head.weight
    for index, layer in enumerate(decoder.layers):
        attention, found = layer.self_attn, {}
        for name, module in (("q", attention.q_proj), ("k", attention.k_proj), ("v", attention.v_proj)):
            found[name] = module.weight.view(heads, -1, width)
            found[f"{name}_bias"] = None if module.bias is None else module.bias.view(heads, -1)
        found |= {"o": attention.out_proj.weight.view(width, heads, -1), "o_bias": attention.out_proj.bias}
        modules = {"input_norm": layer.self_attn_layer_norm, "post_norm": layer.final_layer_norm}
        for name, module in (modules | {"up": layer.fc1, "down": layer.fc2}).items():
            found |= {name: module.weight, f"{name}_bias": module.bias}
        table |= {f"layers.{index}.{name}": each for name, each in found.items() if each is not None}
    return {name: each.detach() for name, each in table.items()}


def assert_arrived(checkpoint, model):
    reader, expected = Reader(checkpoint), expected_leaves(model)
    assert reader.manifest.leaves.keys() == expected.keys()
    for name, tensor in expected.items():
        found = reader.read(name, (slice(None),) * tensor.ndim)
        assert torch.equal(torch.from_numpy(found.view(np.int16)).view(torch.float16), tensor), name


@pytest.mark.parametrize("case", [POST_NORM, UNBIASED, WIDER | SIX, {"_remove_final_layer_norm": True}], ids=str)
def test_every_tensor_arrives(tmp_path, case):
    model = make_hf_folder(tmp_path / "hf", "opt", "float16", **case)
    manifest, _ = convert(tmp_path / "hf", tmp_path / "ckpt", verify=True, quiet=True)
    assert manifest.parameters == sum(tensor.numel() for tensor in model.parameters())
    assert_arrived(tmp_path / "ckpt", model)


def test_older_names(tmp_path):
    model = make_hf_folder(tmp_path / "hf", "opt", "float16", **POST_NORM)
    file = tmp_path / "hf" / "model.safetensors"
    state = {name.removeprefix("model."): tensor for name, tensor in load_file(file).items()}
    embed = state["decoder.embed_tokens.weight"]
    save_file(state | {"lm_head.weight": embed.clone()}, file)
    convert(tmp_path / "hf", tmp_path / "ckpt", quiet=True)
    assert_arrived(tmp_path / "ckpt", model)
    save_file(state | {"lm_head.weight": -embed}, file)
    with pytest.raises(ConvertError, match=r"lm_head.weight differs from model.decoder.embed_tokens.weight"):
        convert(tmp_path / "hf", tmp_path / "other", quiet=True)


def test_a_table_of_positions_without_the_two_extra_rows_is_refused(tmp_path):
    make_hf_folder(tmp_path / "hf", "opt")
    path = tmp_path / "hf" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"max_position_embeddings": 130}))
    message = r"embed_positions.weight: .*found shape \[130, 32\], expected \[132, 32\]"
    with pytest.raises(ConvertError, match=message):
        convert(tmp_path / "hf", tmp_path / "ckpt", quiet=True)


BASE = {"architectures": ["OPTForCausalLM"], "model_type": "opt"}


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"hidden_size": 96, "num_attention_heads": 4, "num_hidden_layers": 3, "ffn_dim": 100, "head_dim": 7},
        {"word_embed_proj_dim": 512, "do_layer_norm_before": False, "_remove_final_layer_norm": False},
        {"word_embed_proj_dim": None, "max_position_embeddings": 99, "tie_word_embeddings": False},
        {"enable_bias": False, "_remove_final_layer_norm": True, "eos_token_id": [2, 3], "bos_token_id": None},
    ],
    ids=str,
)
def test_config_is_what_transformers_reads(tmp_path, change):
    (tmp_path / "config.json").write_text(json.dumps(BASE | change))
    theirs, ours = AutoConfig.from_pretrained(tmp_path), from_hf(BASE | change)
    assert (ours.hidden_size, ours.num_layers) == (theirs.hidden_size, theirs.num_hidden_layers)
    assert ours.num_kv_heads == ours.num_heads == theirs.num_attention_heads
    assert ours.head_dim == theirs.hidden_size // theirs.num_attention_heads
    assert (ours.mlp_width, ours.vocab_size) == (theirs.ffn_dim, theirs.vocab_size)
    assert ours.max_context == theirs.max_position_embeddings == ours.learned_positions - 2
    assert (ours.embed_width or ours.hidden_size) == theirs.word_embed_proj_dim
    assert ours.qkv_bias == ours.o_bias == ours.mlp_bias == theirs.enable_bias
    assert ours.final_norm == (theirs.do_layer_norm_before and not theirs._remove_final_layer_norm)
    ends = theirs.eos_token_id
    assert ours.eos_token_ids == (tuple(ends) if isinstance(ends, list) else (ends,))
    assert (ours.tied, ours.bos_token_id) == (theirs.tie_word_embeddings, theirs.bos_token_id)
    assert ModelConfig.from_json(json.loads(json.dumps(ours.to_json()))) == ours


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer_norm_elementwise_affine": False}, "layer_norm_elementwise_affine: False .* supported: True"),
        ({"activation_function": "mish"}, "activation_function: 'mish' is not supported; supported: silu, gelu"),
        ({"num_attention_heads": 7}, "hidden_size: 768 is not a multiple of num_attention_heads 7"),
        ({"word_embed_proj_dim": 0}, "word_embed_proj_dim: expected a number above 0, found 0"),
        ({"ffn_dim": "3072"}, "ffn_dim: expected a number above 0, found '3072'"),
    ],
)
def test_a_config_that_cannot_run_is_refused_by_field(change, message):
    with pytest.raises(ConfigError, match=message):
        from_hf(BASE | change)


def test_opt_125m():
    preset = load_preset("opt-125m")
    assert count_parameters(preset.model) == preset.parameters
    if not PUBLISHED.exists():
        pytest.skip("needs ../shared/data/model_configs/opt-125m, which does not ship")
    assert from_hf(json.loads(PUBLISHED.read_text())) == preset.model


@pytest.mark.skipif(not TOKENIZER.exists(), reason="needs ../shared/data/tokenizers/gpt2, which does not ship")
def test_opts_tokenizer_travels_with_the_checkpoint(tmp_path):
    """OPT's vocabulary is GPT-2's behind four special tokens; </s> begins each text and ends it."""
    make_hf_folder(tmp_path / "hf", "opt", vocab_size=50272)
    special = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3}
    words = json.loads((TOKENIZER / "vocab.json").read_text())
    vocabulary = special | {word: place + 4 for word, place in words.items() if word != "<|endoftext|>"}
    (tmp_path / "hf" / "vocab.json").write_text(json.dumps(vocabulary))
    shutil.copy(TOKENIZER / "merges.txt", tmp_path / "hf")
    end = {"content": "</s>", "lstrip": False, "normalized": True, "rstrip": False, "__type": "AddedToken"}
    config = {"tokenizer_class": "GPT2Tokenizer", "add_bos_token": True, "errors": "replace"}
    config |= {"bos_token": end, "eos_token": end, "unk_token": end, "pad_token": end | {"content": "<pad>"}}
    (tmp_path / "hf" / "tokenizer_config.json").write_text(json.dumps(config))
    convert(tmp_path / "hf", tmp_path / "ckpt", quiet=True)
    shutil.rmtree(tmp_path / "hf")
    tokenizer = load_tokenizer(tmp_path / "ckpt")
    for text, ids in (
        ("Hello world", [2, 15500, 999]),
        ("Hello world</s>", [2, 15500, 999, 2]),
        ("</s>", [2, 2]),
        ("", [2]),
    ):
        assert encode(tokenizer, text) == ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == text.removesuffix("</s>")
