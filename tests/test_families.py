"""Every family's weights: whatever files hold them, the same checkpoint; whatever is wrong with them, its name.

That each tensor arrives where it belongs is compared with transformers' modules in the families' own files."""

import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from convert.families import targets
from convert.run import convert
from convert.source import open_source
from converting import as_torch, read_all, refused, rewrite, state_of
from hf_models import make_hf_folder

FAMILIES = {
    "llama": {},
    "qwen3": {"head_dim": 12, "attention_bias": True},
    "gemma2": {"head_dim": 12},
    "phi3": {"pad_token_id": 0},
    "falcon": {"new_decoder_architecture": True, "bias": True},
    "gpt2": {"tie_word_embeddings": False},
    "opt": {"do_layer_norm_before": False, "word_embed_proj_dim": 20},
}
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 123\n"


@pytest.fixture(scope="module", params=FAMILIES)
def made(request, tmp_path_factory):
    """A folder of one file, and its model in float32."""
    folder = tmp_path_factory.mktemp(request.param) / "hf"
    return folder, make_hf_folder(folder, request.param, **FAMILIES[request.param])


@pytest.fixture
def folder(made, tmp_path):
    return shutil.copytree(made[0], tmp_path / "hf")


@pytest.fixture
def shards(made, tmp_path):
    """The same model in several files."""
    folder, model = tmp_path / "shards", made[1]
    model.save_pretrained(folder, max_shard_size=12_000)
    return folder, sorted(folder.glob("*.safetensors"))


@pytest.fixture
def name(made):
    """The tensor that holds layer 1's queries, alone or with the keys and values."""
    table = targets(open_source(made[0]).config)
    return next(name for name, each in table.items() if any(target.leaf == "layers.1.q" for target in each))


def test_the_numbers_are_the_source_rounded(made, folder, tmp_path):
    manifest, _ = convert(folder, tmp_path / "same", verify=True, quiet=True)
    assert manifest.dtype == "float32"
    convert(folder, tmp_path / "rounded", "bfloat16", verify=True, quiet=True)
    same, rounded = read_all(tmp_path / "same"), read_all(tmp_path / "rounded")
    assert same.keys() == rounded.keys()
    for leaf, found in rounded.items():
        assert torch.equal(as_torch(found), as_torch(same[leaf]).bfloat16()), leaf
    # none is lost, none is there twice
    numbers = np.concatenate([each.detach().numpy().ravel() for each in made[1].parameters()])
    assert np.array_equal(np.sort(numbers), np.sort(np.concatenate([each.ravel() for each in same.values()])))


def test_shards_and_bins_make_the_same_checkpoint(folder, shards, tmp_path):
    sharded, files = shards
    assert len(files) > 2
    one = tmp_path / "bin"
    one.mkdir()
    for each in ("config.json", "generation_config.json"):
        shutil.copy(folder / each, one)
    torch.save(load_file(folder / "model.safetensors"), one / "pytorch_model.bin")
    made = [
        convert(source, tmp_path / f"of {source.name}", "bfloat16", quiet=True)[0] for source in (folder, sharded, one)
    ]
    assert made[0].leaves == made[1].leaves == made[2].leaves
    assert made[0].files == made[1].files == made[2].files  # with their checksums
    assert {len(each.sources) for each in made} == {3, 3 + len(files)}


def test_a_missing_tensor(folder, tmp_path, name):
    state = state_of(folder)
    del state[name]
    rewrite(folder, state)
    said = refused(folder, tmp_path, "1 tensors do not fit config.json")
    assert str(folder) in said and f"{name}: missing" in said


def test_a_tensor_of_another_shape(folder, tmp_path, name):
    state = state_of(folder)
    shape = list(state[name].shape)
    rewrite(folder, state | {name: state[name][:-1]})
    said = refused(folder, tmp_path, "1 tensors do not fit config.json")
    assert f"{name}: in model.safetensors, found shape {[shape[0] - 1, shape[1]]}, expected {shape}" in said


def test_a_tensor_that_the_family_does_not_have(made, shards, tmp_path, name):
    folder, files = shards
    extra = name.replace("1", "1.extra")
    save_file(load_file(files[1]) | {extra: torch.ones(2)}, files[1])
    said = refused(folder, tmp_path, "1 tensors do not fit config.json")
    assert f"{extra}: in {files[1].name}, but {type(made[1]).__name__} has no such tensor" in said


def test_a_truncated_file(shards, tmp_path):
    folder, files = shards
    last = max(open_source(folder).tensors.values(), key=lambda each: (each.path == files[1], each.offset))
    files[1].write_bytes(files[1].read_bytes()[:-3])
    said = refused(folder, tmp_path, "truncated")
    assert str(files[1]) in said and f"tensor {last.name} " in said


def test_a_git_lfs_pointer_in_place_of_weights(shards, tmp_path):
    folder, files = shards
    files[1].write_text(LFS)
    assert str(files[1]) in refused(folder, tmp_path, "a git-lfs pointer, not the weights")
