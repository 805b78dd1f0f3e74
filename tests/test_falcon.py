"""The Falcon family against transformers: its three blocks, its fused weights, and what its config.json may say."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import PartitionSpec as P
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import AutoConfig

from convert.run import convert
from convert.tensor import ConvertError
from engine_run import make_engine, run
from greedy_reference import agree_up_to_ties
from hf_models import make_hf_folder
from jaxinfer.checkpoint.reader import Reader
from jaxinfer.engine.costs import count_parameters
from jaxinfer.engine.forward import Decoder
from jaxinfer.engine.params import SamplingParams
from jaxinfer.models.config import ConfigError, ModelConfig
from jaxinfer.models.families import from_hf
from jaxinfer.parallel.axes import LayoutError, parse_mesh
from jaxinfer.parallel.mesh import make_mesh, mesh_sizes
from jaxinfer.parallel.placement import Parameter, Rules, check_model, global_shape, partition_spec
from jaxinfer.presets import load_preset
from jaxinfer.tokenizer import encode, load_tokenizer
from model_logits import compare

TOKENIZER = Path(__file__).parents[2] / "shared" / "data" / "tokenizers" / "falcon"
NEW = {"new_decoder_architecture": True}  # 40B and 180B: two norms, groups of queries
ONE_NORM = NEW | {"num_ln_in_parallel_attn": 1, "tie_word_embeddings": False, "rope_theta": 500042.0}  # Falcon2-11B
MULTI_QUERY = {"num_kv_heads": None}  # 7B
# transformers' eager attention adds alibi twice, to the scores and to the mask; its sdpa once, as in training
ALIBI = {"alibi": True, "attn_implementation": "sdpa"}
RW = ALIBI | {"num_kv_heads": None, "multi_query": False, "parallel_attn": False, "bias": True}
VARIANTS = {"40b": NEW, "11b": ONE_NORM, "7b": MULTI_QUERY, "rw": RW}
TWELVE = {"num_attention_heads": 12, "hidden_size": 48}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants(tmp_path, variant):
    compare(tmp_path, family="falcon", **VARIANTS[variant])


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        NEW | {"bias": True, "num_attention_heads": 6, "num_kv_heads": 3, "hidden_size": 60, "ffn_hidden_size": 45},
        NEW | {"num_kv_heads": None, "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
        NEW | {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}, "max_position_embeddings": 40},
        MULTI_QUERY | {"num_attention_heads": 71, "hidden_size": 142, "tie_word_embeddings": False},
        MULTI_QUERY | ALIBI | {"num_attention_heads": 71, "hidden_size": 142, "bias": True},
        MULTI_QUERY | {"parallel_attn": False, "activation": "relu"},
        MULTI_QUERY | {"multi_query": False, "bias": True, "ffn_hidden_size": None},
        NEW | ALIBI,
        RW | {"layer_norm_epsilon": 0.1, "bias": False},
    ],
    ids=str,
)
def test_other_variants(tmp_path, case):
    compare(tmp_path, family="falcon", **case)


@pytest.mark.slow
def test_alibi_where_bfloat16_rounds_positions(tmp_path):
    longer = {"tokens": 400, "max_position_embeddings": 512, "chunks": [250, 150]}
    compare(tmp_path, family="falcon", num_hidden_layers=2, **longer, **RW | TWELVE)


MESHES = [("40b", "tensor=4", {"num_attention_heads": 8}, None)]  # each of two KV heads on two devices
MORE_MESHES = [
    ("rw", "tensor=4,stage=2", TWELVE, (1, 2)),
    ("40b", "tensor=2", {"num_attention_heads": 8, "bias": True}, None),
    ("11b", "stage=2,data=2,tensor=2", {}, (2, 1)),
    ("7b", "tensor=4", {"bias": True}, None),  # the one KV head on all four
    ("7b", "stage=3", {"num_attention_heads": 3, "hidden_size": 30}, None),
]


@pytest.mark.parametrize(
    ("variant", "mesh", "case", "stage_layers"),
    MESHES + [pytest.param(*m, marks=pytest.mark.slow) for m in MORE_MESHES],
)
def test_meshes(tmp_path, variant, mesh, case, stage_layers):
    case = VARIANTS[variant] | case
    compare(tmp_path, family="falcon", mesh=mesh, chunks=[30, 40], stage_layers=stage_layers, **case)


@pytest.mark.slow
@pytest.mark.parametrize(("variant", "meshes"), [("40b", ["", "stage=2,tensor=2"]), ("7b", ["tensor=4"]), ("rw", [""])])
def test_greedy_tokens_equal_transformers(tmp_path, variant, meshes):
    attention = {"attn_implementation": "eager"} | VARIANTS[variant]
    model = make_hf_folder(tmp_path / "hf", "falcon", **attention)
    convert(tmp_path / "hf", tmp_path / "ckpt", quiet=True)
    rng, new = np.random.default_rng(2), 20
    prompts = {str(length): rng.integers(3, 96, length).tolist() for length in (17, 20, 40)}
    settings = {"do_sample": False, "max_new_tokens": new, "min_new_tokens": new}
    for mesh in meshes:
        found = run(make_engine(tmp_path / "ckpt", mesh), prompts, SamplingParams(max_new_tokens=new, ignore_eos=True))
        whole = 0
        for name, prompt in prompts.items():
            said = model.generate(torch.tensor([prompt]), **settings, output_logits=True, return_dict_in_generate=True)
            top = torch.cat(said.logits).topk(2).values
            expected = said.sequences[0, len(prompt) :].tolist()
            whole += agree_up_to_ties(found[name, 0].token_ids, expected, (top[:, 0] - top[:, 1]).tolist())
        assert whole >= 2, "too many ties: the comparison would be empty"


@pytest.mark.parametrize("variant, sums", [("40b", 1), ("11b", 1), ("7b", 1), ("rw", 2)])
def test_a_parallel_layer_sums_over_tensor_once(tmp_path, variant, sums):
    fields = {name: value for name, value in VARIANTS[variant].items() if name != "attn_implementation"}
    sizes = {"vocab_size": 96, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 3, "bias": True}
    config = from_hf({"architectures": ["FalconForCausalLM"], "num_kv_heads": 2} | sizes | fields)
    assert config.reduces_per_layer == sums
    mesh, rules, decoder = make_mesh(parse_mesh("tensor=2")), Rules(), Decoder(config, (3,))
    is_parameter = {"is_leaf": lambda each: isinstance(each, Parameter)}
    parameters = decoder.parameters()
    specs = jax.tree.map(lambda each: partition_spec(each, rules), parameters, **is_parameter)
    arrays = jax.tree.map(
        lambda each: jax.ShapeDtypeStruct(global_shape(each, rules, mesh_sizes(mesh)), jnp.float32),
        parameters,
        **is_parameter,
    )
    pool = jax.ShapeDtypeStruct((1, 1, 4, 16, 2 * max(1, config.num_kv_heads // 2), config.head_dim), jnp.float32)
    pools = ([pool] * 3,) * 2
    pool_specs = jax.tree.map(lambda _: P(None, None, None, None, "tensor", None), pools)

    def stage(params, pools, x):
        tokens = jnp.arange(8)[None]
        return decoder.run_stage(params, pools, x, tokens, jnp.asarray([8]), jnp.asarray([[1]]))[0]

    shards = {"mesh": mesh, "in_specs": (specs, pool_specs, P()), "out_specs": P(), "check_vma": False}
    jaxpr = jax.make_jaxpr(jax.shard_map(stage, **shards))(arrays, pools, jnp.zeros((1, 8, 32)))
    assert str(jaxpr).count("= psum") == 3 * sums


def fused_parts(attention, tensor):
    """q, k, v [heads, D, ...] of a fused weight [out, in] or bias [out], taken apart by transformers' own code."""
    q, k, v = (each[0] for each in attention._split_heads(tensor.view(tensor.shape[0], -1).T[None]))
    if attention.new_decoder_architecture:  # there each query head gets a copy
        k, v = (each[:, :: attention.num_heads // attention.num_kv_heads] for each in (k, v))
    parts = (each.permute(1, 2, 0) for each in (q, k, v))
    return [part if tensor.ndim == 2 else part[..., 0] for part in parts]


def expected_leaves(model):
    table = {"embed": model.transformer.word_embeddings.weight}
    table |= {"norm": model.transformer.ln_f.weight, "norm_bias": model.transformer.ln_f.bias}
    if not model.config.tie_word_embeddings:
        table["head"] = model.lm_head.weight
    for index, layer in enumerate(model.transformer.h):
        attention, found = layer.self_attention, {}
        if hasattr(layer, "ln_attn"):
            modules = {"input_norm": layer.ln_attn, "mlp_norm": layer.ln_mlp}
        else:
            modules = {"input_norm": layer.input_layernorm}
            modules |= {} if model.config.parallel_attn else {"mlp_norm": layer.post_attention_layernorm}
        modules |= {"up": layer.mlp.dense_h_to_4h, "down": layer.mlp.dense_4h_to_h}
        for name, module in modules.items():
            found |= {name: module.weight, f"{name}_bias": module.bias}
        width = (attention.num_heads, attention.head_dim)
        found |= {"o": attention.dense.weight.view(-1, *width), "o_bias": attention.dense.bias}
        found |= dict(zip("qkv", fused_parts(attention, attention.query_key_value.weight)))
        if model.config.bias:
            found |= dict(zip(("q_bias", "k_bias", "v_bias"), fused_parts(attention, attention.query_key_value.bias)))
        table |= {f"layers.{index}.{name}": each for name, each in found.items() if each is not None}
    return {name: each.detach() for name, each in table.items()}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_tensor_arrives(tmp_path, variant):
    case = {"bias": True} | VARIANTS[variant] if variant != "7b" else VARIANTS[variant]
    model = make_hf_folder(tmp_path / "hf", "falcon", "bfloat16", **case)
    manifest, _ = convert(tmp_path / "hf", tmp_path / "ckpt", verify=True, quiet=True)
    assert manifest.dtype == "bfloat16"
    assert manifest.parameters == sum(tensor.numel() for tensor in model.parameters())
    reader, expected = Reader(tmp_path / "ckpt"), expected_leaves(model)
    assert reader.manifest.leaves.keys() == expected.keys()
    for name, tensor in expected.items():
        found = reader.read(name, (slice(None),) * tensor.ndim)
        assert torch.equal(torch.from_numpy(found.view(np.int16)).view(torch.bfloat16), tensor), name


def test_a_head_stored_beside_the_embedding_must_be_equal_to_it(tmp_path):
    make_hf_folder(tmp_path / "hf", "falcon", **NEW)
    file = tmp_path / "hf" / "model.safetensors"
    state = load_file(file)
    head = state["transformer.word_embeddings.weight"].clone()
    save_file(state | {"lm_head.weight": head}, file)
    convert(tmp_path / "hf", tmp_path / "ckpt", quiet=True)
    assert "head" not in Reader(tmp_path / "ckpt").manifest.leaves
    head[0, 0] += 1
    save_file(state | {"lm_head.weight": head}, file)
    with pytest.raises(ConvertError, match=r"lm_head.weight differs from transformer.word_embeddings.weight"):
        convert(tmp_path / "hf", tmp_path / "other", quiet=True)


def test_a_fused_tensor_of_another_layout_is_refused(tmp_path):
    make_hf_folder(tmp_path / "hf", "falcon", **NEW)
    path = tmp_path / "hf" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_kv_heads": 4}))
    message = r"query_key_value.weight: in model.safetensors, found shape \[64, 32\], expected \[96, 32\]"
    with pytest.raises(ConvertError, match=message):
        convert(tmp_path / "hf", tmp_path / "ckpt", quiet=True)


BASE = {"architectures": ["FalconForCausalLM"], "model_type": "falcon"}


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"hidden_size": 128, "num_attention_heads": 4, "num_kv_heads": 2, "new_decoder_architecture": True},
        {"n_embed": 128, "num_attention_heads": 4, "tie_word_embeddings": False, "rope_theta": 500042.0},
        {"num_kv_heads": None, "ffn_hidden_size": None, "eos_token_id": None, "max_position_embeddings": 8192},
        {"multi_query": False, "ffn_hidden_size": 77, "activation": "gelu_new", "layer_norm_epsilon": 1e-3},
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        {"alibi": True, "rope_scaling": None, "bos_token_id": 1, "eos_token_id": [2, 3]},
    ],
    ids=str,
)
def test_config_is_what_transformers_reads(tmp_path, change):
    (tmp_path / "config.json").write_text(json.dumps(BASE | change))
    theirs, ours = AutoConfig.from_pretrained(tmp_path), from_hf(BASE | change)
    assert (ours.hidden_size, ours.num_layers) == (theirs.hidden_size, theirs.num_hidden_layers)
    assert (ours.num_heads, ours.head_dim) == (theirs.num_attention_heads, theirs.head_dim)
    one = theirs.multi_query and not theirs.new_decoder_architecture
    assert ours.num_kv_heads == (1 if one else theirs.num_kv_heads)
    assert (ours.mlp_width, ours.vocab_size) == (theirs.ffn_hidden_size, theirs.vocab_size)
    assert (ours.tied, ours.norm_eps) == (theirs.tie_word_embeddings, theirs.layer_norm_epsilon)
    ends = theirs.eos_token_id
    assert ours.eos_token_ids == (tuple(ends) if isinstance(ends, list) else () if ends is None else (ends,))
    assert ours.bos_token_id == theirs.bos_token_id
    if theirs.alibi:
        assert ours.alibi and ours.rope is None
    else:
        rope = theirs.rope_parameters
        assert (ours.rope.kind, ours.rope.theta) == (rope["rope_type"], rope["rope_theta"])
    assert ours.max_context == theirs.max_position_embeddings * (2 if change.get("rope_scaling") else 1)
    assert ModelConfig.from_json(json.loads(json.dumps(ours.to_json()))) == ours


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["RWForCausalLM"], "model_type": "RefinedWeb"}, "RWForCausalLM.*newest revision.*n_head"),
        ({"n_head": 8}, "n_head: .* calls it num_attention_heads"),
        ({"n_layer": 8}, "n_layer: .* calls it num_hidden_layers"),
        ({"activation": "swiglu"}, "activation: 'swiglu' is not supported"),
        ({"num_attention_heads": 70}, "hidden_size: 4544 is not a multiple of num_attention_heads 70"),
        ({"head_dim": 32}, "head_dim: 32 is not supported; supported: 64"),
        (
            {"new_decoder_architecture": True, "num_kv_heads": 8},
            "num_kv_heads: 8 does not divide num_attention_heads 71",
        ),
        ({"new_decoder_architecture": True, "parallel_attn": False}, "parallel_attn: False .*supported: True"),
        ({"new_decoder_architecture": True, "num_ln_in_parallel_attn": 3}, "num_ln_in_parallel_attn: 3 .*1, 2"),
        ({"num_ln_in_parallel_attn": 2}, "num_ln_in_parallel_attn: 2 .*supported: None, 1"),
        ({"multi_query": False, "num_kv_heads": 1}, "num_kv_heads: 1 is not supported; supported: 71"),
        ({"layer_norm_epsilon": None}, "layer_norm_epsilon: .* found nothing"),
        ({"ffn_hidden_size": 1.5}, "ffn_hidden_size: expected a whole number"),
        ({"rope_scaling": {"type": "su", "factor": 2.0}}, "rope_type: 'su' is not supported"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ],
)
def test_a_config_that_cannot_run_is_refused_by_field(change, message):
    with pytest.raises(ConfigError, match=message):
        from_hf(BASE | change)


@pytest.mark.parametrize("name", ["falcon-7b", "falcon-40b", "falcon-180b"])
def test_published_models_and_the_meshes_that_cut_them(name):
    preset = load_preset(name)
    model = preset.model
    assert count_parameters(model) == preset.parameters
    assert (model.head_dim, model.mlp_width, model.max_context, model.tied) == (64, 4 * model.hidden_size, 2048, True)
    fits = []
    for tensor in range(1, 17):
        try:
            check_model(model, {"stage": 1, "data": 1, "tensor": tensor})
            fits.append(tensor)
        except LayoutError:
            pass
    assert fits == {"falcon-7b": [1], "falcon-40b": [1, 2, 4, 8, 16], "falcon-180b": [1, 2, 4, 8]}[name]


@pytest.mark.skipif(not TOKENIZER.exists(), reason="needs ../shared/data/tokenizers/falcon, which does not ship")
def test_falcons_tokenizer_travels_with_the_checkpoint(tmp_path):
    make_hf_folder(tmp_path / "hf", "falcon", **NEW)
    for file in TOKENIZER.iterdir():
        shutil.copy(file, tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "ckpt", quiet=True)
    shutil.rmtree(tmp_path / "hf")
    tokenizer = load_tokenizer(tmp_path / "ckpt")
    reference = Tokenizer.from_file(str(TOKENIZER / "tokenizer.json"))
    assert (len(tokenizer), tokenizer.eos_token_id) == (65024, 11)
    for line in ("Girafatron is obsessed with giraffes.", "  12,345 naïve\n\tcafés 😀", "", "x = y<|endoftext|>"):
        ids = reference.encode(line).ids
        assert encode(tokenizer, line) == ids  # no token before the text: Falcon was trained without
        assert tokenizer.decode(ids) == line
