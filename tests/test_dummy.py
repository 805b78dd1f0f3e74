"""Random weights in place of a checkpoint's: --random-weights, load_format="dummy"."""

import json

import jax
import numpy as np
import pytest

from convert.dummy import write_dummy
from engine_run import make_engine, run, tokens
from jaxinfer.checkpoint.dummy import random_params
from jaxinfer.checkpoint.files import CheckpointError
from jaxinfer.checkpoint.load import local_piece
from jaxinfer.engine.config import EngineConfig
from jaxinfer.engine.forward import Decoder
from jaxinfer.engine.params import SamplingParams
from jaxinfer.generate import main
from jaxinfer.models.config import ModelConfig
from jaxinfer.parallel.axes import parse_mesh
from jaxinfer.parallel.mesh import make_mesh
from jaxinfer.parallel.placement import Rules, global_shape

TINY = {
    "architectures": ["Qwen2ForCausalLM"],
    "vocab_size": 131,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
}
PROMPTS = {"a": [5, 6, 7], "b": [9] * 20}
GREEDY = SamplingParams(max_new_tokens=8, ignore_eos=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dummy") / "ckpt"
    write_dummy(TINY, folder, "float32")
    return folder


@pytest.mark.slow
def test_every_mesh_runs_the_same_model(folder):
    runs = [
        tokens(run(make_engine(folder, mesh, load_format="dummy", dtype="float32", **cut), PROMPTS, GREEDY))
        for mesh, cut in (("", {}), ("tensor=4", {}), ("stage=2,tensor=2", {"stage_layers": (1, 2)}), ("stage=3", {}))
    ]
    assert [path.name for path in folder.iterdir()] == ["manifest.json"]
    assert all(len(ids) == 8 and max(ids) < 131 for ids in runs[0].values())
    assert runs[0] == runs[1] == runs[2] == runs[3]


@pytest.mark.parametrize(
    "mesh, layers",
    [("tensor=2", (3,)), ("tensor=4", (3,)), ("stage=2,tensor=2", (1, 2)), ("stage=3,data=2", (1, 1, 1))],
)
def test_every_mesh_holds_the_same_numbers(folder, mesh, layers):
    model, rules = ModelConfig.from_json(json.loads((folder / "manifest.json").read_text())["model"]), Rules()
    leaves = {}
    for piece, array in pieces(Decoder(model, (3,)), make_mesh(parse_mesh("")), rules):
        leaves |= {name: view.copy() for name, _, view in piece.views(array)}
    seen = set()
    for piece, array in pieces(Decoder(model, layers), make_mesh(parse_mesh(mesh)), rules):
        for name, index, view in piece.views(array):
            assert np.array_equal(view, leaves[name][index].reshape(view.shape)), (name, index)
            seen.add(name)
    assert seen == leaves.keys() and len(seen) > 30


def pieces(decoder, mesh, rules):
    """Each device's piece of each array, as the loader would read it, with its random numbers."""
    params = random_params(decoder.parameters(), mesh, rules, np.float32, 3)
    coords_of = {device: dict(zip(mesh.shape, where)) for where, device in np.ndenumerate(mesh.devices)}
    declared = jax.tree.leaves(decoder.parameters(), is_leaf=lambda leaf: hasattr(leaf, "leaves"))
    for parameter, array in zip(declared, jax.tree.leaves(params), strict=True):
        for shard in array.addressable_shards:
            piece = local_piece(parameter, rules, mesh.shape, coords_of[shard.device], np.float32)
            found = np.asarray(shard.data)
            yield piece, found if parameter.layers is None else found[0]


def test_arrays_have_their_places_and_no_two_are_the_same(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    decoder, mesh, rules = (
        Decoder(ModelConfig.from_json(manifest["model"]), (2, 1)),
        make_mesh(parse_mesh("stage=2")),
        Rules(),
    )
    told = []
    params = random_params(decoder.parameters(), mesh, rules, np.float16, 3, lambda *each: told.append(each))
    seen = set()
    declared = jax.tree.leaves(decoder.parameters(), is_leaf=lambda leaf: hasattr(leaf, "leaves"))
    for parameter, array in zip(declared, jax.tree.leaves(params), strict=True):
        assert array.shape == global_shape(parameter, rules, mesh.shape) and array.dtype == np.float16
        numbers = np.asarray(array, np.float32)
        if parameter.name.endswith("norm"):
            assert (numbers == 1).all()
            continue
        assert numbers.std() == pytest.approx(0.018, rel=0.25) and abs(numbers.mean()) < 0.01
        first = tuple(numbers.ravel()[:16])
        assert len(set(first)) > 8 and first not in seen
        seen.add(first)
    other = random_params(decoder.parameters(), mesh, rules, np.float16, 4)
    assert not np.array_equal(other["ends"]["embed"], params["ends"]["embed"])
    total = sum(array.nbytes for array in jax.tree.leaves(params))
    assert told[0] == (0, total) and told[-1] == (total, total)


def test_the_numbers_are_the_same_in_every_dtype(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    decoder, mesh = Decoder(ModelConfig.from_json(manifest["model"]), (3,)), make_mesh(parse_mesh("tensor=2"))
    made = [random_params(decoder.parameters(), mesh, Rules(), each) for each in ("float32", "bfloat16", "float16")]
    for exact, *half in zip(*map(jax.tree.leaves, made), strict=True):
        assert exact.dtype == np.float32 and all(each.dtype.itemsize == 2 for each in half)
        assert all((np.asarray(each, np.float32) == np.asarray(exact)).all() for each in half)


def test_the_command(folder, tmp_path, monkeypatch, capsys):
    prompts, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    prompts.write_text('{"prompt_token_ids": [5, 6, 7], "max_new_tokens": 8, "ignore_eos": true}\n')
    options = ("--prompts", prompts, "--output", output, "--random-weights", "--mesh", "")
    options += ("--max-batch", 4, "--prefill-chunk", 32)
    monkeypatch.setattr("sys.argv", ["generate", "--model", str(folder), *map(str, options)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0, capsys.readouterr().err
    assert len(json.loads(output.read_text())["token_ids"]) == 8


def test_what_cannot_be_is_refused(folder, tmp_path):
    with pytest.raises(ValueError, match="load_format: 'random' is not one of checkpoint, dummy"):
        EngineConfig(load_format="random")
    with pytest.raises(CheckpointError, match="holds no weights; legal: --random-weights"):
        make_engine(folder).wait_loaded()
    with pytest.raises(ValueError, match="dtype: 'int8' is not supported; supported: bfloat16, float16, float32"):
        write_dummy(TINY, tmp_path, "int8")
    with pytest.raises(ValueError, match="hidden_size: expected a number above 0, found nothing"):
        write_dummy({name: value for name, value in TINY.items() if name != "hidden_size"}, tmp_path)
    assert not list(tmp_path.iterdir())
