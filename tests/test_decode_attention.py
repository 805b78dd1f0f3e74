"""The decode attention kernel against its plain form: the kernel's own code, interpreted where there is no GPU."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import ON_GPU
from convert.run import convert
from engine_run import make_engine, run, tokens
from hf_models import make_hf_folder
from jaxinfer.engine.device import choose_kernels
from jaxinfer.engine.params import SamplingParams
from jaxinfer.ops.attention import paged_attention
from jaxinfer.ops.decode_attention import decode_attention
from jaxinfer.parallel.axes import LayoutError


def case(seed, batch, kv_heads, group, width, page_size, pages, dtype):
    draw = np.random.default_rng(seed)
    count = batch * pages + 1
    q = jnp.array(draw.normal(size=(batch, 1, kv_heads * group, width)), dtype)
    pools = [jnp.array(draw.normal(size=(count, page_size, kv_heads, width)), dtype) for _ in range(2)]
    tables = jnp.array(draw.permutation(count - 1)[: batch * pages].reshape(batch, pages) + 1, jnp.int32)
    positions = jnp.array(draw.integers(-1, pages * page_size, size=(batch, 1)), jnp.int32)
    return q, *pools, tables, positions


ANY = {
    "seed": st.integers(0, 2**32 - 1),
    "batch": st.integers(1, 4),
    "kv_heads": st.integers(1, 3),
    "group": st.sampled_from([1, 2, 3, 4, 8]),
    "width": st.sampled_from([16, 64, 100, 128, 256]),
    "page_size": st.sampled_from([4, 16]),
    "pages": st.integers(1, 12),
    "window": st.sampled_from([None, 1, 7, 40]),
}


def equals_the_plain_form(window, scale, softcap, **sizes):
    arguments = case(dtype=jnp.float32, **sizes)
    expected = paged_attention(*arguments, window, scale, softcap)
    found = decode_attention(*arguments, window, scale, softcap, interpret=not ON_GPU)
    # on a GPU Triton multiplies float32 in tf32; a large scale makes large scores, and their exponentials round more
    np.testing.assert_allclose(found, expected, atol=2e-3 if ON_GPU else 2e-6 if scale is None else 1e-5)


@pytest.mark.slow
@settings(max_examples=3, deadline=None)
@given(**ANY)
def test_equals_the_plain_form(**drawn):
    equals_the_plain_form(scale=None, softcap=None, **drawn)


@pytest.mark.slow
@settings(max_examples=6, deadline=None)
@given(**ANY, scale=st.sampled_from([None, 0.3]), softcap=st.sampled_from([None, 0.8, 5.0]))
def test_equals_the_plain_form_scaled_and_capped(**drawn):
    equals_the_plain_form(**drawn)


@pytest.mark.parametrize(
    ("group", "width", "window", "scale", "softcap"),
    [(1, 64, 30, 1.0, 2.0), (8, 100, jnp.int32(30), 0.05, None), (8, 128, None, None, 50.0), (1, 256, None, 1.0, 2.0)],
)
def test_scaled_and_capped(group, width, window, scale, softcap):
    """As Gemma 2 does; a low cap is reached."""
    arguments = case(width, 3, 2, group, width, 12, 9, jnp.float32)
    found = decode_attention(*arguments, window, scale, softcap, interpret=not ON_GPU)
    expected = paged_attention(*arguments, window, scale, softcap)
    np.testing.assert_allclose(found, expected, atol=4e-3 if ON_GPU else 2e-5)
    assert softcap != 2.0 or not np.allclose(expected, paged_attention(*arguments, window, scale), atol=0.1)


@pytest.mark.parametrize("group", [1, 4])
def test_bfloat16_is_close_to_float32(group):
    arguments = case(1, 3, 2, group, 128, 16, 20, jnp.bfloat16)
    wide = [each.astype(jnp.float32) if each.dtype == jnp.bfloat16 else each for each in arguments]
    found = decode_attention(*arguments, jnp.int32(200), interpret=not ON_GPU)
    np.testing.assert_allclose(found.astype(jnp.float32), paged_attention(*wide, 200), atol=0.02)


def test_one_part_per_sequence_needs_no_join(monkeypatch):
    monkeypatch.setattr("jaxinfer.ops.decode_attention.PROGRAMS", 1)
    for group, window in ((1, None), (4, 7)):
        arguments = case(2, 3, 2, group, 64, 16, 5, jnp.float32)
        arguments = *arguments[:4], arguments[4].at[0].set(-1)
        found = decode_attention(*arguments, window, interpret=not ON_GPU)
        np.testing.assert_allclose(found, paged_attention(*arguments, window), atol=2e-3 if ON_GPU else 2e-6)


def test_where_kernels_run():
    """Devices as JAX describes them: an H100, a T4, a CPU."""
    hopper, turing, cpu = (SimpleNamespace(device_kind="X", **each) for each in (
        {"compute_capability": "9.0"}, {"compute_capability": "7.5"}, {}))  # fmt: skip
    half, full = jnp.dtype("float16"), jnp.dtype("float32")
    assert [choose_kernels("auto", half, device) for device in (hopper, turing, cpu)] == ["on", "off", "off"]
    assert choose_kernels("auto", full, hopper) == "off"
    assert [choose_kernels("on", half, device) for device in (hopper, cpu)] == ["on", "interpret"]
    assert choose_kernels("off", half, hopper) == "off"
    with pytest.raises(LayoutError, match=r"X has 7\.5; legal here: auto, off"):
        choose_kernels("on", half, turing)


@pytest.mark.slow
@pytest.mark.parametrize("mesh, devices, layers", [("", 1, 2), ("stage=2", 2, 3), ("stage=2,tensor=2", 4, 2)])
def test_engine_with_and_without_kernels(tmp_path, mesh, devices, layers):
    """All kernels of a layer; with three layers one of two stages has an empty slot."""
    if jax.device_count() < devices:
        pytest.skip(f"{mesh} needs {devices} devices, found {jax.device_count()}")
    make_hf_folder(tmp_path / "hf", num_hidden_layers=layers)
    convert(tmp_path / "hf", tmp_path / "ckpt", quiet=True)
    prompts = {str(length): [3 + (7 * i) % 90 for i in range(length)] for length in (1, 20, 45)}
    params = {name: SamplingParams(max_new_tokens=12, ignore_eos=True) for name in prompts}
    found = [tokens(run(make_engine(tmp_path / "ckpt", mesh, kernels=each), prompts, params)) for each in ("on", "off")]
    assert found[0] == found[1]
