"""The doctor on one node: its GPUs, driver, plugins, memory, container, folders and checkpoint."""

import json
import os
import threading
from pathlib import Path

import pytest

from convert.run import convert
from doctoring import gpu, levels
from jaxinfer.cluster.visible import visible_devices
from jaxinfer.doctor.cuda import platform_findings, plugin_findings
from jaxinfer.doctor.files import check_checkpoint, check_folder, file_system
from jaxinfer.doctor.finding import Report, bounded, ok
from jaxinfer.doctor.gpus import _select, gpu_findings
from jaxinfer.doctor.host import container, memory_limit


def test_a_gpu_with_troubles():
    assert [line.level for line in gpu_findings([gpu()], [0])] == ["ok", "ok"]
    troubled = gpu(
        free=100 << 30, processes=[[os.getpid(), 40 << 30]], ecc=2, mig=True, capability=[7, 5], pcie=[4, 8, 16]
    )
    lines = gpu_findings([gpu(), troubled | {"peers": {"0": "NVLink"}}], [1])
    assert levels(lines) == ["ok", "ok", "warning", "error", "warning", "warning", "warning", "ok"]
    assert f"pid {os.getpid()} (" in lines[2].text and "40.0 GiB" in lines[2].text
    assert gpu_findings([gpu()], [0, 1])[0].level == "error"
    unknown = gpu(total=None, free=None, capability=[0, 0], pcie=[0, 0, 0])
    assert [line.level for line in gpu_findings([unknown], [0])] == ["ok", "ok"]


def test_cuda_visible_devices():
    gpus = [gpu(0), gpu(1), gpu(2)]

    def shown(visible: str | None) -> list[int]:
        names = visible_devices({} if visible is None else {"CUDA_VISIBLE_DEVICES": visible})
        return [each["index"] for each in _select(gpus, names)]

    assert shown(None) == [0, 1, 2] and shown("2,0") == [2, 0] and shown("GPU-1") == [1] and shown("") == []
    assert shown("1,7,0") == shown("1,-1,0") == [1] and shown("GPU-1,GPU-1") == []  # as CUDA does


@pytest.mark.parametrize(
    "plugins, driver, level, text",
    [
        ({"12": "0.10.2"}, 12, "ok", "fits"),
        ({"12": "0.10.2"}, 13, "ok", "fits"),
        ({"13": "0.10.2.post1"}, 13, "ok", "fits"),
        ({"13": "0.10.2"}, 12, "error", "needs a driver for CUDA 13 (580"),
        ({"12": "0.10.1"}, 12, "error", "refuses the plugin"),
        ({}, 13, "error", "no CUDA plugin"),
        ({"12": "0.10.2", "13": "0.10.2"}, 13, "warning", "both installed"),
    ],
)
def test_plugin(plugins, driver, level, text):
    (line,) = plugin_findings(plugins, "0.10.2", driver)
    assert line.level == level and text in line.text


def test_platform():
    assert platform_findings("", 2) == platform_findings("", 0) == platform_findings("cpu", 0) == []
    assert platform_findings("cuda", 0)[0].level == "error" and platform_findings("cpu", 2)[0].level == "warning"


def test_memory_limit(tmp_path):
    groups = tmp_path / "cgroup"
    groups.write_text("0::/slurm/job_7/step_0\n")
    step = tmp_path / "v2" / "slurm" / "job_7" / "step_0"
    step.mkdir(parents=True)
    (step / "memory.max").write_text("max\n")
    assert memory_limit(tmp_path / "v2", groups) is None
    (step.parent / "memory.max").write_text("4000\n")
    assert memory_limit(tmp_path / "v2", groups) == 4000
    groups.write_text("5:cpu,cpuacct:/x\n4:memory:/outside/the/container\n0::/\n")
    (tmp_path / "v1" / "memory").mkdir(parents=True)
    limit = tmp_path / "v1" / "memory" / "memory.limit_in_bytes"
    limit.write_text("9223372036854771712\n")
    assert memory_limit(tmp_path / "v1", groups) is None
    limit.write_text("5000\n")
    assert memory_limit(tmp_path / "v1", groups) == 5000


def test_container(tmp_path):
    assert container({}, tmp_path) == ""
    assert container({"APPTAINER_CONTAINER": "x.sif"}, tmp_path) == "Apptainer"
    (tmp_path / ".dockerenv").touch()
    assert container({}, tmp_path) == "Docker"
    (tmp_path / ".singularity.d").mkdir()
    assert container({}, tmp_path) == "Apptainer"


def test_file_system(tmp_path):
    mounts = tmp_path / "mounts"
    mounts.write_text(f"a / ext4 rw 0 0\nb {tmp_path}/a\\040b lustre rw 0 0\nc {tmp_path}/a\\040b/é tmpfs rw 0 0\n")
    assert file_system(tmp_path / "a", mounts) == "ext4"
    assert file_system(tmp_path / "a b" / "x", mounts) == "lustre"
    assert file_system(tmp_path / "a b" / "é" / "x", mounts) == "tmpfs"


def test_folders(tmp_path):
    (line,) = check_folder("output", tmp_path)
    assert line.level == "ok" and list(tmp_path.iterdir()) == []
    (line,) = check_folder("output", tmp_path / "later" / "on")
    assert line.level == "ok" and "not there yet" in line.text
    (tmp_path / "file").touch()
    assert check_folder("output", tmp_path / "file")[0].level == "error"
    (line,) = check_folder("output", Path("/proc"))
    assert line.level == "error" and "cannot be written" in line.text


def test_checkpoint(tiny, tmp_path):
    checkpoint = tmp_path / "ckpt"
    convert(tiny, checkpoint, quiet=True)
    (line,), facts = check_checkpoint(checkpoint, 1, 2, 1 << 30)
    assert line.level == "ok" and facts["read_bytes_per_s"] > 0 and len(facts["manifest"]) == 64
    (line,), facts = check_checkpoint(tmp_path / "none", 0, 1, 1 << 30)
    assert line.level == "error" and "no such checkpoint folder" in line.text and facts == {"manifest": None}
    for path in (checkpoint / "tokenizer" / "more.json", checkpoint / "manifest.json"):
        before = path.read_bytes() if path.exists() else None
        path.parent.mkdir(exist_ok=True)
        path.write_bytes((before or b"").replace(b"float32", b"float16"))
        (line,), _ = check_checkpoint(checkpoint, 0, 1, 1 << 30)
        assert line.level == "error" and str(path) in line.text and line.fix == "copy it again, or convert again"
        path.unlink() if before is None else path.write_bytes(before)
    names = json.loads((checkpoint / "manifest.json").read_text())["files"]
    largest = checkpoint / max(names, key=lambda name: names[name]["bytes"])
    os.truncate(largest, 5)
    (line,), _ = check_checkpoint(checkpoint, 0, 1, 1 << 30)
    assert line.level == "error" and f"{largest}: 5 bytes, expected" in line.text
    largest.unlink()
    (line,), _ = check_checkpoint(checkpoint, 0, 1, 1 << 30)
    assert line.level == "error" and f"{largest}: No such file" in line.text


def test_a_check_that_hangs_or_breaks_is_an_error():
    report, never = Report(0, "a"), threading.Event()
    bounded(report, "x", lambda: (never.wait(), ([], {}))[1], 0.1)
    bounded(report, "y", lambda: 1 // 0, 5)
    bounded(report, "z", lambda: ([ok("z", "fine")], {"n": 1}), 5)
    never.set()
    assert [(line.level, line.name) for line in report.findings] == [("error", "x"), ("error", "y"), ("ok", "z")]
    assert "did not return" in report.findings[0].text and "ZeroDivisionError" in report.findings[1].text
