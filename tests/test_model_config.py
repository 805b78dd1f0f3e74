"""Reading config.json: what transformers reads from a file, we read from it too."""

import json

import jax
import numpy as np
import pytest
import torch
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from jaxinfer.checkpoint.files import CheckpointError
from jaxinfer.models.config import ConfigError, ModelConfig, RopeConfig
from jaxinfer.models.families import FAMILIES, from_hf, leaves
from jaxinfer.ops.rope import angles

BASE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
NAMES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM"}
FACTORS = {"short_factor": [1.0 + i / 8 for i in range(8)], "long_factor": [2.0 + i for i in range(8)]}
ROPES = {
    "default": {},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 2.0},
    "dynamic with a field that it must not use": {
        "rope_type": "dynamic",
        "factor": 2,
        "original_max_position_embeddings": 32,
    },
    "yarn": {"factor": 4.0},
    "yarn, all numbers": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "beta_fast": 16,
        "beta_slow": 2,
        "truncate": False,
        "mscale": 1.0,
        "mscale_all_dim": 0.7,
    },
    "yarn, attention factor": {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.3},
    "yarn, factor null": {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 16},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "longrope": {"original_max_position_embeddings": 32, **FACTORS},
    "longrope, factor": {"rope_type": "longrope", "factor": 3.0, "original_max_position_embeddings": 32, **FACTORS},
    "longrope, attention factor": {
        "rope_type": "longrope",
        "attention_factor": 1.2,
        "original_max_position_embeddings": 32,
        **FACTORS,
    },
}


def _spelled(spelling, kind, given, theta):
    """The same rope as a config.json of transformers 5, of 4 ("type") or of 4.43 ("rope_type") would give it."""
    given = {"rope_type": kind, **given}
    if spelling == "rope_parameters":
        return BASE | {"rope_parameters": given | {"rope_theta": theta}}
    if spelling == "type":
        given["type"] = given.pop("rope_type")
    return BASE | {"rope_theta": theta, "rope_scaling": given if kind != "default" else None}


def _read_by_transformers(tmp_path, hf):
    (tmp_path / "config.json").write_text(json.dumps(hf))
    return AutoConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("spelling", ["rope_parameters", "rope_type", "type"])
@pytest.mark.parametrize("case", ROPES)
def test_every_rope_in_every_spelling_turns_as_transformers_does(tmp_path, case, spelling):
    hf = _spelled(spelling, case.split(",")[0].split()[0], ROPES[case], 5000.0)
    theirs = _read_by_transformers(tmp_path, hf)
    ours = from_hf(hf)
    assert ours.rope.kind == theirs.rope_parameters["rope_type"]
    assert ours.rope.theta == theirs.rope_parameters["rope_theta"] == 5000.0
    for length in (20, 90):  # within and beyond the trained context
        positions = np.arange(length)[None]
        rotary = LlamaRotaryEmbedding(theirs)
        expected = rotary(torch.zeros(1), torch.from_numpy(positions))
        found = angles(ours.rope, ours.head_dim, jax.numpy.asarray(positions), jax.numpy.asarray([length]))
        for one, other in zip(found, expected):
            np.testing.assert_allclose(np.asarray(one), other[..., : ours.head_dim // 2].numpy(), atol=3e-5)


def test_where_a_file_has_both_spellings_the_choice_is_transformers(tmp_path):
    hf = BASE | {
        "rope_theta": 700.0,
        "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 900.0},
        "rope_scaling": {"type": "linear", "factor": 4.0},
    }
    theirs, ours = _read_by_transformers(tmp_path, hf).rope_parameters, from_hf(hf).rope
    assert (ours.theta, ours.parameters["factor"]) == (theirs["rope_theta"], theirs["factor"])


def test_trained_length_outside_the_rope_dict_is_the_one_that_counts(tmp_path):
    llama3 = ROPES["llama3"]
    hf = BASE | {"rope_scaling": {"rope_type": "llama3", **llama3}, "original_max_position_embeddings": 16}
    theirs, ours = _read_by_transformers(tmp_path, hf), from_hf(hf).rope
    theirs.standardize_rope_params()  # as its rotary embedding does before it computes anything
    name = "original_max_position_embeddings"
    assert ours.parameters[name] == theirs.rope_parameters[name] == 16


@pytest.mark.parametrize(
    ("rope", "context"),
    [
        (None, 64),
        ({"rope_type": "linear", "factor": 4.0}, 256),
        ({"rope_type": "dynamic", "factor": 2.0}, 128),
        ({"rope_type": "yarn", "factor": 4.0}, 256),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}, 64),
        ({"rope_type": "llama3", **ROPES["llama3"]}, 64),
        ({"rope_type": "longrope", **ROPES["longrope"]}, 64),
    ],
)
def test_context_is_what_the_rope_stretches_to(rope, context):
    assert from_hf(BASE | {"rope_scaling": rope}).max_context == context


@pytest.mark.parametrize(
    ("family", "change"),
    [
        *((family, change) for family in NAMES for change in ({}, {"head_dim": 20}, {"tie_word_embeddings": True})),
        # transformers refuses null for mistral
        *((family, {"num_key_value_heads": None}) for family in ("llama", "qwen2")),
    ],
)
def test_shapes_are_those_of_transformers(tmp_path, family, change):
    hf = BASE | {"architectures": [NAMES[family]], "model_type": family} | change
    theirs, ours = _read_by_transformers(tmp_path, hf), from_hf(hf)
    assert ours.num_kv_heads == theirs.num_key_value_heads
    assert ours.head_dim == (getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads)
    assert ours.tied == theirs.tie_word_embeddings
    assert ours.norm_eps == theirs.rms_norm_eps
    assert ours.activation == theirs.hidden_act
    assert ("head" in leaves(ours)) == (not theirs.tie_word_embeddings)
    assert ("layers.0.q_bias" in leaves(ours)) == (family == "qwen2")


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"sliding_window": None},
        {"sliding_window": 8},
        {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 1},
        {"sliding_window": 8, "use_sliding_window": False, "max_window_layers": 1},
        {"use_sliding_window": True, "max_window_layers": 2},
        {
            "sliding_window": 8,
            "use_sliding_window": True,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ],
)
@pytest.mark.parametrize("family", ["mistral", "qwen2"])
def test_windows_are_those_of_transformers(tmp_path, family, change):
    hf = BASE | {"architectures": [NAMES[family]], "model_type": family} | change
    theirs = _read_by_transformers(tmp_path, hf)
    # a mistral with layer_types is read as ministral, whose layers differ in that alone
    kinds = getattr(theirs, "layer_types", ["sliding_attention"] * 3)
    expected = tuple(theirs.sliding_window if kind == "sliding_attention" else None for kind in kinds)
    assert from_hf(hf).windows == expected


def test_end_tokens_of_the_generation_config_count():
    assert from_hf(BASE).eos_token_ids == (2,)
    assert from_hf(BASE, {"eos_token_id": [5, 6], "temperature": 0.6}).eos_token_ids == (5, 6)
    assert from_hf(BASE, {"eos_token_id": None}).eos_token_ids == (2,)
    assert from_hf(BASE | {"eos_token_id": None}).eos_token_ids == ()


@pytest.mark.parametrize("empty", [None, {}])
def test_no_overrides_per_layer_are_none(empty):
    assert from_hf(BASE | {"per_layer_config": empty}) == from_hf(BASE)


def test_config_survives_json():
    longrope = BASE | {"rope_scaling": {"rope_type": "longrope", **ROPES["longrope"]}}
    for hf in (
        BASE,
        longrope,
        BASE | {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 8},
    ):
        config = from_hf(hf, {"eos_token_id": [3, 4]})
        assert ModelConfig.from_json(json.loads(json.dumps(config.to_json()))) == config


def test_a_manifest_of_another_version_is_refused_by_field():
    written = from_hf(BASE).to_json()
    newer = r"manifest.json: model: (rope: )?unknown field .*'router'.* newer version"
    changes = (
        ({"router": 2}, newer),
        ({"rope": written["rope"] | {"router": 2}}, newer),
        ({"vocab_size": ...}, "manifest.json: damaged, model: missing vocab_size"),
        ({"rope": [1]}, "manifest.json: damaged, model: rope: expected a mapping"),
        ({"windows": ...}, "manifest.json: damaged, model: missing windows"),
    )
    for change, message in changes:
        model = {name: value for name, value in (written | change).items() if value is not ...}
        with pytest.raises(CheckpointError, match=message):
            ModelConfig.from_json(model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["BloomForCausalLM"]}, "architectures: 'BloomForCausalLM' .*LlamaForCausalLM"),
        ({"architectures": None, "model_type": None}, r"architectures: '\(none\)'"),
        ({"architectures": None, "model_type": "bloom"}, "model_type: 'bloom' .*llama, mistral"),
        ({"architectures": None, "model_type": ["llama"]}, "model_type: expected a name .*found \\['llama'\\]"),
        ({"model_type": 5}, "model_type: expected a name .*found 5"),
        ({"hidden_act": "swiglu"}, "hidden_act: 'swiglu' .*silu"),
        ({"vocab_size": None}, "vocab_size: .* found nothing"),
        ({"num_hidden_layers": "3"}, "num_hidden_layers: .* found '3'"),
        ({"num_hidden_layers": 2.5}, "num_hidden_layers: .* found 2.5"),
        ({"hidden_size": -64}, "hidden_size: .* found -64"),
        ({"num_key_value_heads": 3}, "num_key_value_heads: 3 does not divide num_attention_heads 4"),
        ({"hidden_size": 62}, "hidden_size: 62 is not a multiple of num_attention_heads 4"),
        ({"head_dim": 15}, "head_dim: 15 is odd"),
        ({"rope_scaling": {"type": "su", "factor": 2}}, "rope_type: 'su' .*default, linear"),
        ({"rope_scaling": {"rope_type": "linear"}}, "linear rope's factor: .* found nothing"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "yarn rope's factor: .* found nothing"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "llama3 rope's low_freq_factor"),
        ({"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0]}}, "short_factor: .* 8 numbers, found 1 of"),
        (
            {"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0] * 8}},
            "long_factor: .* 8 numbers, found None",
        ),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "one set per layer type"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor: only 1.0"),
        (
            {"architectures": ["MistralForCausalLM"], "model_type": ..., "num_key_value_heads": ...},
            "num_key_value_heads: .* nothing",
        ),
        ({"per_layer_config": {"1": {"sliding_window": 8}}}, "per_layer_config: .*'sliding_window': 8.* not supported"),
    ],
)
def test_a_config_that_cannot_run_is_refused_by_field(change, message):
    hf = {name: value for name, value in (BASE | change).items() if value is not ...}
    with pytest.raises(ConfigError, match=message):
        from_hf(hf)


_LLAMA = BASE | {
    "model_type": ...,
    "head_dim": 16,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "rope_theta": 5000.0,
}
_TYPES = ["sliding_attention", "full_attention", "sliding_attention"]
_BIASES = {"attention_bias": False, "mlp_bias": False}
_QWEN = {"sliding_window": 8, "use_sliding_window": True}
_GEMMA = {"hidden_activation": "gelu_pytorch_tanh", "hidden_act": "gelu_pytorch_tanh", "sliding_window": 8}
_CAPS = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "query_pre_attn_scalar": 16.0}
_NORM = {"layer_norm_epsilon": 1e-5}
_TOKENS = {"vocab_size": 96, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": True}
_SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}
_GPT2 = _TOKENS | _NORM | {"n_inner": 96, "activation_function": "gelu_new", "scale_attn_weights": True}
_FALCON = _TOKENS | _SIZES | _NORM | {"alibi": False, "bias": False, "rope_theta": 5000.0, "activation": "gelu"}
_FALCON |= {"num_kv_heads": 4, "ffn_hidden_size": 96, "parallel_attn": True, "head_dim": 16}
# where every field that is given is one that the family reads
SMALL = {
    "llama": _LLAMA | _BIASES,
    **{
        f"llama, {case}": _LLAMA | {"rope_scaling": {"rope_type": case.split(",")[0], **ROPES[case]}}
        for case in ROPES
        if "not use" not in case
    },
    "llama, transformers 5": _LLAMA
    | {
        "rope_theta": ...,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0, "partial_rotary_factor": 1.0},
    },
    "mistral": _LLAMA | {"architectures": ["MistralForCausalLM"], "sliding_window": 8},
    "qwen2": _LLAMA | _QWEN | {"architectures": ["Qwen2ForCausalLM"], "max_window_layers": 1},
    "qwen3": _LLAMA | _QWEN | {"architectures": ["Qwen3ForCausalLM"], "layer_types": _TYPES, "attention_bias": False},
    "gemma": _LLAMA | _GEMMA | {"architectures": ["GemmaForCausalLM"], "sliding_window": ...},
    "gemma2": _LLAMA
    | _GEMMA
    | _CAPS
    | {"architectures": ["Gemma2ForCausalLM"], "hidden_act": ..., "layer_types": _TYPES},
    "phi3": _LLAMA
    | {"architectures": ["Phi3ForCausalLM"], "sliding_window": 8, "original_max_position_embeddings": 32}
    | {"rope_scaling": {"type": "su", "factor": 3.0, "attention_factor": 1.2, **FACTORS}},
    "falcon": _FALCON
    | {"architectures": ["FalconForCausalLM"], "multi_query": False, "new_decoder_architecture": False},
    "falcon, new": _FALCON
    | {"architectures": ["FalconForCausalLM"], "new_decoder_architecture": True, "num_ln_in_parallel_attn": 2},
    "gpt2": _GPT2 | {"architectures": ["GPT2LMHeadModel"], "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "gpt2, other names": _GPT2 | _SIZES | {"architectures": ["GPT2LMHeadModel"], "add_cross_attention": False},
    "opt": _TOKENS
    | _SIZES
    | {"architectures": ["OPTForCausalLM"], "ffn_dim": 96, "word_embed_proj_dim": 32, "activation_function": "relu"}
    | {"enable_bias": True, "do_layer_norm_before": True, "_remove_final_layer_norm": False},
}
SMALL = {case: {name: value for name, value in hf.items() if value is not ...} for case, hf in SMALL.items()}
VALUES = ("x", [1], {"a": 1}, -1, None, 1.5, True, float("nan"), float("inf"))


def _can_be_meant(name, given, value, in_rope):
    """Whether a file may say `value` for what is `given` here; null is what some fields have, and others refuse."""
    number = isinstance(given, float) or (in_rope and type(given) is int)
    kinds = (int, float) if number else (int, list) if name == "eos_token_id" else (type(given),)
    return value is None or given is None or type(value) in kinds


@pytest.mark.parametrize("case", SMALL)
def test_a_field_of_another_type_is_refused_by_its_name(case):
    """Each field, and each of the rope's own, given each value."""
    hf = SMALL[case]
    from_hf(hf)
    changes = [(name, given, {name: value}, value) for name, given in hf.items() for value in VALUES]
    for outer in ("rope_scaling", "rope_parameters"):
        for name, given in hf.get(outer, {}).items():
            changes += [(name, given, {outer: hf[outer] | {name: value}}, value) for value in VALUES]
    for name, given, change, value in changes:
        try:
            from_hf(hf | change)
        except ConfigError as error:
            assert f"{name}:" in str(error) or value is None, change  # null may be what another field forbids
        except Exception as error:
            pytest.fail(f"{change}: {error!r}")
        else:
            assert _can_be_meant(name, given, value, name not in change), change


@pytest.mark.parametrize("value", ["x", {"a": 1}, 1.5, True, ["x"]])
def test_end_tokens_that_are_none_are_refused(value):
    for hf, generation in ((BASE | {"eos_token_id": value}, {}), (BASE, {"eos_token_id": value})):
        with pytest.raises(ConfigError, match=r"eos_token_id: .* found"):
            from_hf(hf, generation)


KINDS = {name: kinds for each in FAMILIES for name, kinds in each.ARCHITECTURES.items()}


@pytest.mark.parametrize("architecture", KINDS)
def test_a_model_type_that_contradicts_the_architecture_is_refused(architecture):
    """transformers goes by model_type; what it would make of the same file is another model."""
    for kinds in KINDS.values():
        for model_type in (*kinds, f"my-{kinds[0]}", ""):
            if model_type in KINDS[architecture]:
                continue
            with pytest.raises(
                ConfigError, match=f"^model_type: '{model_type}' is not that of .* '{architecture}', which"
            ):
                from_hf(BASE | {"architectures": [architecture], "model_type": model_type})


def test_one_of_model_type_and_architectures_is_enough():
    for architecture, kinds in KINDS.items():
        for kind in kinds:
            assert MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind] == architecture
            hf = BASE | {"head_dim": 16} | {"architectures": [architecture], "model_type": kind}
            both = from_hf(hf)
            assert both.architecture == architecture
            for absent in ({"architectures": None}, {"architectures": []}, {"model_type": None}):
                assert from_hf(hf | absent) == both
            for absent in ("architectures", "model_type"):
                assert from_hf({name: value for name, value in hf.items() if name != absent}) == both


def test_an_architecture_outside_a_list_is_told_to_stand_in_one():
    with pytest.raises(ConfigError, match=r"architectures: expected a list .*found 'LlamaForCausalLM'"):
        from_hf(BASE | {"architectures": "LlamaForCausalLM"})


TRAINED = {"factor": 8.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("kind", "theta", "parameters", "message"),
    [
        ("yarn", 1.0, TRAINED, "rope_theta: found 1.0, legal is other than 1"),
        ("longrope", 1e4, TRAINED | {"original_max_position_embeddings": 1}, "found 1, legal is above 1"),
        ("llama3", 1e4, TRAINED | {"low_freq_factor": 2, "high_freq_factor": 2}, r"above low_freq_factor \(2\)"),
        ("yarn", 1e4, None, "rope's parameters: found None"),
    ],
)
def test_ropes_that_divide_by_zero_are_refused(kind, theta, parameters, message):
    with pytest.raises(ConfigError, match=message):
        RopeConfig(kind, theta, parameters)
