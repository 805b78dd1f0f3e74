"""Several real processes under jax.distributed: the tokens of one process, and each reads its own bytes only."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from convert.run import convert
from hf_models import make_hf_folder
from jaxinfer.checkpoint.manifest import read_manifest
from processes import free_port, own_environment

TESTS = Path(__file__).parent
LAYERS = 4


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distributed")
    make_hf_folder(folder / "hf", num_hidden_layers=LAYERS, num_key_value_heads=4, tie_word_embeddings=False)
    convert(folder / "hf", folder / "ckpt", quiet=True)
    return folder / "ckpt"


def run_processes(checkpoint, count: int, devices: int, mesh: str) -> list[dict]:
    port, environment = free_port(), own_environment(PYTHONPATH=os.pathsep.join([str(TESTS.parent), str(TESTS)]))
    command = [sys.executable, TESTS / "distributed_worker.py", checkpoint, f"127.0.0.1:{port}", str(count)]
    started = [
        subprocess.Popen(
            [*map(str, command), str(index), str(devices), mesh],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(count)
    ]
    results = []
    try:
        for process in started:
            out, err = process.communicate(timeout=300)
            assert process.returncode == 0, err[-3000:]
            results.append(json.loads(out.splitlines()[-1]))
    finally:
        for process in started:
            process.kill()
    return results


@pytest.fixture(scope="module")
def alone(checkpoint):
    return run_processes(checkpoint, 1, 1, "")[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    "count, devices, mesh",
    [
        (2, 1, "stage=2"),
        (2, 1, "tensor=2"),
        (2, 2, "stage=2,tensor=2"),
        (4, 1, "stage=2,tensor=2"),
        (2, 2, "data=2,stage=2"),
    ],
)
def test_processes_agree_and_read_their_own_bytes(checkpoint, alone, count, devices, mesh):
    results = run_processes(checkpoint, count, devices, mesh)
    for result in results:
        assert result["tokens"] == alone["tokens"]
    files = read_manifest(checkpoint).chunks
    whole = sum(entry["bytes"] for entry in files.values())
    norms = sum(entry["bytes"] for name, entry in files.items() if "norm" in name)
    assert alone["read"] == whole
    # all but the norms is cut, and data replicas in one process share a read
    share = (whole - norms) // count
    for result in results:
        assert share <= result["read"] <= share + norms * devices
