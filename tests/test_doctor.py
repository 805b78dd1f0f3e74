"""The doctor: what it makes of reports, logs and folders; whole runs of several processes, with something wrong."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from convert.run import convert
from hf_models import make_hf_folder
from jaxinfer.cluster.fabric import infiniband_ports, parse_nccl
from jaxinfer.cluster.gather import meet
from jaxinfer.cluster.launch import Launch
from jaxinfer.cluster.slurm import ClusterError
from jaxinfer.doctor import compare
from jaxinfer.doctor.cuda import platform_findings, plugin_findings
from jaxinfer.doctor.files import check_checkpoint, check_folder, file_system
from jaxinfer.doctor.finding import Report, bounded, error, ok
from jaxinfer.doctor.gpus import _select, gpu_findings
from jaxinfer.doctor.host import container, memory_limit
from jaxinfer.doctor.judge import collective_findings, transport_findings
from jaxinfer.doctor.show import merge

ROOT = Path(__file__).parents[1]
NODE = """\
gpu07:4100:4100 [0] NCCL INFO Bootstrap: Using eno1:10.1.0.7<0>
gpu07:4100:4100 [0] NCCL INFO cudaDriverVersion 12080
NCCL version 2.27.5+cuda12.9
gpu07:4100:4171 [0] NCCL INFO Failed to open libibverbs.so[.1]
gpu07:4100:4171 [0] NCCL INFO NET/Socket : Using [0]eno1:10.1.0.7<0> [1]ib0:10.2.0.7<0>
gpu07:4100:4171 [0] NCCL INFO Initialized NET plugin Socket
gpu07:4100:4171 [0] NCCL INFO Using network Socket
gpu07:4100:4171 [0] NCCL INFO NVLS multicast support is available on dev 0 (NVLS_NCHANNELS 16)
gpu07:4100:4171 [0] NCCL INFO comm 0x5581 rank 0 nRanks 4 nNodes 1 localRanks 4 localRank 0 MNNVL 0
gpu07:4100:4171 [0] NCCL INFO Channel 00/0 : 0[0] -> 1[1] via P2P/CUMEM
gpu07:4100:4171 [0] NCCL INFO Channel 01/0 : 0[0] -> 1[1] via P2P/CUMEM
gpu07:4100:4171 [0] NCCL INFO Connected all rings, use ring PXN 0 GDR 1
gpu07:4100:4171 [0] NCCL INFO 24 coll channels, 24 collnet channels, 16 nvls channels, 32 p2p channels, 32 per peer
"""
INFINIBAND = """\
n1:88:88 [0] NCCL INFO NCCL_IB_HCA set by environment to mlx5.
n1:88:121 [0] NCCL INFO NET/IB : Using [0]mlx5_0:1/IB [1]mlx5_1:1/RoCE [RO]; OOB ib0:10.2.0.1<0>
n1:88:121 [0] NCCL INFO Using network IB
n1:88:121 [0] NCCL INFO comm 0x77 rank 0 nRanks 8 nNodes 2 localRanks 4 localRank 0 MNNVL 0
n1:88:121 [0] NCCL INFO Channel 00/0 : 7[3] -> 0[0] [receive] via NET/IB/0/GDRDMA
n1:88:121 [0] NCCL INFO Channel 00/0 : 0[0] -> 4[0] [send] via NET/IB/1(3)/GDRDMA
n1:88:121 [0] NCCL INFO Channel 00/0 : 0[0] -> 1[1] via P2P/IPC
"""
SOCKETS = """\
n1:88:121 [0] NCCL INFO NET/IB : No device found.
n1:88:121 [0] NCCL INFO NET/IB : Using [RO]; OOB eth0:10.0.0.1<0>
n1:88:121 [0] NCCL INFO NET/Socket : Using [0]eth0:10.0.0.1<0>
n1:88:121 [0] NCCL INFO Using network Socket
n1:88:121 [0] NCCL INFO comm 0x77 rank 0 nRanks 2 nNodes 2 localRanks 1 localRank 0 MNNVL 0
n1:88:121 [0] NCCL INFO Channel 00/0 : 1[0] -> 0[0] [receive] via NET/Socket/0
n1:88:121 [0] NCCL INFO Channel 00/0 : 0[0] -> 1[0] [send] via NET/Socket/0
"""
SHARED = """\
n1:5:9 [0] NCCL INFO NCCL_P2P_DISABLE set by environment to 1.
n1:5:9 [0] NCCL INFO NCCL_NVLS_ENABLE set by environment to 0.
n1:5:9 [0] NCCL INFO comm 0x1 rank 0 nRanks 2 nNodes 1 localRanks 2 localRank 0 MNNVL 0
n1:5:9 [0] NCCL INFO Channel 00 : 0[0] -> 1[1] via SHM/direct/direct

n1:5:9 [0] misc/shmutils.cc:72 NCCL WARN Error: failed to extend /dev/shm/nccl-x to 9637892 bytes
"""


# ---- NCCL's words


def test_nccl_of_one_node():
    found = parse_nccl(NODE)
    assert (found.version, found.network, found.nodes, found.ranks) == ("2.27.5+cuda12.9", "Socket", 1, 4)
    assert dict(found.links) == {"P2P": 2} and found.nvls and found.nvls_channels == 16
    assert found.no_library and found.interfaces == ("eno1", "ib0")
    lines = transport_findings(found, [], True, "")
    assert [line.level for line in lines] == ["ok", "ok"] and "NCCL_NVLS_ENABLE=0" in lines[1].fix


def test_nccl_over_infiniband():
    found = parse_nccl(INFINIBAND)
    assert found.network == "IB" and found.devices == ("mlx5_0:1/IB", "mlx5_1:1/RoCE")
    assert dict(found.links) == {"NET/IB": 2, "P2P": 1} and found.direct == 2 and found.nodes == 2
    assert found.settings == {"NCCL_IB_HCA": "mlx5"}
    assert [line.level for line in transport_findings(found, ["mlx5_0:1 InfiniBand 200 Gb/sec"], True, "")] == ["ok"]
    host_copies = parse_nccl(INFINIBAND.replace("/GDRDMA", ""))
    assert "nvidia_peermem" in transport_findings(host_copies, ["mlx5_0:1"], True, "")[1].fix


def test_sockets_where_infiniband_is_are_an_error_with_the_fix():
    ports = ["mlx5_0:1 InfiniBand 200 Gb/sec"]

    def fix(text: str, container: str = "") -> str:
        lines = transport_findings(parse_nccl(text), ports, False, container)
        assert [line.level for line in lines[:2]] == ["ok", "error"], lines
        return lines[1].fix

    assert "NCCL_IB_HCA=mlx5_0" in fix(SOCKETS) and "/dev/infiniband" in fix(SOCKETS)
    assert "bind /dev/infiniband" in fix(SOCKETS, "Apptainer")
    setting = "n1:88:121 [0] NCCL INFO NCCL_IB_DISABLE set by environment to 1.\n"
    assert fix(setting + SOCKETS) == "unset NCCL_IB_DISABLE"
    assert "mlx4_9 fits no active device" in fix(setting.replace("DISABLE", "HCA").replace("1.", "mlx4_9.") + SOCKETS)
    library = "n1:88:121 [0] NCCL INFO Failed to open libibverbs.so[.1]\n"
    assert "rdma-core) in the container" in fix(library + SOCKETS, "Apptainer")
    older = "n1:88:121 [0] misc/ibvwrap.cc:63 NCCL WARN Failed to open libibverbs.so[.1]\n"
    assert "rdma-core) on the nodes" in fix(older + SOCKETS)


def test_sockets_without_infiniband_are_a_warning():
    lines = transport_findings(parse_nccl(SOCKETS), [], False, "")
    assert [line.level for line in lines] == ["ok", "warning"] and "eth0" in lines[1].text


def test_one_node_is_warned_of_sockets_to_come():
    lines = transport_findings(parse_nccl(NODE), ["mlx5_0:1"], True, "")
    assert [line.level for line in lines] == ["ok", "warning", "ok"] and "would carry" in lines[1].text


def test_host_memory_where_nvlink_is():
    lines = transport_findings(parse_nccl(SHARED), [], True, "")
    assert [line.level for line in lines] == ["ok", "warning", "ok", "warning"]
    assert "NCCL_P2P_DISABLE is set" in lines[1].text and "switched off" in lines[2].text
    assert "failed to extend /dev/shm" in lines[3].text


def test_a_plugin_and_what_is_no_line_of_nccl():
    text = "I0000 some other log\nx:1:2 [0] NCCL INFO Using network AWS Libfabric\n"
    text += "x:1:2 [0] NCCL INFO Channel 00/0 : 1[0] -> 0[0] [receive] via NET/AWS Libfabric/0/GDRDMA\n"
    found = parse_nccl(text)
    assert found.network == "AWS Libfabric" and dict(found.links) == {"NET/AWS Libfabric": 1} and found.direct == 1


def test_infiniband_ports(tmp_path):
    for device, state, layer in (("mlx5_0", "4: ACTIVE", "InfiniBand"), ("mlx5_1", "1: DOWN", "Ethernet")):
        folder = tmp_path / device / "ports" / "1"
        folder.mkdir(parents=True)
        (folder / "state").write_text(state + "\n")
        (folder / "rate").write_text("200 Gb/sec (4X HDR)\n")
        (folder / "link_layer").write_text(layer + "\n")
    (tmp_path / "mlx5_2" / "ports" / "1").mkdir(parents=True)  # one that cannot be read
    first, second = infiniband_ports(tmp_path)
    assert first.active and first.name == "mlx5_0:1 InfiniBand 200 Gb/sec" and not second.active
    assert infiniband_ports(tmp_path / "none") == []


# ---- across ranks


def reports(*facts: dict, hosts: str = "abcd") -> list[Report]:
    return [Report(rank, hosts[rank], each) for rank, each in enumerate(facts)]


def test_versions_name_the_rank_and_both_values():
    right, wrong = {"versions": {"jax": "0.10.2"}}, {"versions": {"jax": "0.10.1", "jax-cuda12-plugin": "0.10.1"}}
    lines = compare.versions(reports(right, right, wrong))
    assert [line.level for line in lines] == ["error", "error"]
    assert lines[0].text == "jax: rank 2 on c has '0.10.1', the others '0.10.2'"
    assert lines[1].text == "jax-cuda12-plugin: rank 2 on c has '0.10.1', the others none"
    assert [line.level for line in compare.versions(reports(right, right))] == ["ok"]


def test_flags():
    lines = compare.flags(
        reports({"flags": {"XLA_FLAGS": "--a", "NCCL_DEBUG": "INFO"}}, {"flags": {"XLA_FLAGS": "--b"}})
    )
    assert {(line.level, line.text) for line in lines} == {
        ("warning", "NCCL_DEBUG: rank 1 on b has none, the others 'INFO'"),
        ("error", "XLA_FLAGS: rank 1 on b has '--b', the others '--a'"),
    }


@pytest.mark.parametrize("seconds, level", [(0.2, "ok"), (-3.0, "warning"), (31.0, "error")])
def test_clocks(seconds, level):
    (line,) = compare.clocks(reports({"clock_s": 0.0}, {"clock_s": seconds}))
    assert line.level == level and (level == "ok" or f"rank 1 on b by {abs(seconds)} s" in line.text)


def test_manifests():
    lines = compare.manifests(reports({"manifest": "x"}, {"manifest": "x"}, {"manifest": "y"}))
    assert lines[0].level == "error" and "rank 2 on c" in lines[0].text
    assert compare.manifests(reports({"manifest": "x"}, {"manifest": "x"}))[0].level == "ok"
    assert compare.manifests(reports({}, {})) == []
    # a rank that could not read it has said so itself
    assert compare.manifests(reports({"manifest": "x"}, {"manifest": None})) == []


def test_own_name_that_leads_to_itself():
    good, bad = {"own_addresses": ["10.0.0.1"]}, {"own_addresses": ["127.0.1.1"]}
    (line,) = compare.own_names(reports(good, bad))
    assert line.level == "error" and "b is 127.0.1.1 there" in line.text and "/etc/hosts" in line.fix
    assert compare.own_names(reports(good, good))[0].level == "ok"
    assert compare.own_names(reports(bad, bad, hosts="aa")) == []  # one node may


def gpu(index: int = 0, **changes) -> dict:
    found = {
        "index": index,
        "name": "NVIDIA H200",
        "uuid": f"GPU-{index}",
        "driver": "580.1",
        "total": 140 << 30,
        "free": 139 << 30,
        "capability": [9, 0],
        "processes": [],
        "ecc": 0,
        "nvlinks": 18,
        "pcie": [5, 16, 16],
        "mig": False,
        "peers": {},
    }
    return found | changes


def test_gpus_taken_twice_or_not_at_all():
    both = compare.shared_gpus(reports({"gpus": [gpu()]}, {"gpus": [gpu()]}, hosts="aa"))
    assert both[0].level == "error" and "GPU GPU-0 of a: rank 0 and rank 1" in both[0].text
    assert compare.shared_gpus(reports({"gpus": [gpu()]}, {"gpus": [gpu()]})) == []
    idle = compare.shared_gpus(reports({"gpus": [gpu()], "gpus_on_node": 4}))
    assert idle[0].level == "warning" and "gave 4 GPUs, the ranks there use 1" in idle[0].text


def test_gpus_of_different_kinds():
    (line,) = compare.kinds(reports({"gpus": [gpu()]}, {"gpus": [gpu()]}, {"gpus": []}))
    assert line.level == "warning" and "rank 2 on c has no GPU, the others 1 NVIDIA H200" in line.text


def test_missing_ranks_are_named_with_their_hosts():
    (line,) = compare.missing_ranks({2: "did not come in 5 s", 1: "x"}, ["a", "b", ""], "a:77")
    assert line.level == "error" and line.text == "rank 1 on b x; rank 2 on an unknown host did not come in 5 s"


# ---- one machine


def test_a_gpu_with_troubles():
    assert [line.level for line in gpu_findings([gpu()], [0])] == ["ok", "ok"]
    troubled = gpu(
        free=100 << 30, processes=[[os.getpid(), 40 << 30]], ecc=2, mig=True, capability=[7, 5], pcie=[4, 8, 16]
    )
    lines = gpu_findings([gpu(), troubled | {"peers": {"0": "NVLink"}}], [1])
    assert [line.level for line in lines] == ["ok", "ok", "warning", "error", "warning", "warning", "warning", "ok"]
    assert f"pid {os.getpid()} (" in lines[2].text and "40.0 GiB" in lines[2].text
    assert gpu_findings([gpu()], [0, 1])[0].level == "error"
    unknown = gpu(total=None, free=None, capability=[0, 0], pcie=[0, 0, 0])
    assert [line.level for line in gpu_findings([unknown], [0])] == ["ok", "ok"]


def test_cuda_visible_devices():
    gpus = [gpu(0), gpu(1), gpu(2)]

    def shown(visible: str | None) -> list[int]:
        return [each["index"] for each in _select(gpus, visible)]

    assert shown(None) == [0, 1, 2] and shown("2,0") == [2, 0] and shown("GPU-1") == [1] and shown("") == []
    assert shown("1,7,0") == [1]  # as CUDA does


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
    mounts.write_text(f"a / ext4 rw 0 0\nb {tmp_path}/a\\040b lustre rw 0 0\nc {tmp_path}/a\\040b/c tmpfs rw 0 0\n")
    assert file_system(tmp_path / "a", mounts) == "ext4"
    assert file_system(tmp_path / "a b" / "x", mounts) == "lustre"
    assert file_system(tmp_path / "a b" / "c" / "x", mounts) == "tmpfs"


def test_folders(tmp_path):
    (line,) = check_folder("output", tmp_path)
    assert line.level == "ok" and list(tmp_path.iterdir()) == []
    (line,) = check_folder("output", tmp_path / "later" / "on")
    assert line.level == "ok" and "not there yet" in line.text
    (tmp_path / "file").touch()
    assert check_folder("output", tmp_path / "file")[0].level == "error"
    (line,) = check_folder("output", Path("/proc"))
    assert line.level == "error" and "cannot be written" in line.text


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("doctor")
    make_hf_folder(folder / "hf")
    convert(folder / "hf", folder / "ckpt", quiet=True)
    return folder / "ckpt"


def test_checkpoint(checkpoint, tmp_path):
    (line,), facts = check_checkpoint(checkpoint, 1, 2, 1 << 30)
    assert line.level == "ok" and facts["read_bytes_per_s"] > 0 and len(facts["manifest"]) == 64
    (line,), facts = check_checkpoint(tmp_path / "none", 0, 1, 1 << 30)
    assert line.level == "error" and "no such checkpoint folder" in line.text and facts == {"manifest": None}
    shutil.copytree(checkpoint, tmp_path / "ckpt")
    names = json.loads((checkpoint / "manifest.json").read_text())["files"]
    largest = tmp_path / "ckpt" / max(names, key=lambda name: names[name]["bytes"])
    os.truncate(largest, 5)
    (line,), _ = check_checkpoint(tmp_path / "ckpt", 0, 1, 1 << 30)
    assert line.level == "error" and f"{largest}: 5 bytes, expected" in line.text
    largest.unlink()
    (line,), _ = check_checkpoint(tmp_path / "ckpt", 0, 1, 1 << 30)
    assert line.level == "error" and f"{largest}: No such file" in line.text


def test_a_check_that_hangs_or_breaks_is_an_error():
    report, never = Report(0, "a"), threading.Event()
    bounded(report, "x", lambda: (never.wait(), ([], {}))[1], 0.1)
    bounded(report, "y", lambda: 1 // 0, 5)
    bounded(report, "z", lambda: ([ok("z", "fine")], {"n": 1}), 5)
    never.set()
    assert [(line.level, line.name) for line in report.findings] == [("error", "x"), ("error", "y"), ("ok", "z")]
    assert "did not return" in report.findings[0].text and "ZeroDivisionError" in report.findings[1].text


def test_equal_findings_are_one_line_and_the_worst_come_last():
    ranks = reports({}, {}, {})
    for rank in ranks:
        rank.add([ok("disk", f"{rank.rank} GB/s"), ok("host", "same")])
    ranks[1].add([error("gpu", "broken", "replace it")])
    lines = merge(ranks, [ok("clock", "fine")])
    assert [(line.finding.level, line.finding.name, line.ranks) for line in lines] == [
        ("ok", "disk", (0, 1, 2)),
        ("ok", "host", (0, 1, 2)),
        ("ok", "clock", ()),
        ("error", "gpu", (1,)),
    ]


# ---- the all-reduce


def result(last: str, end: str, why: str = "") -> dict:
    devices = {"platform": "gpu", "kind": "H200", "devices": 4, "local": 2}
    small, large = {"bytes": 8192, "seconds": 20e-6}, {"bytes": 64 << 20, "seconds": 0.5e-3}
    return {"last": last, "end": end, "why": why, "devices": devices, "small": small, "large": large, "nccl": None}


def test_all_reduce_times():
    (line,) = collective_findings([result("done", "ok")] * 2, ["rank 0 on a", "rank 1 on b"], True)
    assert line.level == "ok" and "8 KiB in 20 us" in line.text and "64 MiB in 500 us (201 GB/s" in line.text


def test_all_reduce_on_the_cpu_where_gpus_are():
    on_cpu = result("done", "ok")
    on_cpu["devices"]["platform"] = "cpu"
    assert collective_findings([on_cpu], ["rank 0 on a"], True)[0].level == "error"


def test_all_reduce_blames_who_failed_or_stands_behind():
    names = ["rank 0 on a", "rank 1 on b", "rank 2 on c"]
    waits = result("small", "hung", "it waits after 'small'")
    (line,) = collective_findings([waits, result("joined", "hung", "it waits after 'joined'"), waits], names, True)
    assert line.level == "error" and "rank 1 on b: it waits after 'joined'" in line.text and "rank 0" not in line.text
    assert "firewall" in line.fix
    (line,) = collective_findings([waits, waits, result("devices", "failed", "killed by signal 9")], names, True)
    assert line.text == "rank 2 on c: killed by signal 9 (2 of 3 ranks waited in vain)"
    (line,) = collective_findings([result("done", "ok"), None, result("done", "ok")], names, True)
    assert line.level == "error" and "no result of rank 1 on b" in line.text


# ---- meeting


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def launches(count: int, run: str = "7.0.0") -> list[Launch]:
    port = free_port()
    return [Launch("127.0.0.1", port, count, index, None, ("a",) * count, run) for index in range(count)]


def attend(launch: Launch, seconds: float, outcome: dict) -> threading.Thread:
    def run() -> None:
        try:
            meeting = meet(launch, seconds)
            values = meeting.gather({"from": launch.process_id}, 5)
            shared = meeting.share("all well", 5)
            outcome[launch.process_id] = (meeting, values, shared)
            meeting.close()
        except ClusterError as problem:
            outcome[launch.process_id] = str(problem)

    thread = threading.Thread(target=run)
    thread.start()
    return thread


def test_meeting():
    outcome: dict = {}
    for thread in [attend(launch, 10, outcome) for launch in reversed(launches(3))]:
        thread.join()
    meeting, values, shared = outcome[0]
    assert values == [{"from": 0}, {"from": 1}, {"from": 2}] and shared == "all well" and not meeting.missing
    other, none, shared = outcome[2]
    assert none is None and shared == "all well" and abs(other.clock_s) < 0.1 and 0 < other.round_trip_s < 1


def test_strangers_are_refused_and_absent_ranks_named():
    host, first, _ = launches(3)
    outcome: dict = {}
    threads = [attend(host, 3, outcome)]
    time.sleep(0.3)
    with socket.create_connection((host.host, host.port)) as stranger:
        stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
        threads.append(attend(first, 3, outcome))
        other: dict = {}
        stranger_run = Launch(host.host, host.port, 3, 2, None, host.hosts, "8.0.0")
        attend(stranger_run, 3, other).join()
        for thread in threads:
            thread.join()
    meeting, values, _ = outcome[0]
    assert values == [{"from": 0}, {"from": 1}, None] and meeting.missing == {2: "did not come in 3 s"}
    assert "refused by rank 0" in other[2] and "it belongs to run 8.0.0, this is 7.0.0" in other[2]
    assert len(meeting.refused) == 2 and any("does not speak as one" in text for text in meeting.refused)


def test_another_program_on_the_port():
    host, first = launches(2)
    with socket.create_server((host.host, host.port)) as server:
        with pytest.raises(ClusterError, match=f"port {host.port} cannot be used"):
            meet(host, 1)

        def answer() -> None:
            connection, _ = server.accept()
            connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
            connection.close()

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(ClusterError, match=f"another program answers at {host.host}:{host.port}"):
            meet(first, 5)
        thread.join()
    with pytest.raises(ClusterError, match=r"rank 0 at .* not reached in 1 s: .*refused"):
        meet(first, 1)


def test_a_rank_that_goes_or_sticks_is_named():
    host, first, second = launches(3)
    meetings: dict = {}

    def join(launch: Launch) -> None:
        meetings[launch.process_id] = meet(launch, 5)

    threads = [threading.Thread(target=join, args=[launch]) for launch in (host, first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    meetings[1].close()
    assert meetings[0].gather("a", 1) == ["a", None, None]
    assert "ended before" in meetings[0].missing[1] and "stuck" in meetings[0].missing[2]
    meetings[0].close()
    with pytest.raises(ClusterError, match=r"rank 0 on 127\.0\.0\.1 is gone"):
        meetings[2].share(None, 5)
    meetings[2].close()


# ---- whole runs


def start(*arguments, cwd: Path = ROOT, **environment: str) -> subprocess.Popen:
    env = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "NPROC")}
    command = [sys.executable, "-m", "jaxinfer.doctor", *map(str, arguments)]
    settings = {**env, "JAX_PLATFORMS": "cpu", **environment}
    return subprocess.Popen(command, cwd=cwd, env=settings, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def start_all(count: int, arguments=(), changes=()) -> list[subprocess.Popen]:
    """`changes` of rank: options of `start` for that rank alone."""
    place = ["--coordinator", f"127.0.0.1:{free_port()}", "--num-processes", count]
    return [start(*arguments, *place, "--process-id", rank, **dict(changes).get(rank, {})) for rank in range(count)]


def finish(processes: list[subprocess.Popen], timeout: float = 100) -> list[tuple[int, str, str]]:
    try:
        outputs = [process.communicate(timeout=timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, out, err) for process, (out, err) in zip(processes, outputs)]


def test_alone(checkpoint, tmp_path):
    answer = tmp_path / "answer.json"
    ((status, out, err),) = finish([start("--model", checkpoint, "--output-dir", tmp_path, "--json", answer)])
    assert status == 0, out + err
    assert "all-reduce: one device (cpu)" in out and "no error" in out.splitlines()[-1]
    data = json.loads(answer.read_text())
    assert data["errors"] == 0 and data["ranks"][0]["facts"]["versions"]["jax"] and data["collective"][0]["end"] == "ok"
    assert list(tmp_path.iterdir()) == [answer]


def test_usage():
    for arguments, text in (
        (["--process-id", "0"], "belong together"),
        (["--timeout-s", "0"], "legal is above 0"),
        (["--coordinator", "x", "--num-processes", "2", "--process-id", "0"], "legal is host:port"),
    ):
        ((status, _, err),) = finish([start(*arguments)])
        assert status == 2 and text in err and "Traceback" not in err
    ((status, out, _),) = finish([start("--help")])
    assert status == 0 and "srun -N2" in out


@pytest.mark.slow
def test_four_ranks(checkpoint):
    first, *others = finish(start_all(4, ["--model", checkpoint]))
    assert first[0] == 0, first
    assert "all-reduce: 4 devices (cpu): 8 KiB in" in first[1] and "versions: equal on all ranks" in first[1]
    assert "checkpoint: the same on all ranks" in first[1] and "no errors" in first[1].splitlines()[-1]
    assert [other[:2] for other in others] == [(0, "")] * 3


@pytest.mark.slow
def test_one_rank_is_different(checkpoint, tmp_path):
    copy = tmp_path / "other"
    shutil.copytree(ROOT / "jaxinfer", copy / "jaxinfer", ignore=shutil.ignore_patterns("__pycache__"))
    with open(copy / "jaxinfer" / "__init__.py", "a") as file:
        file.write('\n__version__ = "99"\n')
    (tmp_path / "file").touch()
    wrong = {"cwd": copy, "PYTHONPATH": str(copy), "XLA_FLAGS": "--xla_cpu_enable_fast_math=false"}
    wrong |= {"http_proxy": "http://10.255.255.1:3128", "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "file")}
    shutil.copytree(checkpoint, copy / "ckpt")
    (copy / "ckpt" / "manifest.json").unlink()
    processes = start_all(2, ["--model", "ckpt", "--timeout-s", 40], {0: {"cwd": checkpoint.parent}, 1: wrong})
    (status, out, err), (other, _, _) = finish(processes)
    assert (status, other) == (1, 1), out + err
    host = socket.gethostname()
    for text in (
        f"flags: XLA_FLAGS: rank 1 on {host} has '--xla_cpu_enable_fast_math=false', the others none",
        f"versions: jaxinfer: rank 1 on {host} has '99 (sources ",
        f"proxy (rank 1 on {host}): http_proxy set",
        f"checkpoint (rank 1 on {host}): ckpt: incomplete checkpoint",
        f"compile cache (rank 1 on {host}): {tmp_path / 'file'}: not a folder",
        "all-reduce: 2 devices",
    ):
        assert text in out, out


@pytest.mark.slow
def test_a_rank_is_missing():
    port = free_port()
    began = time.monotonic()
    place = ["--coordinator", f"127.0.0.1:{port}", "--num-processes", 3, "--start-s", 6]
    (status, out, err), (other, nothing, _) = finish([start(*place, "--process-id", rank) for rank in (0, 2)])
    assert (status, other) == (1, 1) and nothing == "" and time.monotonic() - began < 60
    assert "ranks: rank 1 on an unknown host did not come in 6 s" in out and "not tried, since ranks are missing" in out
    assert "waiting for rank 1" in err


@pytest.mark.slow
def test_an_all_reduce_that_hangs_ends_in_its_bound():
    began = time.monotonic()
    processes = start_all(2, ["--timeout-s", 10])
    doctor, children = psutil.Process(processes[1].pid), []
    while not children and time.monotonic() - began < 60:
        children = doctor.children(recursive=True)
        time.sleep(0.01)
    for child in children:
        child.send_signal(signal.SIGSTOP)
    (status, out, err), (other, _, _) = finish(processes)
    assert (status, other) == (1, 1), out + err
    assert time.monotonic() - began < 60
    assert (
        f"all-reduce: hangs: of 2 ranks 2 were not done; rank 1 on {socket.gethostname()}: its process is stopped"
        in out
    )
    assert "firewall" in out and not any(child.is_running() for child in children)


@pytest.mark.slow
def test_a_port_that_is_taken():
    with socket.create_server(("127.0.0.1", 0)) as server:
        place = ["--coordinator", f"127.0.0.1:{server.getsockname()[1]}", "--num-processes", 2, "--start-s", 3]
        ((status, out, _),) = finish([start(*place, "--process-id", 0)])
    assert status == 1 and "cannot be used" in out and "rank 1 on an unknown host cannot come" in out


@pytest.mark.slurm
@pytest.mark.slow
def test_under_srun(slurm_bed, checkpoint):
    done = slurm_bed.srun(
        [sys.executable, "-m", "jaxinfer.doctor", "--model", checkpoint], nodes=2, tasks_per_node=2, cwd=ROOT
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("jaxinfer.doctor") == 1 and "4 tasks on 2 nodes" in done.stdout
    assert "no errors" in done.stdout and "on 4 ranks" in done.stdout.splitlines()[-1]
    assert "all-reduce: 4 devices (cpu)" in done.stdout
    assert not slurm_bed.stray()


@pytest.mark.slurm
def test_job_script(slurm_bed, checkpoint, tmp_path):
    settings = {"MODEL": str(checkpoint), "RUN": str(tmp_path / "run"), "PYTHON": sys.executable}
    options = ["--gpus-per-node=0", "--ntasks-per-node=1", "--cpus-per-task=1", "--mem=1G", f"--output={tmp_path}/log"]
    job = slurm_bed.sbatch(ROOT / "slurm" / "doctor.sh", options, env=settings, cwd=ROOT)
    state = slurm_bed.wait(job, timeout=120)
    log = (tmp_path / "log").read_text()
    assert state == "COMPLETED" and "no errors" in log and "on 2 ranks" in log, log
    answer = json.loads((tmp_path / "run" / "answer.json").read_text())
    assert answer["errors"] == 0 and len(answer["ranks"]) == 2
    assert len(list((tmp_path / "run" / "logs").iterdir())) == 2
