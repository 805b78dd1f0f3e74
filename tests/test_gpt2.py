"""GPT-2 and GPT-SW3 against transformers: logits, greedy tokens, transposed and fused weights, the tokenizer."""

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, GPTSw3Tokenizer

from convert.run import convert
from convert.tensor import ConvertError
from engine_run import make_engine, run
from greedy_reference import equal_to_transformers
from hf_models import make_hf_folder
from jaxinfer.checkpoint.reader import Reader
from jaxinfer.engine.costs import count_parameters
from jaxinfer.engine.detokenize import TextStream
from jaxinfer.engine.params import SamplingParams
from jaxinfer.models.config import ConfigError, ModelConfig
from jaxinfer.models.families import from_hf
from jaxinfer.presets import load_preset
from jaxinfer.tokenizer import apply_chat, encode, load_tokenizer
from model_logits import compare

ROOT = Path(__file__).parents[1]
TOKENIZER = ROOT.parent / "shared" / "data" / "tokenizers" / "gpt2"
SIX = {"num_attention_heads": 6, "hidden_size": 36}
TWELVE = {"num_attention_heads": 12, "hidden_size": 48}


@pytest.mark.parametrize(
    "case",
    [
        {"intermediate_size": None, "reorder_and_upcast_attn": True},
        SIX | {"tie_word_embeddings": False, "activation_function": "gelu", "layer_norm_epsilon": 0.1},
    ],
    ids=str,
)
def test_variants(tmp_path, case):
    compare(tmp_path, family="gpt2", **case)


@pytest.mark.parametrize(
    ("mesh", "stage_layers", "case"),
    [
        ("stage=2,tensor=2", (1, 2), SIX | {"tie_word_embeddings": False}),
        pytest.param("tensor=4", None, {}, marks=pytest.mark.slow),
        pytest.param("tensor=6", None, SIX, marks=pytest.mark.slow),
        pytest.param("stage=3", None, {"num_attention_heads": 1, "hidden_size": 30}, marks=pytest.mark.slow),
        pytest.param("stage=2,data=2,tensor=2", (2, 1), TWELVE, marks=pytest.mark.slow),
    ],
)
def test_meshes(tmp_path, mesh, stage_layers, case):
    compare(tmp_path, family="gpt2", mesh=mesh, stage_layers=stage_layers, chunks=[35, 35], **case)


@pytest.mark.parametrize("mesh", ["", pytest.param("stage=2,tensor=2", marks=pytest.mark.slow)])
def test_greedy_tokens_up_to_the_last_position(tmp_path, mesh):
    model = make_hf_folder(tmp_path / "hf", "gpt2", max_position_embeddings=40)
    convert(tmp_path / "hf", tmp_path / "ckpt", quiet=True)
    rng = np.random.default_rng(2)
    prompts = {str(length): rng.integers(3, 96, length).tolist() for length in (1, 17, 23, 39)}
    engine = make_engine(tmp_path / "ckpt", mesh, max_context=1000)
    assert engine.max_context == 40
    found = run(engine, prompts, SamplingParams(max_new_tokens=100, ignore_eos=True))
    for name, prompt in prompts.items():
        assert len(prompt) + len(found[name, 0].token_ids) == 40
    equal_to_transformers(found, prompts, model)


def expected_leaves(model):
    """From the torch modules, by what each computes: a Conv1D is x times [in, out]."""
    base, heads = model.transformer, model.config.n_head
    table = {"embed": base.wte.weight, "positions": base.wpe.weight}
    table |= {"norm": base.ln_f.weight, "norm_bias": base.ln_f.bias}
    if not model.config.tie_word_embeddings:
        table["head"] = model.lm_head.weight
    for index, layer in enumerate(base.h):
        width = (heads, layer.attn.head_dim)
        fused = layer.attn.c_attn.weight.split(layer.attn.split_size, dim=1)
        found = {name: part.T.reshape(*width, -1) for name, part in zip("qkv", fused)}
        fused = layer.attn.c_attn.bias.split(layer.attn.split_size)
        found |= {f"{name}_bias": part.view(width) for name, part in zip("qkv", fused)}
        found |= {"o": layer.attn.c_proj.weight.T.reshape(-1, *width), "o_bias": layer.attn.c_proj.bias}
        for name, module in (("input_norm", layer.ln_1), ("post_norm", layer.ln_2)):
            found |= {name: module.weight, f"{name}_bias": module.bias}
        for name, module in (("up", layer.mlp.c_fc), ("down", layer.mlp.c_proj)):
            found |= {name: module.weight.T, f"{name}_bias": module.bias}
        table |= {f"layers.{index}.{name}": each for name, each in found.items()}
    return {name: each.detach() for name, each in table.items()}


def assert_arrived(checkpoint, model):
    reader, expected = Reader(checkpoint), expected_leaves(model)
    assert reader.manifest.leaves.keys() == expected.keys()
    for name, tensor in expected.items():
        found = reader.read(name, (slice(None),) * tensor.ndim)
        assert torch.equal(torch.from_numpy(found.view(np.int16)).view(torch.bfloat16), tensor), name


@pytest.mark.parametrize("tied", [True, False])
def test_every_tensor_arrives(tmp_path, tied):
    model = make_hf_folder(tmp_path / "hf", "gpt2", "bfloat16", **SIX | {"tie_word_embeddings": tied})
    manifest, _ = convert(tmp_path / "hf", tmp_path / "ckpt", verify=True, quiet=True)
    assert manifest.parameters == sum(tensor.numel() for tensor in model.parameters())
    assert_arrived(tmp_path / "ckpt", model)


def test_files_of_the_bare_model_with_its_masks(tmp_path):
    model = make_hf_folder(tmp_path / "hf", "gpt2", "bfloat16")
    file = tmp_path / "hf" / "model.safetensors"
    state = {name.removeprefix("transformer."): tensor for name, tensor in load_file(file).items()}
    for layer in range(2):
        state[f"h.{layer}.attn.bias"] = torch.ones(1, 1, 128, 128, dtype=torch.bool).tril()
        state[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    save_file(state | {"lm_head.weight": state["wte.weight"].clone()}, file)
    convert(tmp_path / "hf", tmp_path / "ckpt", quiet=True)
    assert_arrived(tmp_path / "ckpt", model)
    save_file(state | {"lm_head.weight": -state["wte.weight"]}, file)
    with pytest.raises(ConvertError, match=r"lm_head.weight differs from transformer.wte.weight"):
        convert(tmp_path / "hf", tmp_path / "other", quiet=True)


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_weights_of_another_shape_than_the_config_says_are_refused(tmp_path):
    make_hf_folder(tmp_path / "hf", "gpt2")
    edit_json(tmp_path / "hf" / "config.json", n_positions=256, n_inner=32)
    with pytest.raises(ConvertError, match="7 tensors do not fit") as error:
        convert(tmp_path / "hf", tmp_path / "ckpt", quiet=True)
    assert "wpe.weight: in model.safetensors, found shape [128, 32], expected [256, 32]" in str(error.value)
    assert "h.1.mlp.c_fc.weight: in model.safetensors, found shape [32, 48], expected [32, 32]" in str(error.value)


BASE = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"n_embd": 96, "n_head": 4, "n_layer": 3, "n_inner": 100, "n_positions": 77, "n_ctx": 512, "head_dim": 7},
        {"n_embd": 96, "hidden_size": 48, "num_attention_heads": 6, "num_hidden_layers": 2},
        {"max_position_embeddings": 99, "tie_word_embeddings": False, "layer_norm_epsilon": 1e-6},
        {"bos_token_id": None, "eos_token_id": [2, 3], "vocab_size": 64000},
    ],
    ids=str,
)
def test_config_is_what_transformers_reads(tmp_path, change):
    (tmp_path / "config.json").write_text(json.dumps(BASE | change))
    theirs, ours = AutoConfig.from_pretrained(tmp_path), from_hf(BASE | change)
    assert (ours.hidden_size, ours.num_layers, ours.num_heads) == (theirs.n_embd, theirs.n_layer, theirs.n_head)
    assert ours.num_kv_heads == ours.num_heads and ours.head_dim == theirs.n_embd // theirs.n_head
    assert (ours.mlp_width, ours.vocab_size) == (theirs.n_inner or 4 * theirs.n_embd, theirs.vocab_size)
    assert ours.max_context == ours.learned_positions == theirs.n_positions and ours.rope is None
    assert (ours.tied, ours.norm_eps) == (theirs.tie_word_embeddings, theirs.layer_norm_epsilon)
    ends = theirs.eos_token_id
    assert ours.eos_token_ids == (tuple(ends) if isinstance(ends, list) else (ends,))
    assert ours.bos_token_id == theirs.bos_token_id and ours.activation == "gelu_pytorch_tanh"
    assert ModelConfig.from_json(json.loads(json.dumps(ours.to_json()))) == ours


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scale_attn_weights": False}, "scale_attn_weights: False is not supported; supported: True"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx: True .* supported: False"),
        ({"add_cross_attention": True}, "add_cross_attention: True is not supported; supported: False"),
        ({"activation_function": "mish"}, "activation_function: 'mish' is not supported; supported: silu, gelu"),
        ({"n_head": 7}, "n_embd: 768 is not a multiple of n_head 7"),
        ({"n_inner": -1}, "n_inner: expected a number above 0, found -1"),
        ({"n_positions": None}, "n_positions: expected a number above 0, found nothing"),
    ],
)
def test_a_config_that_cannot_run_is_refused_by_field(change, message):
    with pytest.raises(ConfigError, match=message):
        from_hf(BASE | change)


def test_gpt_sw3_40b():
    preset = load_preset("gpt-sw3-40b")
    assert count_parameters(preset.model) == preset.parameters
    assert (preset.model.max_context, preset.model.head_dim, preset.model.activation) == (2048, 128, "gelu")


@pytest.fixture(scope="module")
def spiece(tmp_path_factory):
    """A SentencePiece model trained as GPT-SW3's was, with its special pieces; the real one does not ship."""
    model = io.BytesIO()
    lines = (ROOT / "examples" / "tinystories" / "README.md").read_text().splitlines()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        minloglevel=2,
        num_threads=1,
        model_type="bpe",
        vocab_size=450,
        byte_fallback=True,
        split_digits=True,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        user_defined_symbols=["<|python|>", "▁▁", "▁▁▁▁"],
        pad_id=0,
        unk_id=1,
        bos_id=2,
        eos_id=3,
        eos_piece="<|endoftext|>",
    )
    folder = tmp_path_factory.mktemp("spiece")
    (folder / "spiece.model").write_bytes(model.getvalue())
    return folder


LINES = [
    "Once upon a time, a small fox lived in the wood.",
    "  two  spaces\n\n\tand   def x(12345):\n        return",
    "åäö 😀 日本 e\u0301",
    "<|endoftext|><s>User\nHej!\n<s>Bot:",
    "<|python|> a <pad>",
    "no\u00a0break\u2003and\u200b zero",
    " ",
    "",
]


@pytest.mark.parametrize("config", [None, {"tokenizer_class": "GPTSw3Tokenizer"}], ids=str)
@pytest.mark.parametrize("name", ["ckpt", "gpt-sw3-7b"])  # the class would take other special tokens by the second
def test_gpt_sw3s_tokenizer_travels_with_the_checkpoint(tmp_path, spiece, config, name):
    make_hf_folder(tmp_path / "hf", "gpt2")
    shutil.copy(spiece / "spiece.model", tmp_path / "hf")
    if config:
        (tmp_path / "hf" / "tokenizer_config.json").write_text(json.dumps(config))
    convert(tmp_path / "hf", tmp_path / name, quiet=True)
    shutil.rmtree(tmp_path / "hf")
    tokenizer, reference = load_tokenizer(tmp_path / name), GPTSw3Tokenizer.from_pretrained(spiece)
    assert tokenizer.get_vocab() == reference.get_vocab() and len(tokenizer) == 450
    assert tokenizer.special_tokens_map == reference.special_tokens_map
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 2, 3)
    for line in LINES:
        ids = encode(tokenizer, line)
        assert ids == reference.encode(line) and max(ids, default=0) < 450
        assert tokenizer.decode(ids) == reference.decode(ids)
    for line in LINES[:2]:
        assert tokenizer.decode(encode(tokenizer, line)) == line
    tokenizer.chat_template = "<|endoftext|>{% for m in messages %}<s>User\n{{ m.content }}\n{% endfor %}<s>Bot:"
    assert apply_chat(tokenizer, [{"role": "user", "content": "Hej!"}]) == encode(tokenizer, LINES[3])


def test_gpt_sw3s_text_comes_piece_by_piece(spiece, tmp_path):
    shutil.copytree(spiece, tmp_path / "tokenizer")
    tokenizer = load_tokenizer(tmp_path)
    prompt, rng = encode(tokenizer, LINES[0]), np.random.default_rng(0)
    answers = [encode(tokenizer, line) for line in LINES] + [rng.integers(0, 450, 60).tolist() for _ in range(5)]
    for answer in answers:
        stream = TextStream(tokenizer, prompt)
        text = "".join([stream.append([token]) for token in answer]) + stream.finish()
        whole = tokenizer.decode(prompt + answer, skip_special_tokens=True)
        assert tokenizer.decode(prompt, skip_special_tokens=True) + text == whole


def test_a_sentencepiece_model_of_another_class_is_refused(spiece, tmp_path):
    shutil.copytree(spiece, tmp_path / "tokenizer")
    (tmp_path / "tokenizer" / "tokenizer_config.json").write_text('{"tokenizer_class": "T5Tokenizer"}')
    message = "cannot be loaded: .*spiece.model: tokenizer_class 'T5Tokenizer' is not supported; legal: GPTSw3Tokenizer"
    with pytest.raises(ValueError, match=message):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer" / "tokenizer_config.json").unlink()
    (tmp_path / "tokenizer" / "spiece.model").write_bytes(b"\x01broken")
    with pytest.raises(ValueError, match="tokenizer: the tokenizer cannot be loaded"):
        load_tokenizer(tmp_path)


@pytest.mark.skipif(not TOKENIZER.exists(), reason="needs ../shared/data/tokenizers/gpt2, which does not ship")
def test_gpt2s_tokenizer_travels_with_the_checkpoint(tmp_path):
    make_hf_folder(tmp_path / "hf", "gpt2", vocab_size=50257)
    for file in TOKENIZER.iterdir():
        shutil.copy(file, tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "ckpt", quiet=True)
    shutil.rmtree(tmp_path / "hf")
    tokenizer = load_tokenizer(tmp_path / "ckpt")
    assert (len(tokenizer), tokenizer.eos_token_id) == (50257, 50256)
    ids = encode(tokenizer, "Hello world<|endoftext|>")
    assert ids == [15496, 995, 50256] and tokenizer.decode(ids) == "Hello world<|endoftext|>"
