"""Qwen3, Gemma 1 and 2 and Phi-3 against transformers: what they add to LLaMA's layer, cut in every way."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import PartitionSpec as P
from transformers import AutoConfig
from transformers.models.gemma.modeling_gemma import GemmaTextScaledWordEmbedding
from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

from convert.run import convert
from engine_run import make_engine, run, tokens
from greedy_reference import agree_up_to_ties
from hf_models import make_hf_folder
from jaxinfer.checkpoint.reader import Reader
from jaxinfer.engine.forward import Decoder
from jaxinfer.engine.params import SamplingParams
from jaxinfer.models import llama
from jaxinfer.models.config import ConfigError, ModelConfig
from jaxinfer.models.configs.llama import ARCHITECTURES
from jaxinfer.models.families import from_hf
from jaxinfer.ops.rope import angles
from jaxinfer.parallel.axes import parse_mesh
from jaxinfer.parallel.mesh import make_mesh
from model_logits import compare

QWEN3 = {"family": "qwen3", "head_dim": 16}
GEMMA = {"family": "gemma", "head_dim": 20}
# caps low enough to bend what these small models give
GEMMA2 = {
    "family": "gemma2",
    "head_dim": 16,
    "sliding_window": 9,
    "query_pre_attn_scalar": 3,
    "attn_logit_softcapping": 1.5,
    "final_logit_softcapping": 2.0,
}
PHI3 = {"family": "phi3", "pad_token_id": 0}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0 + i / 9 for i in range(4)],
    "long_factor": [2.0 + i for i in range(4)],
}
LATE = {"layer_types": ["sliding_attention", "full_attention", "full_attention"]}


@pytest.mark.parametrize(
    "case",
    [
        QWEN3 | {"chunks": [17, 1, 52]},
        QWEN3 | {"attention_bias": True, "tie_word_embeddings": True, "num_key_value_heads": 4},
        QWEN3 | {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
        GEMMA | {"num_key_value_heads": 1},
        GEMMA | {"hidden_act": "gelu", "tie_word_embeddings": False, "attention_bias": True},
        GEMMA2 | {"chunks": [17, 1, 52]},
        GEMMA2 | LATE | {"attention_bias": True, "tie_word_embeddings": False},
        GEMMA2 | {"attn_logit_softcapping": None, "final_logit_softcapping": None, "hidden_activation": "gelu"},
        PHI3 | {"sliding_window": 10, "chunks": [17, 1, 52]},
        PHI3 | {"num_key_value_heads": None, "tie_word_embeddings": True},
        PHI3 | {"rope_parameters": LONGROPE, "original_max_position_embeddings": 32},
        PHI3 | {"rope_parameters": LONGROPE, "original_max_position_embeddings": 80},
    ],
    ids=str,
)
def test_variants(tmp_path, case):
    compare(tmp_path, **case)


@pytest.mark.parametrize(
    "mesh, case",
    [
        pytest.param("tensor=2", QWEN3, marks=pytest.mark.slow),
        # two KV heads for four
        pytest.param("tensor=4,stage=2", QWEN3 | {"attention_bias": True}, marks=pytest.mark.slow),
        pytest.param("tensor=2,stage=2", GEMMA2, marks=pytest.mark.slow),
        # in a slot, one stage has a window and the other has none, or no layer
        ("stage=2", GEMMA2 | LATE),
        pytest.param("stage=2", GEMMA2 | {"stage_layers": (1, 2)}, marks=pytest.mark.slow),
        pytest.param("tensor=2,stage=3", PHI3 | {"sliding_window": 10}, marks=pytest.mark.slow),
        pytest.param("tensor=8", QWEN3 | {"num_attention_heads": 8}, marks=pytest.mark.slow),
        pytest.param("tensor=4", GEMMA | {"num_key_value_heads": 1}, marks=pytest.mark.slow),
        pytest.param("tensor=2,stage=2,data=2", GEMMA2 | {"stage_layers": (1, 2)}, marks=pytest.mark.slow),
        pytest.param("tensor=4", PHI3, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_meshes(tmp_path, mesh, case):
    compare(tmp_path, mesh=mesh, **{"chunks": [30, 40]} | case)


PROMPTS = {str(length): [3 + (7 * i) % 90 for i in range(length)] for length in (1, 20, 45)}


def greedy(checkpoint, mesh="", **settings):
    params = SamplingParams(max_new_tokens=12, ignore_eos=True)
    return tokens(run(make_engine(checkpoint, mesh, **settings), PROMPTS, params))


def made(tmp_path, family, **fields):
    model = make_hf_folder(tmp_path / "hf", family, attn_implementation="eager", **fields)
    convert(tmp_path / "hf", tmp_path / "ckpt", quiet=True)
    return model


@pytest.mark.slow
@pytest.mark.parametrize(
    "mesh, case",
    [
        ("", QWEN3),
        ("", GEMMA),
        ("", GEMMA2),
        ("", PHI3 | {"sliding_window": 10}),
        ("stage=2,tensor=2", QWEN3),
        ("stage=2,tensor=2", GEMMA2),
    ],
    ids=lambda each: each if isinstance(each, str) else each["family"],
)
def test_greedy_tokens_are_those_of_transformers(tmp_path, mesh, case):
    model, whole = made(tmp_path, **case), 0
    for (name, _), new in greedy(tmp_path / "ckpt", mesh).items():
        prompt = torch.tensor([PROMPTS[name]])
        with torch.no_grad():
            wanted = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "eos_token_id": None}
            expected = model.generate(prompt, **wanted)[0]
            top = model(expected[None]).logits[0, prompt.shape[1] - 1 : -1].topk(2).values
        whole += agree_up_to_ties(new, expected[prompt.shape[1] :].tolist(), (top[:, 0] - top[:, 1]).tolist())
    assert whole >= 2, "too many ties: the comparison would be empty"


@pytest.mark.slow
@pytest.mark.parametrize("mesh, case", [("", QWEN3), ("stage=2", GEMMA2 | LATE | {"num_hidden_layers": 3})], ids=str)
def test_kernels_give_the_same_tokens(tmp_path, mesh, case):
    made(tmp_path, **case)
    assert greedy(tmp_path / "ckpt", mesh, kernels="on") == greedy(tmp_path / "ckpt", mesh, kernels="off")


def test_embeddings_are_scaled_by_a_rounded_number():
    """sqrt(30) is 5.477, in bfloat16 5.469."""
    config = from_hf(hf("GemmaForCausalLM", hidden_size=30))
    table = jnp.asarray(np.random.default_rng(0).normal(size=(96, 30)), jnp.bfloat16)
    theirs = GemmaTextScaledWordEmbedding(96, 30, 0, embed_scale=30**0.5).bfloat16()
    theirs.weight.data = torch.tensor(np.asarray(table, np.float32)).bfloat16()
    ends, places = Decoder(config, (3,)).ends({"embed": table, "norm": table[0]}), jnp.arange(96)
    embedded = jax.shard_map(
        ends.embedding, mesh=make_mesh(parse_mesh("")), in_specs=P(), out_specs=P(), check_vma=False
    )
    np.testing.assert_array_equal(
        np.asarray(embedded(places, places), np.float32), theirs(torch.arange(96)).detach().float().numpy()
    )


def test_only_plain_layers_run_in_one_launch():
    plain = {name for name in ARCHITECTURES if llama.in_one_launch(from_hf(hf(name)))}
    assert plain == {"LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Phi3ForCausalLM"}


def expected_leaves(model):
    """From the torch modules, by what each one computes."""
    config, table = model.config, {}
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    for index, layer in enumerate(model.model.layers):
        attention, mlp, before = layer.self_attn, layer.mlp, f"layers.{index}."
        norms = {"input_norm": layer.input_layernorm, "post_norm": layer.post_attention_layernorm}
        if hasattr(layer, "pre_feedforward_layernorm"):
            norms = norms | {"post_norm": layer.pre_feedforward_layernorm, "o_norm": layer.post_attention_layernorm}
            norms["down_norm"] = layer.post_feedforward_layernorm
        if hasattr(attention, "q_norm"):
            norms |= {"q_norm": attention.q_norm, "k_norm": attention.k_norm}
        table |= {before + name: module.weight for name, module in norms.items()}
        if hasattr(attention, "qkv_proj"):
            q, k, v = attention.qkv_proj.weight.split([heads * width, kv_heads * width, kv_heads * width])
            gate, up = mlp.gate_up_proj.weight.chunk(2)
        else:
            q, k, v = attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight
            gate, up = mlp.gate_proj.weight, mlp.up_proj.weight
        for name, weight in zip("qkv", (q, k, v)):
            table[before + name] = weight.view(-1, width, config.hidden_size)
        table[before + "o"] = attention.o_proj.weight.view(config.hidden_size, heads, width)
        table |= {before + "gate": gate, before + "up": up, before + "down": mlp.down_proj.weight}
    return table | {"embed": model.model.embed_tokens.weight, "norm": model.model.norm.weight}


@pytest.mark.parametrize("case", [QWEN3, GEMMA, GEMMA2, PHI3], ids=lambda case: case["family"])
def test_every_tensor_arrives(tmp_path, case):
    model = make_hf_folder(tmp_path / "hf", dtype="bfloat16", **case)
    manifest, _ = convert(tmp_path / "hf", tmp_path / "ckpt", verify=True, quiet=True)
    reader, expected = Reader(tmp_path / "ckpt"), expected_leaves(model)
    assert reader.manifest.leaves.keys() - {"head"} == expected.keys()
    assert manifest.parameters == sum(tensor.numel() for tensor in model.parameters())
    for name, tensor in expected.items():
        found = reader.read(name, (slice(None),) * tensor.ndim)
        assert torch.equal(torch.from_numpy(found.view(np.int16)), tensor.detach().view(torch.int16)), name


BASE = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}


def hf(architecture, **change):
    model_type = architecture.removesuffix("ForCausalLM").lower()
    return BASE | {"architectures": [architecture], "model_type": model_type} | change


SLIDING = {"sliding_window": 7, "use_sliding_window": True, "max_window_layers": 2}
TYPES = {"use_sliding_window": True, "layer_types": ["full_attention", "sliding_attention", "full_attention"]}
OTHER = {"head_dim": 20, "attention_bias": True, "tie_word_embeddings": False, "bos_token_id": 3, "eos_token_id": None}


@pytest.mark.parametrize(
    ("architecture", "change"),
    [
        *((name, change) for name in tuple(ARCHITECTURES)[3:6] for change in ({}, OTHER, {"hidden_act": "silu"})),
        *(("Qwen3ForCausalLM", change) for change in (SLIDING, TYPES, SLIDING | {"use_sliding_window": False})),
        ("GemmaForCausalLM", {"hidden_act": "gelu"}),
        *(("Gemma2ForCausalLM", change) for change in (SLIDING, TYPES, {"hidden_activation": "gelu"})),
        ("Gemma2ForCausalLM", {"attn_logit_softcapping": None, "final_logit_softcapping": 7.0}),
    ],
)
def test_fields_are_read_as_transformers_reads_them(tmp_path, architecture, change):
    written = hf(architecture, **change)
    (tmp_path / "config.json").write_text(json.dumps(written))
    theirs, ours = AutoConfig.from_pretrained(tmp_path), from_hf(written)
    kinds = getattr(theirs, "layer_types", ["full_attention"] * 3)
    assert ours.windows == tuple(theirs.sliding_window if kind == "sliding_attention" else None for kind in kinds)
    assert ours.head_dim == theirs.head_dim and ours.tied == theirs.tie_word_embeddings
    assert ours.qkv_bias == ours.o_bias == theirs.attention_bias
    gemma2 = architecture == "Gemma2ForCausalLM"
    assert ours.activation == (theirs.hidden_activation if gemma2 else theirs.hidden_act)
    assert ours.attention_softcap == (theirs.attn_logit_softcapping if gemma2 else None)
    assert ours.logit_softcap == (theirs.final_logit_softcapping if gemma2 else None)
    assert ours.query_scale == (theirs.query_pre_attn_scalar**-0.5 if gemma2 else None)
    assert ours.bos_token_id == theirs.bos_token_id
    assert ours.eos_token_ids == (() if theirs.eos_token_id is None else (theirs.eos_token_id,))
    assert ModelConfig.from_json(json.loads(json.dumps(ours.to_json()))) == ours


FACTORS = {"short_factor": [1.0 + i / 8 for i in range(8)], "long_factor": [2.0 + i for i in range(8)]}


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"sliding_window": 9, "num_key_value_heads": None},
        {
            "rope_scaling": {"type": "su", "original_max_position_embeddings": 16, **FACTORS},
            "original_max_position_embeddings": 32,
        },
        {"rope_scaling": {"type": "longrope", **FACTORS}},  # of 4096, as trained, unless the file says otherwise
        {"rope_scaling": {"rope_type": "yarn", **FACTORS}, "rope_theta": 500.0},
        {"rope_parameters": {"rope_type": "longrope", "rope_theta": 7.0, "factor": 3.0, **FACTORS}},
    ],
)
def test_phi3s_rope_turns_as_transformers_does(tmp_path, change):
    written = hf("Phi3ForCausalLM", pad_token_id=0, **change)
    (tmp_path / "config.json").write_text(json.dumps(written))
    theirs, ours = AutoConfig.from_pretrained(tmp_path), from_hf(written)
    assert ours.windows == (theirs.sliding_window,) * 3
    assert ours.num_kv_heads == theirs.num_key_value_heads
    assert (ours.bos_token_id, ours.eos_token_ids) == (theirs.bos_token_id, (theirs.eos_token_id,))
    for length in (20, 60):
        positions = np.arange(length)[None]
        expected = Phi3RotaryEmbedding(theirs)(torch.zeros(1), torch.from_numpy(positions))
        found = angles(ours.rope, ours.head_dim, jnp.asarray(positions), jnp.asarray([length]))
        for one, other in zip(found, expected):
            np.testing.assert_allclose(np.asarray(one), other[..., :8].numpy(), atol=3e-5)


@pytest.mark.parametrize(
    ("architecture", "change", "message"),
    [
        ("Qwen3ForCausalLM", {"head_dim": None}, "head_dim: .* found nothing"),
        ("Qwen3ForCausalLM", {"num_key_value_heads": ...}, "num_key_value_heads: .* found nothing"),
        ("GemmaForCausalLM", {"use_bidirectional_attention": True}, "use_bidirectional_attention: True .* False"),
        ("GemmaForCausalLM", {"hidden_activation": "silu"}, "hidden_activation: 'silu' .* gelu_pytorch_tanh"),
        ("Gemma2ForCausalLM", {"hidden_activation": "what"}, "hidden_activation: 'what' .*silu"),
        ("Gemma2ForCausalLM", {"use_bidirectional_attention": True}, "use_bidirectional_attention: True"),
        ("Gemma2ForCausalLM", {"attn_logit_softcapping": 0}, "attn_logit_softcapping: .* found 0"),
        ("Gemma2ForCausalLM", {"query_pre_attn_scalar": None}, "query_pre_attn_scalar: .* found nothing"),
        ("Gemma2ForCausalLM", {"sliding_window": None}, "sliding_window: .* found nothing"),
        ("Gemma2ForCausalLM", {"layer_types": ["full_attention"]}, "layer_types: expected 3, .* found 1"),
        ("Gemma2ForCausalLM", {"layer_types": ["chunked_attention"] * 3}, "layer_types: 'chunked_attention' .*sliding"),
        ("Phi3ForCausalLM", {"partial_rotary_factor": 0.75}, "partial_rotary_factor: only 1.0"),
        ("Phi3ForCausalLM", {"rope_scaling": {"type": "linear", "factor": 2}}, "rope_type: 'linear' .* longrope"),
        ("Phi3ForCausalLM", {"rope_scaling": {"type": "su"}}, "short_factor: expected a list of 8 numbers"),
    ],
)
def test_a_config_that_cannot_run_is_refused_by_field(architecture, change, message):
    written = {name: value for name, value in hf(architecture, **change).items() if value is not ...}
    with pytest.raises(ConfigError, match=message):
        from_hf(written)
