"""On real GPUs: JAXINFER_TEST_GPU=1 pytest -m gpu."""

import jax
import pytest

from convert.run import convert
from engine_run import make_engine, run
from greedy_reference import STORIES, equal_to_transformers, story_prompts
from jaxinfer.engine.params import SamplingParams

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("mesh", ["", "tensor=2", "stage=2", "data=2", "stage=2,tensor=2"])
def test_greedy_tokens_in_float32_equal_transformers(tmp_path, mesh):
    needed = 4 if mesh.count("=") == 2 else 2 if mesh else 1
    if jax.device_count() < needed:
        pytest.skip(f"{mesh} needs {needed} GPUs, found {jax.device_count()}")
    convert(STORIES, tmp_path / "ckpt", dtype="float32", quiet=True)
    prompts = story_prompts([1, 17, 100, 300, 600])
    engine = make_engine(tmp_path / "ckpt", mesh, prefill_chunk=256)
    equal_to_transformers(run(engine, prompts, SamplingParams(max_new_tokens=60, ignore_eos=True)), prompts)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_tells_the_same_story_at_first(tmp_path, dtype):
    convert(STORIES, tmp_path / "ckpt", dtype=dtype, quiet=True)
    prompts, params = story_prompts([100]), SamplingParams(max_new_tokens=8, ignore_eos=True, logprobs=0)
    half = run(make_engine(tmp_path / "ckpt", dtype=dtype), prompts, params)["100", 0]
    full = run(make_engine(tmp_path / "ckpt"), prompts, params)["100", 0]
    assert half.logprobs[0].logprob == pytest.approx(full.logprobs[0].logprob, abs=0.1)
