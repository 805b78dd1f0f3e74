"""Weight files: every tensor is read as it is, what is damaged or would run code is refused by name."""

import os
import pickle
import zipfile

import numpy as np
import pytest
import torch

from convert.run import convert
from convert.safetensors_reader import open_safetensors
from convert.tensor import ConvertError, blocks
from convert.torch_reader import open_torch
from converting import DOWN, as_torch, header_entry, read_all, refused, state_of, to_bin, write_safetensors

TWICE = b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, "a": {"dtype": "F32", "shape": [1]}}'


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        ({"a": header_entry(0, 8, [2]), "b": header_entry(4, 12, [2])}, 12, "tensor b .* overlaps tensor a"),
        ({"a": header_entry(0, 8, [2]), "b": header_entry(12, 20, [2])}, 20, "tensor b .* leaves a gap after tensor a"),
        ({"a": header_entry(4, 8, [1])}, 8, "tensor a .* leaves a gap after the header"),
        ({"a": header_entry(0, 8, [2])}, 7, "truncated: .* tensor a ends at byte"),
        (
            {"a": header_entry(0, 8, [2]), "b": header_entry(8, 1 << 60, [1 << 58])},
            8,
            "truncated: .* tensor b|tensor b has",
        ),
        ({"a": header_entry(0, 8, [3])}, 8, r"tensor a has 8 bytes, F32 \[3\] needs 12"),
        ({"a": header_entry(0, 8, [2])}, 9, "1 bytes follow tensor a"),
        ({"a": header_entry(8, 0, [2])}, 8, "tensor a has -8 bytes"),
        ({"a": header_entry(0, 4, [-1, -1])}, 4, "header is damaged: .*whole numbers"),
        ({"a": header_entry(0, 2, [4], "F4")}, 2, "tensor a has the unknown dtype 'F4'"),
        ({"a": {"dtype": "F32", "shape": [1]}}, 4, "header is damaged: tensor a needs a dtype"),
        ({"a": 3}, 4, "header is damaged"),
        ([1, 2], 4, "header is damaged"),
        (b"{", 0, "header is damaged"),
        (TWICE, 8, "listed twice in the header: a"),
    ],
)
def test_damaged_safetensors_are_refused_with_file_and_tensor(tmp_path, header, data, message):
    path = tmp_path / "model-00001-of-00002.safetensors"
    write_safetensors(path, header, bytes(data))
    with pytest.raises(ConvertError, match=message) as error:
        open_safetensors(path)
    assert str(path) in str(error.value)


def test_files_that_are_no_safetensors_are_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 123\n")
    with pytest.raises(ConvertError, match=r"model.safetensors: a git-lfs pointer.*git lfs pull"):
        open_safetensors(path)
    for data, message in ((b"abc", "truncated: 3 bytes"), (b"\xff" * 64, "not a safetensors file")):
        path.write_bytes(data)
        with pytest.raises(ConvertError, match=message):
            open_safetensors(path)
    write_safetensors(path, b"{}", length=1000)
    with pytest.raises(ConvertError, match="truncated: 10 bytes, its header alone needs 1008"):
        open_safetensors(path)


def test_truncated_source_leaves_no_complete_folder(tiny, tmp_path):
    path = tiny / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    refused(tiny, tmp_path, "model.safetensors: truncated: .* tensor")


def read_tensor(tensor):
    return np.concatenate([block for _, block in blocks(tensor)])


def test_bin_tensors_of_any_stride_and_shared_storage(tmp_path):
    base = torch.arange(60, dtype=torch.float32)
    state = {
        "transposed": torch.randn(5, 7).T,
        "middle": base[10:34].view(4, 6),
        "columns": base.view(6, 10)[:, 2:5],
        "spread": torch.ones(1, 3).expand(4, 3),
        "vector": base[3:50:4],
        "parameter": torch.nn.Parameter(torch.randn(2, 3)),
        "half": torch.randn(3, 3).half(),
        "bfloat": torch.randn(3, 3).bfloat16(),
    }
    torch.save(state, tmp_path / "x.bin")
    found = open_torch(tmp_path / "x.bin")
    assert found.keys() == state.keys()
    for name, tensor in state.items():
        assert torch.equal(as_torch(read_tensor(found[name]).copy()), tensor.detach()), name


def test_bin_with_transposed_weights_converts(tiny, tmp_path):
    state = state_of(tiny)
    to_bin(tiny, {name: tensor.T.contiguous().T if tensor.ndim == 2 else tensor for name, tensor in state.items()})
    convert(tiny, tmp_path / "ckpt", verify=True, quiet=True)
    assert np.array_equal(read_all(tmp_path / "ckpt")["layers.0.down"], state[DOWN].numpy())


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("where", ["value", "key", "attribute"])
def test_code_in_a_pickle_is_refused_by_name_and_does_not_run(tiny, tmp_path, where):
    trap = tmp_path / "ran"
    state = dict(state_of(tiny))
    if where == "value":
        state["extra"] = Evil(trap)
    elif where == "key":
        state[Evil(trap)] = torch.ones(1)
    else:
        from collections import OrderedDict

        state = OrderedDict(state)
        state._metadata = Evil(trap)
    to_bin(tiny, state)
    refused(tiny, tmp_path, "pytorch_model.bin: .*it names posix.mkdir.*refused, not run")
    assert not trap.exists()
    torch.load(tiny / "pytorch_model.bin", weights_only=False)
    assert trap.exists()  # the trap was live


@pytest.mark.parametrize(
    "value", [print, torch.nn.Linear(2, 2), torch.float32, {"nested": torch.ones(1)}, 3, torch.FloatStorage]
)
def test_a_pickle_of_anything_but_tensors_is_refused(tmp_path, value):
    torch.save({"weight": value}, tmp_path / "x.bin")
    with pytest.raises(ConvertError, match=r"it names |not a plain state dict") as error:
        open_torch(tmp_path / "x.bin")
    assert "_Storage" not in str(error.value)


def test_other_bin_files_are_refused(tmp_path):
    path = tmp_path / "pytorch_model.bin"

    def refused_as(message):
        with pytest.raises(ConvertError, match=message) as error:
            open_torch(path)
        assert str(path) in str(error.value)

    torch.save({"a": torch.ones(3)}, path, _use_new_zipfile_serialization=False)
    refused_as(r"PyTorch before 1.6 .*torch.save\(torch.load")
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 123\n")
    refused_as("git-lfs pointer")
    path.write_bytes(b"<html>404</html>")
    refused_as("not a PyTorch file: it starts with b'<htm'")
    torch.save(torch.ones(3), path)
    refused_as("not a state dict")
    torch.save({"a": torch.ones(3000)}, path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1000])
    refused_as("truncated or damaged zip")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme", "x")
    refused_as("not a torch.save file: 0 entries")


def _edited_zip(path, change, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path) as archive:
        entries = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in change(entries).items():
            archive.writestr(name, data)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda e: {n: d[:-4] if n.endswith("data/0") else d for n, d in e.items()},
            "tensor a: .* 44 bytes.*expected 48",
        ),
        (lambda e: {n: d for n, d in e.items() if not n.endswith("data/0")}, "tensor a: its storage 0 is not in"),
        (lambda e: e | {next(n for n in e if n.endswith("byteorder")): b"big"}, "big-endian"),
        (lambda e: {n: b"\x80\x02]." if n.endswith("data.pkl") else d for n, d in e.items()}, "holds list"),
        (lambda e: {n: d[:-9] if n.endswith("data.pkl") else d for n, d in e.items()}, "pickle cannot be read"),
    ],
)
def test_damaged_bin_is_refused(tmp_path, change, message):
    torch.save({"a": torch.ones(3, 4)}, tmp_path / "x.bin")
    _edited_zip(tmp_path / "x.bin", change)
    with pytest.raises(ConvertError, match=message):
        open_torch(tmp_path / "x.bin")


def test_compressed_bin_is_refused(tmp_path):
    torch.save({"a": torch.ones(3, 400)}, tmp_path / "x.bin")
    _edited_zip(tmp_path / "x.bin", lambda entries: entries, zipfile.ZIP_DEFLATED)
    with pytest.raises(ConvertError, match=r"data.pkl: expected one stored without compression, found zip method 8"):
        open_torch(tmp_path / "x.bin")


class _Forged:
    """Pickles as a tensor of 12 floats whose shape, strides and offset are as given."""

    def __init__(self, offset, shape, strides):
        self.arguments = offset, shape, strides

    def __reduce__(self):
        return torch._utils._rebuild_tensor_v2, (_Storage(), *self.arguments, False, {})


class _Storage:
    pass


class _Pickler(pickle.Pickler):
    def persistent_id(self, value):
        return ("storage", torch.FloatStorage, "0", "cpu", 12) if isinstance(value, _Storage) else None


@pytest.mark.parametrize(
    ("forged", "message"),
    [
        (_Forged(1, (3, 4), (4, 1)), "reaches element 12 of a storage of 12"),
        (_Forged(0, (3, 4), (1 << 40, 1)), "reaches element"),
        (_Forged(0, (3, 4), (1,)), "pickle cannot be read.*strides"),
        (_Forged(-1, (3, 4), (4, 1)), "pickle cannot be read.*offset"),
        (_Forged(0, "ab", (4, 1)), "pickle cannot be read"),
    ],
)
def test_forged_bin_tensors_cannot_reach_beyond_their_storage(tmp_path, forged, message):
    path = tmp_path / "x.bin"
    torch.save({"a": torch.ones(3, 4)}, path)
    with open(tmp_path / "forged", "wb") as file:
        _Pickler(file, 2).dump({"a": forged})
    data = (tmp_path / "forged").read_bytes()
    _edited_zip(path, lambda entries: {n: data if n.endswith("data.pkl") else d for n, d in entries.items()})
    with pytest.raises(ConvertError, match=message):
        open_torch(path)
