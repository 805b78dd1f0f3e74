"""Logits that are NaN or infinite: the request says so, its neighbours do not notice, and no JSON holds them."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import PartitionSpec as P

from convert.run import convert
from converting import DOWN, EMBED, HEAD, rewrite, state_of
from engine_run import make_engine, run, tokens
from hf_models import make_hf_folder
from jaxinfer import LLM, SamplingParams, generate
from jaxinfer.checkpoint.files import json_bytes
from jaxinfer.engine.emit import _greedy
from jaxinfer.ops.sampling import NON_FINITE, SamplingArrays, sampling_arrays, select
from jaxinfer.outputs import output_line
from jaxinfer.parallel import collectives
from jaxinfer.parallel.axes import parse_mesh
from jaxinfer.parallel.mesh import make_mesh

pytestmark = pytest.mark.slow

UP = DOWN.replace("down", "up")
POISON = 7  # the token whose embedding is NaN
PROMPTS = {"good": [5, 6, 8], "bad": [5, POISON, 8, 9], "short": [12, 13], "long": [11] * 20}
VOCABULARY = 11  # with tensor=2 one id is padding
NEW = 12


def checkpoint(folder, spoil, **config):
    make_hf_folder(folder / "hf", num_hidden_layers=2, tie_word_embeddings=False, **config)
    state = state_of(folder / "hf")
    spoil(state)
    rewrite(folder / "hf", state)
    convert(folder / "hf", folder / "ckpt", quiet=True)
    return folder / "ckpt"


def poison(state):
    state[EMBED][POISON] = torch.nan
    state[HEAD][POISON] = 0  # it is not chosen by itself


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory):
    return checkpoint(tmp_path_factory.mktemp("poisoned"), poison)


def params(**more):
    return SamplingParams(max_new_tokens=NEW, ignore_eos=True, **more)


# a page holds a whole context: whoever gets that of the poisoned request has NaN beyond its own tokens
@pytest.mark.parametrize(
    ("mesh", "temperature"), [("", 0), pytest.param("stage=2,tensor=2", 0.9, marks=pytest.mark.slow)]
)
def test_a_request_with_nan_ends_and_spares_the_others(poisoned, mesh, temperature):
    free = params(temperature=temperature, seed=1, logit_bias={POISON: -100} if temperature else None)
    forced = params(logit_bias={POISON: 100}, logprobs=3)
    prompts = PROMPTS | {"forced": [5, 6]}
    engine = make_engine(poisoned, mesh, max_batch=2, page_size=36, pages=3, max_context=36)
    found = run(engine, prompts, {name: forced if name == "forced" else free for name in prompts})
    bad, forced = found.pop(("bad", 0)), found.pop(("forced", 0))
    assert (bad.finish_reason, bad.token_ids) == ("error", [])
    assert bad.error.startswith("non-finite logits (NaN or infinite) at new token 1 (prefill), in float32: ")
    assert output_line(bad) == {"id": "bad", "index": 0, "error": bad.error}
    # its first token is fed at the next step; what was before it stays
    assert (forced.finish_reason, forced.token_ids, len(forced.logprobs)) == ("error", [POISON], 1)
    assert "at new token 2 (decode), in float32" in forced.error
    assert {output.finish_reason for output in found.values()} == {"length"}
    again = run(engine, {name: PROMPTS[name] for name, _ in found}, free)
    assert tokens(found) == tokens(again)


# 2 rows decode in one launch, 8 layer by layer
@pytest.mark.gpu
@pytest.mark.parametrize("batch", [2, 8])
def test_nor_do_kernels_hand_nan_on(tmp_path, batch):
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
    folder = checkpoint(tmp_path, poison, **sizes)
    settings = {"max_batch": batch, "page_size": 32, "pages": batch + 1, "max_context": 32, "decode_steps": 4}
    engine = make_engine(folder, dtype="bfloat16", kernels="on", **settings)
    prompts = {f"{name} {i}": prompt for i in range(4) for name, prompt in PROMPTS.items()}
    asked = params(logit_bias={POISON: -100})
    found = run(engine, prompts, asked)
    reasons = {name: output.finish_reason for (name, _), output in found.items()}
    assert reasons == {name: "error" if name.startswith("bad") else "length" for name in prompts}


@pytest.mark.parametrize("tensor", [1, 2])
def test_one_wrong_logit_is_enough(tensor):
    logits = np.random.default_rng(0).normal(size=(6, VOCABULARY + 1)).astype(np.float32)
    logits[:, -1] = -np.inf  # padding
    logits[1, 9], logits[2, 3], logits[3], logits[4, 2] = np.nan, np.inf, -np.inf, -np.inf
    expected = [int(row.argmax()) for row in logits]
    expected[1:4] = [NON_FINITE] * 3
    arrays = sampling_arrays((6,))
    arrays.temperature[::2] = 1e-6  # draws the likeliest

    def both(logits):
        own = jax.tree.map(collectives.own_rows, (drawn, zeros))
        rows = select(collectives.rows_for_columns(logits), *own)
        return _greedy(logits), collectives.all_rows(rows, 6)

    drawn, zeros = SamplingArrays(*map(jnp.asarray, arrays)), jnp.zeros(6, jnp.int32)
    mesh = make_mesh(parse_mesh(f"tensor={tensor}"))
    mapped = jax.shard_map(both, mesh=mesh, in_specs=P(None, "tensor"), out_specs=P(), check_vma=False)
    for found in jax.jit(mapped)(logits):
        assert found.tolist() == expected


def test_likeliest_tokens_are_of_the_vocabulary(tmp_path):
    folder = checkpoint(tmp_path, lambda state: None, vocab_size=VOCABULARY)
    asked = params(logprobs=20, prompt_logprobs=20)
    output = run(make_engine(folder, "tensor=2"), {"x": [5, 6, 7]}, asked)["x", 0]
    for entry in output.prompt_logprobs[1:] + output.logprobs:
        assert sorted(token for token, _ in entry.top) == list(range(VOCABULARY))
        assert json.dumps(entry.to_json(), allow_nan=False)


@pytest.fixture(scope="module")
def overflowing(tmp_path_factory):
    """In float16 one layer's output exceeds 65,504; in float32 all is well."""

    def spoil(state):
        for name in (UP, DOWN):
            state[name] *= 3e3

    return checkpoint(tmp_path_factory.mktemp("overflow"), spoil)


@pytest.mark.slow
def test_float16_that_overflows_says_what_to_try(overflowing):
    llm = LLM(overflowing, dtype="float16", cpu_devices=8, max_batch=2, prefill_chunk=32)
    with pytest.warns(UserWarning, match="2 samples ended with an error, the first with non-finite logits"):
        first, _ = llm.generate([[5, 6, 8], [5, 6]], params())
    assert first.finish_reason == "error" and first.token_ids == []
    assert "in float16: numbers above 65,504 overflow: try dtype bfloat16 or float32" in first.error
    message = r"text 0: non-finite logits \(NaN or infinite\) at prompt token 1 \(prefill\), in float16"
    with pytest.raises(FloatingPointError, match=message):
        llm.score([[5, 6, 8]])


def strict(line):
    def refuse(word):
        raise ValueError(f"{word} is no JSON")

    return json.loads(line, parse_constant=refuse)


def command(monkeypatch, capsys, *arguments):
    """Status and standard error; JAX starts with the tests' own devices."""
    monkeypatch.setattr("sys.argv", ["generate", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        generate.main()
    return ended.value.code, " ".join(capsys.readouterr().err.split())


def test_the_command_writes_error_records_and_counts_them(poisoned, tmp_path, monkeypatch, capsys):
    prompts, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    lines = [{"id": name, "prompt_token_ids": prompt} for name, prompt in PROMPTS.items()]
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    small = "--max-batch", 4, "--prefill-chunk", 32, "--decode-steps", 4, "--max-new-tokens", NEW
    arguments = "--model", poisoned, "--output", out, "--ignore-eos", *small
    status, said = command(monkeypatch, capsys, *arguments, "--prompts", prompts)
    assert status == 0 and "failed" in said and "1 samples: non-finite logits" in said
    assert "WARNING: 1 of 4 samples ended with an error; id 'bad', index 0: non-finite logits" in said
    found = {line["id"]: line for line in map(strict, out.read_text().splitlines())}
    assert sorted(found) == sorted(PROMPTS) and list(found["bad"]) == ["id", "index", "error"]
    assert strict((tmp_path / "out.metrics.json").read_text())["failed"] == 1
    # once more: what is finished stays as it was, the error is tried again; nothing else is there to run
    status, said = command(monkeypatch, capsys, *arguments, "--prompts", prompts)
    assert status == 2 and "error: 1 of 1 samples ended with an error; id 'bad'" in said
    again = {line["id"]: line for line in map(strict, out.read_text().splitlines())}
    assert again == found


def test_json_has_no_word_for_nan():
    data = {"a": [1.5, float("nan"), {"b": float("-inf")}], "c": ("é", 2, None)}
    assert json_bytes(data) == '{"a": [1.5, null, {"b": null}], "c": ["é", 2, null]}\n'.encode()
