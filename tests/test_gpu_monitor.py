"""The monitor on a real GPU: JAXINFER_TEST_GPU=1 pytest -m gpu tests/test_gpu_monitor.py."""

import json
import sys
import time

import jax
import numpy as np
import pytest

from convert.run import convert
from greedy_reference import STORIES
from jaxinfer import generate
from jaxinfer.process.monitor import gpus_on
from jaxinfer.telemetry.energy import Energy
from jaxinfer.telemetry.samples import read_samples

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("monitor")
    convert(STORIES, folder / "ckpt", quiet=True)
    return folder / "ckpt"


def run(monkeypatch, checkpoint, tmp_path, mesh, *more):
    prompts, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    # one at a time, so that the work takes some seconds
    prompts.write_text("".join(f'{{"prompt_token_ids": [1, {3 + place}]}}\n' for place in range(60)))
    arguments = ["--model", checkpoint, "--prompts", prompts, "--output", out, "--mesh", mesh, "--max-batch", 1]
    arguments += ["--max-new-tokens", 400, "--ignore-eos", "--compile-cache", "none", "--warm-up", *more]
    monkeypatch.setattr(sys, "argv", ["generate", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        generate.main()
    assert not ended.value.code
    return json.loads((tmp_path / "out.metrics.json").read_text())


@pytest.mark.parametrize("mesh", ["tensor=1", "stage=2"])
def test_a_run_measures_its_gpus(monkeypatch, checkpoint, tmp_path, mesh):
    count = int(mesh[-1])
    if jax.device_count() < count:
        pytest.skip(f"{mesh} needs {count} GPUs")
    metrics = run(monkeypatch, checkpoint, tmp_path, mesh)
    samples = list(read_samples(tmp_path / "out.gpu.csv"))
    assert not list(tmp_path.glob("out.gpu.rank*"))
    assert len({each.uuid for each in samples}) == len(metrics["gpus"]) == count
    times = [each.time_s for each in samples]
    assert times == sorted(times)
    energy, window = metrics["energy"], metrics["energy"]["window_s"]
    assert window > 2 and energy["output_tokens"] == 60 * 400
    assert energy["gpu_j"] == pytest.approx(sum(gpu["energy_j"] for gpu in metrics["gpus"]))
    assert energy["gpu_j_per_output_token"] == pytest.approx(energy["gpu_j"] / 24000)
    peaks = [each["nvml_peak_bytes"] for each in metrics["memory"][0]["devices"]]
    assert sum(each is not None for each in peaks) == count
    for gpu in metrics["gpus"]:
        assert max(filter(None, peaks)) >= gpu["memory_peak_bytes"], "that is of the window alone"
        assert gpu["samples"] > 5 * window, "ten a second, or half as many on a machine that is busy"
        assert gpu["utilization_percent"]["mean"] > 20 and gpu["memory_peak_bytes"] > 1 << 28
        assert gpu["energy_method"] == "counter" and 20 < gpu["power_w"]["mean"] < 1500
        own = [each for each in samples if each.uuid == gpu["uuid"]]
        # the counter and the power are two instruments
        assert gpu["energy_j"] == pytest.approx(gpu["power_w"]["mean"] * window, rel=0.25)
        middle = own[len(own) // 3].time_s, own[-2].time_s
        integral = Energy(*middle)
        for each in own:
            integral.add(each.time_s, None, each.power_w)
        assert integral.joules()[1] == "integral of power"


def test_monitor_off_leaves_nothing(monkeypatch, checkpoint, tmp_path):
    metrics = run(monkeypatch, checkpoint, tmp_path, "tensor=1", "--monitor", "off")
    assert metrics["gpus"] is None and metrics["energy"] is None and not list(tmp_path.glob("out.gpu*"))


def test_cuda_and_nvml_mean_the_same_gpu():
    """What is copied to a device goes over PCIe to the GPU that NVML has for it."""
    devices, block = jax.local_devices(), np.ones(1 << 28, np.uint8)
    gpus = gpus_on({"stage": 1, "data": 1, "tensor": len(devices)})
    assert [gpu.device for gpu in gpus] == [device.local_hardware_id for device in devices]
    for device, gpu in zip(devices, gpus):
        received, last = 0.0, time.perf_counter()
        gpu.look(last)
        for _ in range(16):
            jax.device_put(block, device).block_until_ready()
            now = time.perf_counter()
            rate = gpu.look(now).get("pcie_rx_bytes_per_s")
            if rate is None:
                pytest.skip("the card or its driver does not count bytes over PCIe")
            received += rate * (now - last)
            last = now
        assert received == pytest.approx(16 << 28, rel=0.3)
