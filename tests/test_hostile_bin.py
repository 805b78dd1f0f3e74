""".bin files that are damaged or made to do harm: what is wrong is refused, in little memory, and nothing happens."""

import pickle
import struct
import zipfile

import numpy as np
import pytest
import torch

from convert import torch_reader
from convert.hashing import sha256
from convert.run import convert
from convert.tensor import ConvertError, SourceTensor, blocks
from convert.torch_reader import open_torch
from converting import DOWN, read_all, refused, state_of, to_bin


def _bytes_of(path, entry):
    with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
        info = next(info for info in archive.infolist() if info.filename.endswith(f"/{entry}"))
        file.seek(info.header_offset + 26)
        start = info.header_offset + 30 + sum(struct.unpack("<HH", file.read(4)))
    return start, info.file_size


def _with_pickle(path, data, **entries):
    """A .bin of twelve floats, of storage 0, whose data.pkl holds `data`."""
    floats = np.arange(12, dtype="<f4").tobytes()
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in ({"data.pkl": data, "byteorder": b"little", "data/0": floats} | entries).items():
            archive.writestr(f"x/{name}", content)
    return path


def test_a_flipped_bit_of_the_weights_is_found_in_the_one_reading(tmp_path, tiny):
    state = state_of(tiny)
    to_bin(tiny, state | {"model.layers.0.mlp.up_proj.weight": state["model.layers.0.mlp.up_proj.weight"].T.clone().T})
    path = tiny / "pytorch_model.bin"
    whole = path.read_bytes()
    start, size = _bytes_of(path, "data/3")
    for place in (start, start + size // 2, start + size - 1):
        damaged = bytearray(whole)
        damaged[place] ^= 16
        path.write_bytes(damaged)
        message = refused(tiny, tmp_path, "pytorch_model.bin: damaged: CRC-32 of .*/data/3: found .* download it again")
        assert message.count("\n") == 0
        assert not list((tmp_path / "refused" / "params").glob("*"))  # not one leaf was made of it
    path.write_bytes(whole)
    convert(tiny, tmp_path / "ckpt", quiet=True)
    assert np.array_equal(read_all(tmp_path / "ckpt")["layers.0.down"], state[DOWN].numpy())


@pytest.mark.parametrize("block", [1, 7, 64, 1 << 20])
def test_checksums_do_not_depend_on_how_the_file_is_read(tmp_path, monkeypatch, block):
    monkeypatch.setattr("convert.hashing._BLOCK", block)
    path = tmp_path / "x.bin"
    torch.save({"a": torch.ones(5), "none": torch.ones(0), "b": torch.arange(40)}, path)
    sha256(path)
    with open(path, "r+b") as file:
        start, size = _bytes_of(path, "data/2")
        file.seek(start + size - 1)
        file.write(b"\xff")
    with pytest.raises(ConvertError, match=r"CRC-32 of x/data/2"):
        sha256(path)


def test_a_file_whose_writer_left_the_checksums_out_is_read(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"a": torch.ones(5)}, tmp_path / "x.bin")
    finally:
        torch.serialization.set_crc32_options(True)
    sha256(tmp_path / "x.bin")
    assert next(blocks(open_torch(tmp_path / "x.bin")["a"]))[1].tolist() == [1.0] * 5


class _Storage:
    pass


class _Built:
    """Pickles as a tensor of twelve floats to which pickle's BUILD then gives `state`."""

    def __init__(self, state):
        self.state = state

    def __reduce__(self):
        return torch._utils._rebuild_tensor_v2, (_Storage(), 0, (3, 4), (4, 1), False, {}), self.state


class _Pickler(pickle.Pickler):
    def persistent_id(self, value):
        return ("storage", torch.FloatStorage, "0", "cpu", 12) if isinstance(value, _Storage) else None


def _pickled(folder, value):
    with open(folder / "pickled", "wb") as file:
        _Pickler(file, 2).dump(value)
    return (folder / "pickled").read_bytes()


@pytest.mark.parametrize(
    "state",
    [
        {"strides": (200, -40)},
        {"shape": (1 << 40,), "strides": (0,)},
        {"offset": -(1 << 20)},
        (None, {"strides": (200, -40)}),
        ({"strides": (200, -40)}, {"offset": 9}),
    ],
)
def test_attributes_of_a_tensor_cannot_be_written_once_it_is_checked(tmp_path, state):
    path = _with_pickle(tmp_path / "x.bin", _pickled(tmp_path, {"a": _Built(state)}))
    with pytest.raises(ConvertError, match="pickle cannot be read as plain weights: it sets attributes of what is no"):
        open_torch(path)


# what a pickle can name or make, and BUILD of a state upon it: (pickle before, its name here)
REACHED = {
    "a storage's type": b"ctorch\nFloatStorage\n",
    "a function": b"ctorch._utils\n_rebuild_tensor_v2\n",
    "the dict's constructor": b"ccollections\nOrderedDict\n",
    "a storage": b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x0ctQ",
    "a number": b"K\x01",
    "a text": b"X\x01\x00\x00\x00a",
    "a tuple": b"K\x01\x85",
    "a list": b"]",
}
STATES = (
    b"}X\x08\x00\x00\x00itemsizeK\x01s",
    b"N}X\x0c\x00\x00\x00__defaults__)s\x86",
    b"}X\x05\x00\x00\x00dtypeX\x03\x00\x00\x00F64s",
)


@pytest.mark.parametrize("reached", REACHED)
def test_nothing_that_a_pickle_reaches_is_changed_by_it(tmp_path, reached):
    before = repr(torch_reader._NAMES), torch_reader._rebuild_tensor.__defaults__
    for state in STATES:
        path = _with_pickle(tmp_path / "x.bin", b"\x80\x02}" + REACHED[reached] + state + b"b.")
        with pytest.raises(ConvertError, match="it sets attributes of what is no dict"):
            open_torch(path)
    torch.save({"a": torch.ones(3)}, path)  # a later file of the same process
    assert next(blocks(open_torch(path)["a"]))[1].tolist() == [1.0] * 3
    assert before == (repr(torch_reader._NAMES), torch_reader._rebuild_tensor.__defaults__)


@pytest.mark.parametrize(
    ("shape", "strides", "offset"),
    [((3, 4), (40, -8), 0), ((3, 4), (-4, 1), 0), ((3, 4), (4,), 0), ((3, -4), (1, 3), 0), ((3, 4), (1, 3), -48)],
)
def test_memory_is_touched_within_bounds_whoever_made_the_tensor(tmp_path, shape, strides, offset):
    path = tmp_path / "x"
    path.write_bytes(bytes(1000))
    with pytest.raises(ConvertError, match=r"x: tensor a: offset .*, shape .*, strides .* cannot be"):
        list(blocks(SourceTensor("a", path, "F32", shape, offset, strides)))
    with pytest.raises(ConvertError, match="truncated: tensor a ends beyond the file"):
        list(blocks(SourceTensor("a", path, "F32", (2, 2), 0, (1, 1 << 50))))


PUT_FAR = b"\x80\x02}r\xff\xff\xff\xff."  # the standard library's machine would make room for all below
BOMBS = {
    "a memo of 4 billion": (PUT_FAR, r"holds|cannot be read"),
    "bytes that are not there": (b"\x80\x04\x8e" + b"\xff" * 7 + b"\x7f.", "cannot be read .*: damaged after byte 0"),
    "a number of megabytes": (
        b"\x80\x02}X\x01\x00\x00\x00actorch._utils\n_rebuild_tensor_v2\n(NK\x00(\x8b\x00\x00\x10\x00"
        + b"\x7f" * (1 << 20)
        + b"tK\x01\x85\x89}tRs.",
        "a tensor whose storage",
    ),
    "a key nested 200,000 deep": (b"\x80\x02})" + b"\x85" * 200_000 + b"Ns.", "a key that is no text"),
    "a value nested 200,000 deep": (
        b"\x80\x02}X\x01\x00\x00\x00a)" + b"\x85" * 200_000 + b"s.",
        "'a' is tuple, not a tensor",
    ),
    "a mark too few": (b"\x80\x02}X\x01\x00\x00\x00au.", "damaged: no mark"),
    "more taken than is there": (b"\x80\x02R.", "damaged: an opcode without its operands"),
    "an opcode of old": (b"\x80\x02(i__main__\nA\n.", "it uses INST, which plain weights do not need"),
    "a name by pieces": (b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x02id\x85R.", "names os.system.*refused, not run"),
    "an extension": (b"\x80\x02\x82\x01.", "it uses EXT1"),
    "numbers that count as negated": (
        b"\x80\x02}X\x01\x00\x00\x00actorch._utils\n_rebuild_tensor_v2\n(("
        b"X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x0ctQ"
        b"K\x00K\x01\x85K\x01\x85\x89}}X\x03\x00\x00\x00neg\x88stRs.",
        "numbers mean others",
    ),
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_pickles_that_take_memory_or_time_or_what_is_not_theirs(tmp_path, bomb, little_memory):
    data, message = BOMBS[bomb]
    path = _with_pickle(tmp_path / "x.bin", data)
    if bomb == "a memo of 4 billion":
        assert open_torch(path) == {}
        return
    with pytest.raises(ConvertError, match=message) as error:
        open_torch(path)
    assert len(str(error.value)) < 400


def test_entries_that_inflate_or_are_too_long_are_not_read(tmp_path, little_memory):
    path = tmp_path / "x.bin"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", pickle.dumps({}), zipfile.ZIP_STORED)
        with archive.open("x/byteorder", "w") as file:
            for _ in range(1 << 6):
                file.write(bytes(1 << 20))
    assert path.stat().st_size < 1 << 17
    with pytest.raises(ConvertError, match=r"x/byteorder: expected one stored without compression, found zip method 8"):
        open_torch(path)
    _with_pickle(path, pickle.dumps({}), byteorder=bytes(1000))
    with pytest.raises(ConvertError, match=r"x/byteorder has 1000 bytes: not plain weights"):
        open_torch(path)
    _with_pickle(path, b"]" * (5 << 20) + b".")
    with pytest.raises(ConvertError, match=r"x/data.pkl has 5242881 bytes: not plain weights"):
        open_torch(path)


def test_one_number_repeated_to_terabytes_is_no_tensor(tmp_path):
    path = tmp_path / "x.bin"
    torch.save({"a": torch.ones(1, 1024).expand(1 << 14, 1024)}, path)
    assert open_torch(path)["a"].shape == (1 << 14, 1024)
    torch.save({"a": torch.ones(1, 1024).expand(1 << 22, 1024)}, path)
    with pytest.raises(ConvertError, match="tensor a has 4294967296 elements made of the 1024 of its storage"):
        open_torch(path)


ZIPS = {
    # the directory's fields, by their place in an entry of it (APPNOTE 4.3.12)
    "needs another version": (6, b"\xff\xff", "its directory cannot be read"),
    "encrypted": (8, b"\x01\x08", "expected one stored without compression, found .*flags 0x801"),
    "another method": (10, b"\x63\x00", "expected one stored without compression, found zip method 99"),
    "a size beyond the file": (
        20,
        b"\xff\xff\xff\x7f" * 2,
        "truncated: entry x/.* ends beyond the file|no local header",
    ),
    "somewhere else": (42, b"\x07\x00\x00\x00", "no local header of x/"),
    "a name that is no text": (46, b"\xff\xff", "directory cannot be read|has another name"),
    "the name of another": (46, b"y/", "the local header of y/.* has another name"),
}


@pytest.mark.parametrize("what", ZIPS)
@pytest.mark.parametrize("which", ["first", "last"])
def test_damaged_directories_are_refused_in_our_own_words(tmp_path, what, which):
    path = tmp_path / "x.bin"
    torch.save({"a": torch.ones(5)}, path)
    data = bytearray(path.read_bytes())
    entry = data.index(b"PK\x01\x02") if which == "first" else data.rindex(b"PK\x01\x02")
    place, new, message = ZIPS[what]
    data[entry + place : entry + place + len(new)] = new
    path.write_bytes(data)
    with pytest.raises(ConvertError, match=message) as error:
        open_torch(path)
    assert "codec" not in str(error.value)


def test_two_entries_of_one_name_are_refused(tmp_path):
    path = tmp_path / "x.bin"
    with zipfile.ZipFile(_with_pickle(path, pickle.dumps({})), "a") as archive, pytest.warns(UserWarning):
        archive.writestr("x/data/0", b"other")
    with pytest.raises(ConvertError, match="two entries of one name"):
        open_torch(path)
