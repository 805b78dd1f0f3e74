"""Qwen3, Gemma 1 and 2 and Phi-3 against transformers: what they add to LLaMA's layer, cut in every way."""

import pytest
import torch

from convert.run import convert
from engine_run import make_engine, run, tokens
from greedy_reference import agree_up_to_ties
from hf_models import make_hf_folder
from jaxinfer.engine.params import SamplingParams
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
        ("tensor=2", QWEN3),
        ("tensor=4,stage=2", QWEN3 | {"attention_bias": True}),  # two KV heads for four
        ("tensor=2,stage=2", GEMMA2),
        # in a slot, one stage has a window and the other has none, or no layer
        ("stage=2", GEMMA2 | LATE),
        ("stage=2", GEMMA2 | {"stage_layers": (1, 2)}),
        ("tensor=2,stage=3", PHI3 | {"sliding_window": 10}),
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
@pytest.mark.parametrize("mesh", ["", "stage=2,tensor=2"])
@pytest.mark.parametrize("case", [QWEN3, GEMMA, GEMMA2, PHI3 | {"sliding_window": 10}], ids=lambda case: case["family"])
def test_greedy_tokens_are_those_of_transformers(tmp_path, case, mesh):
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
@pytest.mark.parametrize(
    "mesh, case", [("", QWEN3), ("", GEMMA), ("stage=2", GEMMA2 | LATE | {"num_hidden_layers": 3})], ids=str
)
def test_kernels_give_the_same_tokens(tmp_path, mesh, case):
    made(tmp_path, **case)
    assert greedy(tmp_path / "ckpt", mesh, kernels="on") == greedy(tmp_path / "ckpt", mesh, kernels="off")
