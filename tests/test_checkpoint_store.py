"""The checkpoint's files: what is written, what a reader takes from them, and what it refuses."""

import json
import tracemalloc
from itertools import product
from math import ceil, prod

import ml_dtypes
import numpy as np
import pytest
import xxhash

from jaxinfer.checkpoint.files import CheckpointError, describe
from jaxinfer.checkpoint.manifest import Manifest, read_manifest, write_manifest
from jaxinfer.checkpoint.reader import Reader
from jaxinfer.checkpoint.writer import METADATA, chunk_shape, describe_leaf, orbax_metadata, write_leaf


def draw(rng, shape, dtype):
    return rng.standard_normal(shape).astype(dtype)


def make_checkpoint(folder, arrays, chunks):
    files = {}
    for name, array in arrays.items():
        files |= write_leaf(folder / "params", name, array, chunks[name])
    leaves = {
        name: {"shape": list(array.shape), "dtype": array.dtype.name, "chunks": list(chunks[name])}
        for name, array in arrays.items()
    }
    manifest = Manifest({}, "float32", None, leaves, files, [], {}, "test", sum(a.size for a in arrays.values()))
    write_manifest(folder, manifest)
    return folder


def bits(array):
    return np.ascontiguousarray(array).view(np.uint8)


@pytest.mark.parametrize(
    ("shape", "axes", "chunks"),
    [
        ((32000, 3200), ("vocab", "embed"), (4000, 3200)),
        ((32016, 64), ("vocab", "embed"), (4002, 64)),
        ((50257, 64), ("vocab", "embed"), (6283, 64)),  # does not divide: ceil, the last chunk is padded
        ((64, 32, 100), ("embed", "heads", "head_dim"), (64, 4, 100)),
        ((32, 100, 3200), ("heads", "head_dim", "embed"), (4, 100, 3200)),
        ((12, 8, 64), ("heads", "head_dim", "embed"), (3, 8, 64)),
        ((2, 8, 64), ("kv_heads", "head_dim", "embed"), (1, 8, 64)),
        ((7, 8, 64), ("heads", "head_dim", "embed"), (7, 8, 64)),
        ((172, 64), ("mlp", "embed"), (43, 64)),
        ((64, 172), ("embed", "mlp"), (64, 43)),
        ((64,), ("embed",), (64,)),
        ((32, 100), ("heads", "head_dim"), (4, 100)),
    ],
)
def test_chunks_cut_the_axis_of_tensor_parallelism(shape, axes, chunks):
    assert chunk_shape(shape, axes) == chunks


def test_reader_gives_any_slice_and_reads_only_the_chunks_it_touches(tmp_path):
    rng = np.random.default_rng(0)
    arrays, chunks = {}, {}
    for index in range(12):
        shape = tuple(int(size) for size in rng.integers(1, 12, rng.integers(1, 4)))
        chunks[f"layers.{index}.x"] = tuple(int(rng.integers(1, size + 1)) for size in shape)
        dtype = (np.float32, np.float16, ml_dtypes.bfloat16)[index % 3]
        arrays[f"layers.{index}.x"] = draw(rng, shape, dtype)
    reader = Reader(make_checkpoint(tmp_path, arrays, chunks))
    edges = 0
    for name, array in arrays.items():
        for _ in range(25):
            starts = [int(rng.integers(0, size)) for size in array.shape]
            stops = [int(rng.integers(low, size + 1)) for low, size in zip(starts, array.shape)]
            index = tuple(slice(low, high) for low, high in zip(starts, stops))
            before = reader.bytes_read
            part = reader.read(name, index)
            assert part.dtype == array.dtype and part.shape == array[index].shape
            assert np.array_equal(bits(part), bits(array[index]))
            sides = [
                range(low // size, ceil(high / size)) if high > low else ()
                for low, high, size in zip(starts, stops, chunks[name])
            ]
            touched = list(product(*sides))
            assert reader.bytes_read - before == len(touched) * prod(chunks[name]) * array.itemsize
            edges += any((key + 1) * c > s for keys in touched for key, c, s in zip(keys, chunks[name], array.shape))
        whole = reader.read(name, (slice(None),) * array.ndim)
        assert np.array_equal(bits(whole), bits(array))
    assert edges > 20


def test_reader_needs_no_second_copy_of_whole_chunks(tmp_path):
    array = draw(np.random.default_rng(1), (1024, 1024), np.float32)
    chunks = {"rows": (256, 1024), "columns": (1024, 256)}
    reader = Reader(make_checkpoint(tmp_path, {"rows": array, "columns": array}, chunks))
    chunk = 256 * 1024 * 4
    all_ = slice(None)
    cases = [
        ("columns", (all_, slice(256, 512)), chunk),  # exactly one chunk
        ("rows", (slice(0, 512), all_), 2 * chunk),  # whole chunks that follow each other
        ("columns", (all_, slice(0, 512)), 3 * chunk),  # two chunks side by side: one at a time beside the result
    ]
    for name, index, expected in cases:
        tracemalloc.start()
        part = reader.read(name, index)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert np.array_equal(part, array[index])
        assert peak < expected + chunk // 4, (name, index)


def test_reader_of_nothing_and_of_nonsense(tmp_path):
    reader = Reader(make_checkpoint(tmp_path, {"embed": np.ones((10, 4), np.float32)}, {"embed": (2, 4)}))
    assert reader.read("embed", (slice(12, 14), slice(None))).shape == (0, 4)
    assert reader.read("embed", (slice(4, 4), slice(None))).shape == (0, 4)
    assert reader.bytes_read == 0
    with pytest.raises(ValueError, match="step 1"):
        reader.read("embed", (slice(0, 4, 2), slice(None)))
    with pytest.raises(KeyError, match="head"):
        reader.read("head", (slice(None),))


@pytest.mark.parametrize("damage", ["missing", "truncated", "longer", "changed"])
def test_reader_names_the_damaged_file_and_how_it_is_damaged(tmp_path, damage):
    array = draw(np.random.default_rng(2), (16, 4), np.float32)
    reader = Reader(make_checkpoint(tmp_path, {"layers.3.down": array}, {"layers.3.down": (4, 4)}))
    file = tmp_path / "params" / "layers.3.down" / "2.0"
    data = bytearray(file.read_bytes())
    if damage == "missing":
        file.unlink()
    elif damage == "truncated":
        file.write_bytes(data[:-3])
    elif damage == "longer":
        file.write_bytes(data + b"x")
    else:
        data[17] ^= 1
        file.write_bytes(data)
    assert np.array_equal(reader.read("layers.3.down", (slice(0, 8), slice(None))), array[:8])
    with pytest.raises(CheckpointError, match=damage) as refused:
        reader.read("layers.3.down", (slice(8, 9), slice(None)))
    assert str(file) in str(refused.value)


def test_leaf_files_are_what_their_checksums_say_and_replace_older_ones(tmp_path):
    params = tmp_path / "params"
    array = draw(np.random.default_rng(3), (7, 3), np.float32)
    write_leaf(params, "embed", np.zeros((9, 9), np.float32), (1, 9))
    (params / "embed.partial").mkdir()
    (params / "embed.partial" / "left by a crash").write_text("x")
    files = write_leaf(params, "embed", array, (4, 3))
    assert files == describe_leaf("embed", array, (4, 3))
    assert sorted(files) == ["params/embed/0.0", "params/embed/1.0"]
    assert sorted(path.name for path in (params / "embed").iterdir()) == [".zarray", "0.0", "1.0"]
    assert [path.name for path in params.iterdir()] == ["embed"]
    for name, entry in files.items():
        data = (tmp_path / name).read_bytes()
        assert entry == {"bytes": len(data), "xxh3_128": xxhash.xxh3_128_hexdigest(data)}
    padded = np.frombuffer((params / "embed" / "1.0").read_bytes(), np.float32).reshape(4, 3)
    assert np.array_equal(padded, np.concatenate([array[4:], np.zeros((1, 3), np.float32)]))


def test_large_chunks_are_written_in_blocks_without_a_copy(tmp_path):
    # columns of a matrix: blocks of rows are gathered one by one; 24 MB a chunk, 4 MB a block
    array = np.arange(8 * 1024 * 1536, dtype=np.float32).reshape(8192, 1536)
    tracemalloc.start()
    files = write_leaf(tmp_path / "params", "up", array, (8192, 768))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 12 << 20
    for part, name in zip((array[:, :768], array[:, 768:]), sorted(files)):
        assert np.array_equal(np.fromfile(tmp_path / name, np.float32).reshape(part.shape), part)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_orbax_restores_the_parameters_by_itself(tmp_path, dtype):
    ocp = pytest.importorskip("orbax.checkpoint")
    import jax

    rng = np.random.default_rng(4)
    axes = {"embed": ("vocab", "embed"), "norm": ("embed",), "layers.0.q": ("heads", "head_dim", "embed")}
    shapes = {"embed": (13, 6), "norm": (6,), "layers.0.q": (4, 3, 6)}
    arrays = {name: draw(rng, shapes[name], dtype) for name in axes}
    chunks = {name: chunk_shape(shapes[name], axes[name]) for name in axes}
    make_checkpoint(tmp_path, arrays, chunks)
    params = tmp_path / "params"
    (params / METADATA).write_bytes(orbax_metadata(list(arrays)))
    with ocp.PyTreeCheckpointer() as checkpointer:
        alone = checkpointer.restore(params)
    where = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like = {name: jax.ShapeDtypeStruct(each.shape, each.dtype, sharding=where) for name, each in arrays.items()}
    with ocp.StandardCheckpointer() as checkpointer:
        onto_devices = checkpointer.restore(params, like)
    for restored in (alone, onto_devices):
        assert restored.keys() == arrays.keys()
        for name, array in arrays.items():
            found = np.asarray(restored[name])
            assert found.dtype == array.dtype and np.array_equal(bits(found), bits(array)), name
    assert all(isinstance(array, jax.Array) for array in onto_devices.values())


def test_manifest_comes_back_as_written(tmp_path):
    sources, files = {"f": {"bytes": 1, "sha256": "0" * 64}}, {"tokenizer/tokenizer.json": describe(b"{}")}
    manifest = Manifest({"a": [1, None]}, "bfloat16", None, {}, files, ["tokenizer.json"], sources, "1", 7)
    write_manifest(tmp_path, manifest)
    assert read_manifest(tmp_path) == manifest
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: None, "no such checkpoint folder"),
        (lambda folder: (folder / "params").mkdir(parents=True), "incomplete checkpoint"),
        (lambda folder: _file(folder / "config.json", "{}"), "python -m convert --source"),
        (lambda folder: _file(folder / "readme", ""), "not a checkpoint"),
        (lambda folder: _file(folder / "manifest.json", '{"format": 2, "mod'), "manifest.json: damaged, not JSON"),
        (lambda folder: _file(folder / "manifest.json", "[]"), "manifest.json: damaged"),
        (lambda folder: _file(folder / "manifest.json", json.dumps({"format": 3})), "format 3 is newer .*(2)"),
        (
            lambda folder: _file(folder / "manifest.json", json.dumps({"format": 1})),
            "format 1 .* convert the model again",
        ),
        (lambda folder: _file(folder / "manifest.json", json.dumps({"format": 2, "model": {}})), "missing converter, "),
    ],
)
def test_a_folder_that_is_no_complete_checkpoint_is_refused_by_name(tmp_path, make, message):
    folder = tmp_path / "ckpt"
    make(folder)
    with pytest.raises(CheckpointError, match=message) as refused:
        Reader(folder)
    assert str(folder) in str(refused.value)


def _file(path, text):
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
