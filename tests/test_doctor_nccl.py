"""The doctor on links: NCCL's words, InfiniBand's ports, and what an all-reduce and its road mean."""

from doctoring import levels
from jaxinfer.cluster.fabric import infiniband_ports, parse_nccl
from jaxinfer.doctor.judge import collective_findings, transport_findings

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


def test_nccl_of_one_node():
    found = parse_nccl(NODE)
    assert (found.version, found.network, found.nodes, found.ranks) == ("2.27.5+cuda12.9", "Socket", 1, 4)
    assert dict(found.links) == {"P2P": 2} and found.nvls and found.nvls_channels == 16
    assert found.no_library and found.interfaces == ("eno1", "ib0")
    lines = transport_findings(found, [], True, "")
    assert levels(lines) == ["ok", "ok"] and "NCCL_NVLS_ENABLE=0" in lines[1].fix


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
    assert levels(lines) == ["ok", "warning"] and "eth0" in lines[1].text


def test_one_node_is_warned_of_sockets_to_come():
    lines = transport_findings(parse_nccl(NODE), ["mlx5_0:1"], True, "")
    assert levels(lines) == ["ok", "warning", "ok"] and "would carry" in lines[1].text


def test_host_memory_where_nvlink_is():
    lines = transport_findings(parse_nccl(SHARED), [], True, "")
    assert levels(lines) == ["ok", "warning", "ok", "warning"]
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
