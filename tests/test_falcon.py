"""The Falcon family against transformers: its three blocks and what its config.json may say."""

import pytest

from model_logits import compare

NEW = {"new_decoder_architecture": True}  # 40B, 180B
FALCON2 = NEW | {"num_ln_in_parallel_attn": 1, "tie_word_embeddings": False, "rope_theta": 500042.0}
SMALL = {"num_kv_heads": None}  # 7B
# transformers' eager attention adds alibi twice (to the scores and to the mask), its sdpa once as in training
RW = {"num_kv_heads": None, "multi_query": False, "parallel_attn": False, "bias": True, "alibi": True}
RW |= {"attn_implementation": "sdpa"}


@pytest.mark.parametrize(
    "case",
    [NEW, FALCON2, SMALL, SMALL | {"num_attention_heads": 3, "hidden_size": 30, "bias": True}, RW],
    ids=["40b", "11b", "7b", "7b-odd", "rw"],
)
def test_variants(tmp_path, case):
    compare(tmp_path, family="falcon", **case)
