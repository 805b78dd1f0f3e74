"""What a process holds and reads while it loads."""

import tracemalloc

import numpy as np
import pytest

from jaxinfer.checkpoint.load import local_array
from jaxinfer.checkpoint.manifest import Manifest
from jaxinfer.checkpoint.reader import Reader
from jaxinfer.checkpoint.writer import chunk_shape, write_leaf
from jaxinfer.models.leaves import Leaf
from jaxinfer.parallel.placement import Parameter, Rules

LEAVES = {name: Leaf((256, 4096), ("embed", "mlp")) for name in ("gate", "up")}


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    folder = tmp_path_factory.mktemp("load")
    files, table, rng = {}, {}, np.random.default_rng(0)
    for name, leaf in LEAVES.items():
        chunks = chunk_shape(leaf.shape, leaf.axes)
        files |= write_leaf(folder / "params", name, rng.normal(size=leaf.shape).astype(np.float32), chunks)
        table[name] = {"shape": leaf.shape, "dtype": "float32", "chunks": chunks}
    return Reader(folder, Manifest({}, "float32", None, table, files, [], {}, "test", 0))


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("tensor", [1, 2, 8, 16])
def test_a_shard_is_held_once_and_beside_it_one_chunk(reader, tensor, dtype):
    gate_up = Parameter("gate_up", tuple(LEAVES.items()), 1)
    sizes, coords = {"stage": 1, "data": 1, "tensor": tensor}, {"stage": 0, "data": 0, "tensor": tensor - 1}
    chunk = 256 * 512 * 4
    before = reader.bytes_read
    tracemalloc.start()
    local = local_array(reader.read, gate_up, Rules(), sizes, coords, dtype)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < local.nbytes + chunk + 50_000
    assert reader.bytes_read - before == 2 * max(8 // tensor, 1) * chunk
    own = slice((tensor - 1) * 4096 // tensor, 4096)
    expected = [reader.read(name, (slice(0, 256), own)) for name in LEAVES]
    assert (local == np.concatenate(expected, axis=1).astype(dtype)).all()
