"""Logits of converted checkpoints against transformers in float32: every variant of the family, cut in every way."""

import pytest

from model_logits import compare

ROPES = {
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 32},
    "yarn-mscale": {
        "factor": 4.0,
        "original_max_position_embeddings": 32,
        "mscale": 0.7,
        "mscale_all_dim": 1.2,
        "truncate": False,
        "beta_fast": 16,
    },
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "longrope": {
        "factor": 4.0,
        "short_factor": [1.0 + i / 9 for i in range(4)],
        "long_factor": [2.0 + i for i in range(4)],
        "original_max_position_embeddings": 32,
    },
}


@pytest.mark.parametrize(
    "case",
    [
        {"num_attention_heads": 4, "num_key_value_heads": 4},
        {"num_attention_heads": 8, "num_key_value_heads": 2},
        {"num_attention_heads": 4, "num_key_value_heads": 1},
        {"head_dim": 100},
        {"tie_word_embeddings": True},
        {"attention_bias": True, "mlp_bias": True},
        {"hidden_act": "gelu"},
        {"family": "mistral", "sliding_window": None},
        {"family": "mistral", "sliding_window": 20},
        {"family": "qwen2", "tie_word_embeddings": True},
        {"family": "qwen2", "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    ],
    ids=str,
)
def test_variants(tmp_path, case):
    compare(tmp_path, **case)


@pytest.mark.parametrize("kind", ROPES)
def test_rope_scaling(tmp_path, kind):
    shorter = {"max_position_embeddings": 40} if kind == "dynamic" else {}
    parameters = {"rope_type": kind.partition("-")[0], "rope_theta": 10000.0, **ROPES[kind]}
    compare(tmp_path, rope_parameters=parameters, **shorter)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_rope_scaling_within_the_trained_length(tmp_path, kind):
    compare(tmp_path, tokens=30, rope_parameters={"rope_type": kind, "rope_theta": 10000.0, **ROPES[kind]})


@pytest.mark.parametrize("page_size", [4, pytest.param(16, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "chunks", [[16, 16, 16, 16, 6], [15, 1, 1, 15, 38], [17, 47, 6], [1] * 5 + [65]], ids=lambda chunks: str(chunks[:5])
)
def test_chunk_and_page_boundaries(tmp_path, chunks, page_size):
    compare(tmp_path, family="mistral", sliding_window=10, chunks=chunks, page_size=page_size)


@pytest.mark.parametrize(
    "mesh, case",
    [
        ("tensor=2", {}),
        pytest.param("tensor=4", {"num_key_value_heads": 2}, marks=pytest.mark.slow),
        pytest.param(
            "tensor=8",
            {"num_attention_heads": 8, "num_key_value_heads": 1, "attention_bias": True},
            marks=pytest.mark.slow,
        ),
        ("tensor=4,stage=2", {"tie_word_embeddings": True, "mlp_bias": True}),
        pytest.param("stage=3", {}, marks=pytest.mark.slow),
        pytest.param("stage=2,data=2,tensor=2", {"stage_layers": (1, 2), "family": "qwen2"}, marks=pytest.mark.slow),
        pytest.param(
            "stage=2",
            {"family": "qwen2", "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
            marks=pytest.mark.slow,
        ),
    ],
    ids=str,
)
def test_meshes(tmp_path, mesh, case):
    compare(tmp_path, mesh=mesh, chunks=[30, 40], **case)
