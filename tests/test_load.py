"""Loading: what a process reads and holds, with any number of threads, and how damage ends it."""

import gc
import threading
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from jaxinfer.checkpoint.files import CheckpointError
from jaxinfer.checkpoint.fill import Piece, fill
from jaxinfer.checkpoint.load import load, local_piece
from jaxinfer.checkpoint.manifest import Manifest
from jaxinfer.checkpoint.reader import BLOCK, Reader
from jaxinfer.checkpoint.writer import chunk_shape, write_leaf
from jaxinfer.engine.config import EngineConfig
from jaxinfer.models.leaves import Leaf
from jaxinfer.parallel.axes import parse_mesh
from jaxinfer.parallel.mesh import make_mesh
from jaxinfer.parallel.placement import Parameter, Rules
from jaxinfer.parallel.stages import balance, slots

THREADS = [1, 3, 8]


def write(folder, leaves, dtype=np.float32):
    """A checkpoint of random numbers without a model: its arrays and a reader."""
    arrays, files, table, rng = {}, {}, {}, np.random.default_rng(0)
    for name, leaf in leaves.items():
        chunks = chunk_shape(leaf.shape, leaf.axes)
        arrays[name] = rng.random(leaf.shape, np.float32).astype(dtype)
        files |= write_leaf(folder / "params", name, arrays[name], chunks)
        table[name] = {"shape": leaf.shape, "dtype": np.dtype(dtype).name, "chunks": chunks}
    return arrays, Reader(folder, Manifest({}, np.dtype(dtype).name, None, table, files, [], {}, "test", 0))


def whole_leaf(reader, name):
    """A piece that is one whole leaf."""
    shape = tuple(reader.manifest.leaves[name]["shape"])
    return Piece(shape, np.dtype(np.float32), len(shape) - 1, ((name, tuple(slice(0, size) for size in shape)),), name)


def drop(piece, array):
    pass


@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.parametrize(
    ("mesh", "heads", "vocabulary"),
    [
        ("", (8, 2), 40),
        ("tensor=2", (8, 2), 43),
        ("stage=2,tensor=4", (8, 2), 43),
        ("data=2,tensor=4", (12, 4), 17),
        ("stage=3", (12, 4), 50),
        ("tensor=8", (8, 2), 3),  # KV heads and vocabulary are too few: replicas, and devices with padding alone
    ],
)
def test_every_device_gets_its_slices_whatever_the_threads(tmp_path, mesh, heads, vocabulary, threads):
    wide, (queries, keys) = 24, heads
    leaves = {"embed": Leaf((vocabulary, wide), ("vocab", "embed")), "norm": Leaf((wide,), ("embed",))}
    leaves["head"] = Leaf((vocabulary, wide), ("vocab", "embed"))
    for layer in range(5):
        leaves[f"layers.{layer}.q"] = Leaf((queries, 5, wide), ("heads", "head_dim", "embed"))
        leaves[f"layers.{layer}.k"] = Leaf((keys, 5, wide), ("kv_heads", "head_dim", "embed"))
        leaves[f"layers.{layer}.o"] = Leaf((wide, queries, 5), ("embed", "heads", "head_dim"))
    arrays, reader = write(tmp_path, leaves)
    rules, mesh = Rules(), make_mesh(parse_mesh(mesh))
    parameters = {name: Parameter(name, ((name, leaf),), len(leaf.shape) - 1) for name, leaf in leaves.items()}
    parameters = {name: parameters[name] for name in ("embed", "norm", "head")}
    for number, layers in enumerate(slots(balance(5, mesh.shape["stage"]))):
        qk = tuple((f"layers.{{}}.{name}", leaves[f"layers.0.{name}"]) for name in "qk")
        parameters[f"qk{number}"] = Parameter("qk", qk, 1, layers)
        parameters[f"o{number}"] = Parameter("o", (("layers.{}.o", leaves["layers.0.o"]),), 2, layers)
    placed = load(reader, parameters, mesh, rules, np.float32, threads)
    coords_of = {device: dict(zip(mesh.shape, where)) for where, device in np.ndenumerate(mesh.devices)}
    for name, parameter in parameters.items():
        for shard in placed[name].addressable_shards:
            piece = local_piece(parameter, rules, mesh.shape, coords_of[shard.device], np.float32)
            expected = np.zeros(piece.shape, np.float32)
            for leaf, index, view in piece.views(expected):
                view[...] = arrays[leaf][index]
            found = np.asarray(shard.data)
            assert np.array_equal(found if parameter.layers is None else found[0], expected), (name, shard.device)
    once = sum(entry["bytes"] for entry in reader.manifest.files.values())
    assert reader.bytes_read == once, "one process has all devices: each file once"


@pytest.fixture(scope="module")
def mlp(tmp_path_factory):
    """Tensor parallelism cuts gate and up by rows, down by columns."""
    leaves = {name: Leaf((4096, 256), ("mlp", "embed")) for name in ("gate", "up")}
    leaves["down"] = Leaf((256, 4096), ("embed", "mlp"))
    parameters = {
        names: Parameter(names, tuple((name, leaves[name]) for name in names.split("+")), 1)
        for names in ("gate+up", "down")
    }
    return parameters, *write(tmp_path_factory.mktemp("load"), leaves)


def shard(arrays, names, own):
    if names == "down":
        return arrays["down"][:, own]
    return np.concatenate([arrays[name][own] for name in names.split("+")])


@pytest.mark.parametrize("names", ["gate+up", "down"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("tensor", [1, 2, 8, 16])
def test_a_device_reads_only_the_chunks_of_its_shard(mlp, tensor, dtype, names):
    parameters, arrays, reader = mlp
    sizes, coords = {"stage": 1, "data": 1, "tensor": tensor}, {"stage": 0, "data": 0, "tensor": tensor - 1}
    piece = local_piece(parameters[names], Rules(), sizes, coords, dtype)
    before, found = reader.bytes_read, []
    fill(reader, [piece], lambda _, array: found.append(array), 3)
    assert reader.bytes_read - before == len(names.split("+")) * max(8 // tensor, 1) * 256 * 512 * 4
    own = slice((tensor - 1) * 4096 // tensor, 4096)
    assert np.array_equal(found[0], shard(arrays, names, own).astype(dtype))


@pytest.mark.parametrize("names", ["gate+up", "down"])
def test_devices_of_one_process_share_a_chunk_file_that_several_need(mlp, names):
    parameters, arrays, reader = mlp
    sizes = {"stage": 1, "data": 1, "tensor": 16}
    all_coords = [{"stage": 0, "data": 0, "tensor": rank} for rank in range(16)]
    pieces = [
        local_piece(parameters[names], Rules(), sizes, coords, np.float32, coords["tensor"]) for coords in all_coords
    ]
    before, found = reader.bytes_read, {}
    fill(reader, pieces, lambda piece, array: found.update({piece.owner: array}), 3)
    assert reader.bytes_read - before == sum(arrays[name].nbytes for name in names.split("+"))
    assert len(found) == 16
    for rank, array in found.items():
        assert np.array_equal(array, shard(arrays, names, slice(rank * 256, rank * 256 + 256)))


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """24 leaves of 2 MiB in 8 chunk files each, and one of 96 MiB with chunks of 12 MiB, cut by columns."""
    leaves = {f"layers.{index:02}": Leaf((128, 4096), ("embed", "mlp")) for index in range(24)}
    leaves["down"] = Leaf((3072, 8192), ("embed", "mlp"))
    return write(tmp_path_factory.mktemp("many"), leaves)[1]


@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.parametrize("held", [0, 9 << 20])
def test_host_memory_is_bounded_whatever_the_threads(many, threads, held):
    chunk, piece = 128 * 512 * 4, 128 * 4096 * 4
    pieces = [whole_leaf(many, name) for name in many.manifest.leaves if name != "down"]
    tracemalloc.start()
    fill(many, pieces, drop, threads, held=held)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < max(held, piece) + threads * chunk + 400_000
    assert peak > max(held, piece) // piece * piece, "else pieces wait for each other"


@pytest.mark.parametrize("threads", THREADS)
def test_beside_a_large_leaf_each_thread_holds_one_block(many, threads):
    piece = whole_leaf(many, "down")
    tracemalloc.start()
    fill(many, [piece], drop, threads)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < piece.nbytes + threads * BLOCK + 400_000


@pytest.mark.parametrize("threads", THREADS)
def test_progress_comes_often_from_the_callers_thread_and_only_grows(many, threads):
    calls, before = [], many.bytes_read

    def loading(done, total):
        assert threading.current_thread() is threading.main_thread()
        calls.append((done, total))

    fill(many, [whole_leaf(many, "down")], drop, threads, loading)
    total = 96 << 20
    assert calls[0] == (0, total) and calls[-1] == (total, total) and {each for _, each in calls} == {total}
    steps = np.diff([done for done, _ in calls])
    assert steps.min() > 0 and steps.max() <= 64 << 20
    assert many.bytes_read - before == total


def damage(path: Path, how: str):
    data = bytearray(path.read_bytes())
    if how == "missing":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(data[:-3])
    elif how == "longer":
        path.write_bytes(data + b"x")
    else:
        data[-1] ^= 1
        path.write_bytes(data)


@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.parametrize("how", ["missing", "truncated", "longer", "changed"])
def test_of_several_damaged_files_the_first_is_named(tmp_path, how, threads):
    leaves = {f"layers.{index}": Leaf((64, 512), ("embed", "mlp")) for index in range(6)}
    _, reader = write(tmp_path, leaves)
    first = tmp_path / "params" / "layers.2" / "0.5"
    damage(first, how)
    damage(tmp_path / "params" / "layers.2" / "0.6", "missing")  # found at once, maybe before the first is read
    damage(tmp_path / "params" / "layers.4" / "0.0", "truncated")
    placed = []
    with pytest.raises(CheckpointError, match=how) as refused:
        fill(
            reader, [whole_leaf(reader, name) for name in leaves], lambda piece, _: placed.append(piece.owner), threads
        )
    assert str(first) in str(refused.value)
    assert "layers.2" not in placed, "a piece with a damaged file must not reach a device"


def loading_threads() -> set[threading.Thread]:
    """Engines of other tests in this process have some too."""
    return {thread for thread in threading.enumerate() if thread.name.startswith("load")}


class Listing(Reader):
    """Says which files it was asked to read."""

    def read_file(self, file, *rest):
        self.asked.append(file)
        super().read_file(file, *rest)


@pytest.mark.parametrize("threads", THREADS)
def test_an_error_in_one_thread_stops_the_others(many, tmp_path, threads):
    reader = Listing(many.folder, many.manifest)
    reader.asked = []
    names, before = [name for name in many.manifest.leaves if name != "down"], loading_threads()

    def place(piece, array):
        if piece.owner == names[1]:
            raise RuntimeError("no memory on the device")

    with pytest.raises(RuntimeError, match="no memory on the device"):
        fill(reader, [whole_leaf(reader, name) for name in names], place, threads)
    # the others stop at their next file, once this process's main thread has had its turn
    assert 16 <= len(reader.asked) <= 128, "of 192"
    assert not loading_threads() - before


def test_an_interrupt_stops_the_threads(many):
    def loading(done, total):
        if done:
            raise KeyboardInterrupt

    reader, before = Listing(many.folder, many.manifest), loading_threads()
    reader.asked = []
    with pytest.raises(KeyboardInterrupt):
        fill(reader, [whole_leaf(reader, name) for name in sorted(many.manifest.leaves)], drop, 2, loading)
    assert len(reader.asked) < 200
    assert not loading_threads() - before


def test_no_file_of_the_checkpoint_is_ever_mapped(many):
    """Mapped pages crawl on parallel file systems; open files show that the look comes at the right time."""
    opened, maps = [], []

    class Looking(Reader):
        def read_file(self, file, leaf, parts, read):
            def look(size):
                maps.append(Path("/proc/self/maps").read_text())
                opened.extend(str(each.readlink()) for each in Path("/proc/self/fd").iterdir() if each.is_symlink())
                read(size)

            super().read_file(file, leaf, parts, look)

    fill(Looking(many.folder, many.manifest), [whole_leaf(many, "down")], drop, 1)
    params = str(many.folder / "params")
    assert any(params in each for each in opened)
    assert not any(params in each for each in maps)


def test_a_cpu_device_takes_the_hosts_array_as_it_is(many):
    parameter = Parameter("down", (("down", Leaf((3072, 8192), ("embed", "mlp"))),), 1)
    tracemalloc.start()
    (array,) = load(many, [parameter], make_mesh(parse_mesh("")), Rules(), np.float32, 2)
    gc.collect()
    kept = tracemalloc.get_traced_memory()[0]  # the host's arrays alone are traced
    tracemalloc.stop()
    assert kept > array.nbytes, "the device has made a copy"


@pytest.mark.parametrize("threads", THREADS)
def test_a_device_that_copies_leaves_nothing_on_the_host(many, threads, monkeypatch):
    monkeypatch.setattr(
        "jaxinfer.checkpoint.fill.Piece.allocate", misaligned
    )  # then a CPU device copies, as a GPU does
    names = ["layers.00", "layers.01", "layers.02", "layers.03", "down"]
    specs = [Leaf(tuple(many.manifest.leaves[name]["shape"]), ("embed", "mlp")) for name in names]
    parameters = [Parameter(name, ((name, spec),), 1) for name, spec in zip(names, specs)]
    mesh = make_mesh(parse_mesh(""))
    gc.collect()
    tracemalloc.start()
    arrays = load(many, parameters, mesh, Rules(), np.float32, threads)
    kept = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert kept < 1 << 20
    assert np.array_equal(arrays[3], many.read("layers.03", (slice(0, 128), slice(0, 4096))))


def misaligned(piece):
    memory = np.zeros(piece.nbytes + 128, np.uint8)
    start = -memory.ctypes.data % 64 + 4
    return memory[start : start + piece.nbytes].view(piece.dtype).reshape(piece.shape)


def test_leaves_that_are_not_the_models_are_refused(many):
    mesh = make_mesh(parse_mesh(""))
    for name, shape, message in (
        ("layers.00", (128, 4095), r"leaf layers.00: found \(128, 4096\), the model has \[128, 4095\]"),
        ("layers.99", (128, 4096), r"leaf layers.99: found none, the model has \[128, 4096\]"),
    ):
        parameter = Parameter(name, ((name, Leaf(shape, ("embed", "mlp"))),), 1)
        with pytest.raises(CheckpointError, match=rf"manifest\.json: damaged, {message}"):
            load(many, [parameter], mesh, Rules(), np.float32)


def test_threads_below_one_are_refused():
    with pytest.raises(ValueError, match="load_threads: 0 is below 1"):
        EngineConfig(load_threads=0)
