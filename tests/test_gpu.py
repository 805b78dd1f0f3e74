"""On real GPUs: JAXINFER_TEST_GPU=1 pytest -m gpu."""

import gc
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from convert.dummy import write_dummy
from convert.run import convert
from engine_run import make_engine, run, tokens
from greedy_reference import STORIES, equal_to_transformers, story_prompts
from jaxinfer.cluster.distributed import everyone
from jaxinfer.engine.params import SamplingParams
from jaxinfer.parallel import all_reduce, peer
from jaxinfer.parallel.axes import AXES, parse_mesh
from jaxinfer.parallel.mesh import make_mesh
from jaxinfer.presets import load_preset

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


def greedy(folder, prompts, **settings):
    """Outputs with the two likeliest tokens; the engine is gone afterwards, for the next one needs its memory."""
    engine = make_engine(folder, load_format="dummy", max_context=1088, prefill_chunk=None, **settings)
    outputs = run(engine, prompts, SamplingParams(max_new_tokens=24, ignore_eos=True, logprobs=2))
    del engine
    gc.collect()
    return outputs


def compared(exact, outputs):
    """The noise on the logprobs of exact's likeliest tokens; and where a row chose another token, which ends the
    comparison since both go their own ways from there, the margin between exact's two likeliest."""
    noise, margins = [], []
    for key, row in exact.items():
        for expected, mine in zip(row.logprobs, outputs[key].logprobs, strict=True):
            known = dict(mine.top)
            noise += [known[token] - logprob for token, logprob in expected.top if token in known]
            if mine.token_id != expected.token_id:
                (_, first), (_, second) = expected.top
                margins.append(first - second)
                break
    return noise, margins


def random_prompts(count):
    draw = np.random.default_rng(count)
    return {str(i): draw.integers(0, 128000, 20 + 40 * i).tolist() for i in range(count)}


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """Llama-3.1-8B's shape, with 4 of the 32 layers: they are all alike, and programs of all compile for minutes. The
    checkpoint, prompts, what plain operations say in float32, and their noise in bfloat16."""
    folder = tmp_path_factory.mktemp("llama")
    write_dummy(load_preset("llama-3.1-8b").config | {"num_hidden_layers": 4}, folder)
    prompts = random_prompts(24)
    exact, rounded = (
        greedy(folder, prompts, max_batch=24, kernels="off", dtype=each) for each in ("float32", "bfloat16")
    )
    return folder, prompts, exact, compared(exact, rounded)[0]


@pytest.mark.parametrize(("mesh", "batch"), [("", 1), ("", 3), ("", 24), ("stage=2", 3), ("tensor=2", 3)])
def test_kernels_choose_the_tokens_of_the_plain_operations(reference, mesh, batch):
    """The same numbers in both dtypes: bfloat16 with kernels is hardly noisier than without, and chooses another token
    than float32 only where the two likeliest are as good as equal."""
    if mesh and jax.device_count() < 2:
        pytest.skip(f"{mesh} needs 2 GPUs")
    folder, prompts, exact, plain = reference
    outputs = greedy(folder, prompts, mesh=mesh, max_batch=batch, kernels="on", dtype="bfloat16")
    fused, margins = compared(exact, outputs)
    spread = np.std(plain)
    assert np.std(fused) < 1.5 * spread, f"a noise of {np.std(fused):.4f}, {spread:.4f} without kernels"
    assert max(margins, default=0) < 8 * spread, f"margins {sorted(margins)[-3:]} against a noise of {spread:.4f}"
    # random weights leave the likeliest tokens close: most rows part after a few
    assert min(len(plain), len(fused)) > 4 * len(prompts), "rows that part at once compare nothing"


def test_all_layers_in_one_launch_choose_the_tokens_of_one_by_one(tmp_path):
    """Llama-3.1-8B in its whole depth: 4 rows decode in one launch, 8 layer by layer."""
    write_dummy(load_preset("llama-3.1-8b").config, tmp_path)
    prompts = random_prompts(8)
    several, one = (greedy(tmp_path, prompts, max_batch=each, kernels="on", dtype="bfloat16") for each in (8, 4))
    noise, margins = compared(several, one)
    spread = np.std(noise)
    # logits deviate by 1.15, so that unrelated ones would differ by more than that
    assert spread < 0.15, f"a noise of {spread:.4f}"
    assert max(margins, default=0) < 8 * spread, f"margins {sorted(margins)[-3:]} against a noise of {spread:.4f}"
    assert len(noise) > 4 * len(prompts), "rows that part at once compare nothing"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("kib", [4, 12, 64, 256])
def test_sum_over_peer_memory_equals_psum_on_every_gpu(dtype, kib):
    ranks = max((each for each in peer.RANKS if each <= jax.device_count()), default=1)
    if ranks == 1:
        pytest.skip("needs 2 GPUs")
    mesh = make_mesh(parse_mesh(f"tensor={ranks}"))
    table, reason = peer.connect(mesh, everyone)
    assert table is not None, reason
    x = jax.random.normal(jax.random.key(kib), (ranks, 20, kib * 1024 // jnp.dtype(dtype).itemsize), dtype)

    def sums(x, table):
        def link(before, x):  # one after the other, as the layers of a model have them
            done = all_reduce.peer_sum(x[None] + jnp.where(jnp.isinf(before[0, 0]), 1, 0).astype(x.dtype), table)
            return done, done[0]

        return jax.lax.scan(link, jnp.zeros_like(x[:1, 0]), x[0])[1][None]

    def plain(x):
        return jax.lax.psum(x.astype(jnp.float32), "tensor")

    spec = P("tensor")
    mapped = partial(jax.shard_map, mesh=mesh, out_specs=spec, check_vma=False)
    found = np.asarray(jax.jit(mapped(sums, in_specs=(spec, P(*AXES))))(x, table).astype(jnp.float32))
    wanted = np.asarray(jax.jit(mapped(plain, in_specs=spec))(x))
    assert (found == found[:1]).all()
    bound = 1e-5 if dtype == "float32" else 1e-2
    np.testing.assert_allclose(found, wanted, rtol=bound, atol=bound)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_tokens_are_the_same_with_sums_over_peer_memory(tmp_path, monkeypatch, dtype):
    """Two ranks: there is but one order to add in, so that the bits are the same too."""
    if jax.device_count() < 2:
        pytest.skip("needs 2 GPUs")
    convert(STORIES, tmp_path / "ckpt", dtype=dtype, quiet=True)
    prompts, params = story_prompts([1, 17, 100, 300]), SamplingParams(max_new_tokens=60, ignore_eos=True)

    def found():
        engine = make_engine(tmp_path / "ckpt", "tensor=2", dtype=dtype, kernels="on")
        return tokens(run(engine, prompts, params)), engine.decode_sum

    by_peers, way = found()
    assert way == "peer"
    monkeypatch.setattr("jaxinfer.engine.engine.connect", lambda mesh, everyone: (None, "off"))
    assert found() == (by_peers, "psum: off")
