"""After the last layer's attention a prefill tick keeps only the token of each row that is read. Where a prompt's own
logprobs are wanted it keeps all: both must say the same."""

import numpy as np
import pytest

from convert.run import convert
from engine_run import make_engine, run
from hf_models import make_hf_folder
from jaxinfer.engine.params import SamplingParams
from test_falcon import MULTI_QUERY, NEW, ONE_NORM, RW

MODELS = {
    "llama": {},
    "gemma2": {"head_dim": 12},
    "falcon": NEW,
    "falcon, one norm": ONE_NORM,
    "falcon, multi-query": MULTI_QUERY,
    "falcon, one after the other": RW,
    "gpt2": {},
    "opt": {},
    "opt, norms last": {"do_layer_norm_before": False, "word_embed_proj_dim": 20},
}


@pytest.mark.parametrize(
    "name", [name if name == "llama" else pytest.param(name, marks=pytest.mark.slow) for name in MODELS]
)
def test_the_last_token_alone_is_as_among_all(tmp_path, name):
    make_hf_folder(tmp_path / "hf", name.partition(",")[0], **MODELS[name])
    convert(tmp_path / "hf", tmp_path / "ckpt", quiet=True)
    draw = np.random.default_rng(0)
    # one to three ticks, which end at, before and after a chunk's end
    prompts = {str(length): draw.integers(3, 96, length).tolist() for length in (1, 2, 7, 31, 32, 33, 45, 65)}
    engine = make_engine(tmp_path / "ckpt")
    alone, among = (
        run(engine, prompts, SamplingParams(max_new_tokens=2, ignore_eos=True, logprobs=5, prompt_logprobs=wanted))
        for wanted in (None, 0)
    )
    for key, output in alone.items():
        for one, other in zip(output.logprobs, among[key].logprobs, strict=True):
            assert one.token_id == other.token_id
            assert dict(one.top) == pytest.approx(dict(other.top), abs=1e-4)
