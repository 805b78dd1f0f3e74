"""What the all-reduce of all ranks means: its time, and the road that NCCL took. Pure functions of the results."""

from collections.abc import Mapping, Sequence
from typing import Any

from jaxinfer.cluster.fabric import Nccl
from jaxinfer.doctor.collective import EVENTS
from jaxinfer.doctor.finding import Finding, error, ok, warning

SHOWN = 4  # ranks named in one line
LOOK_AT = (
    "look at: the rank that came least far, and its node (dmesg, nvidia-smi); a firewall between nodes; the interface "
    "(NCCL_SOCKET_IFNAME=ib0 or the like); NCCL_IB_DISABLE=1, NCCL_P2P_DISABLE=1 and NCCL_NVLS_ENABLE=0 one by one; "
    "more time: --timeout-s"
)


def collective_findings(results: Sequence[Mapping[str, Any] | None], names: Sequence[str], gpus: bool) -> list[Finding]:
    """`results` of each rank's probe, None where none came; `names` of the ranks; `gpus`: there are some."""
    here = [(name, result) for name, result in zip(names, results) if result is not None]
    failed = [(name, result) for name, result in here if result["end"] == "failed"]
    hung = [(name, result) for name, result in here if result["end"] == "hung"]
    stopped = [(name, result) for name, result in hung if "stopped" in result["why"]]
    if failed and not stopped:
        waited = f" ({len(hung)} of {len(names)} ranks waited in vain)" if hung else ""
        return [
            error("all-reduce", f"{_said(failed)}{waited}", "what the text says; the checks above may name its cause")
        ]
    if hung:
        least = min(EVENTS.index(result["last"]) for _, result in hung)
        behind = [each for each in hung if EVENTS.index(each[1]["last"]) == least]
        what = f"hangs: of {len(names)} ranks {len(hung)} were not done; {_said(stopped or behind)}"
        return [error("all-reduce", what, LOOK_AT)]
    if len(here) < len(names):
        gone = [name for name, result in zip(names, results) if result is None]
        return [error("all-reduce", f"no result of {', '.join(gone)}", LOOK_AT)]
    return _times(here[0][1], gpus)


def _said(ranks: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    more = f"; and {len(ranks) - SHOWN} more" if len(ranks) > SHOWN else ""
    return "; ".join(f"{name}: {result['why']}" for name, result in ranks[:SHOWN]) + more


def _times(result: Mapping[str, Any], gpus: bool) -> list[Finding]:
    found = result["devices"]
    count, kind = found["devices"], found["kind"]
    if gpus and found["platform"] == "cpu":
        what = "GPUs are visible, but JAX computes on the CPU"
        return [error("all-reduce", what, "see the lines of driver, plugin and libraries; is JAX_PLATFORMS set?")]
    if count == 1:
        return [ok("all-reduce", f"one device ({kind}): JAX computes, there is nothing to reduce")]
    texts = []
    for name in ("small", "large"):
        size, seconds = result[name]["bytes"], result[name]["seconds"]
        # each device sends and receives so much of the bytes in a ring, whatever the algorithm
        rate = 2 * (count - 1) / count * size / seconds
        shown = f"{size >> 10} KiB" if size < 1 << 20 else f"{size >> 20} MiB"
        texts.append(f"{shown} in {seconds * 1e6:,.0f} us ({rate / 1e9:.3g} GB/s bus bandwidth)")
    return [ok("all-reduce", f"{count} devices ({kind}): {', '.join(texts)}")]


def transport_findings(nccl: Nccl, ports: Sequence[str], nvlink: bool, container: str) -> list[Finding]:
    """`ports`: active InfiniBand ports of the nodes; `nvlink`: GPUs of a node are linked by it."""
    roads = ", ".join(f"{name} ({count})" for name, count in sorted(nccl.links.items()))
    direct = f", {nccl.direct} of them into GPU memory (GDRDMA)" if nccl.direct else ""
    text = f"NCCL {nccl.version or '(version not said)'}, {nccl.nodes} node{'s'[: nccl.nodes != 1]}: "
    findings = [ok("NCCL", f"{text}{roads or 'no connections'}{direct}; network {nccl.network or 'not said'}")]
    sockets = "NET/Socket" in nccl.links
    if ports and (sockets or nccl.network == "Socket"):
        level = error if sockets else warning
        what = f"sockets {'carry' if sockets else 'would carry'} the traffic between nodes, though there is InfiniBand"
        what += f" ({', '.join(ports[:4])})"
        findings.append(level("transport", what, _infiniband_fix(nccl, ports, container)))
    elif sockets:
        what = f"sockets ({', '.join(nccl.interfaces)}) carry the traffic between nodes, there is no InfiniBand"
        fix = "tensor parallel inside a node only, stages across nodes; the fastest interface: NCCL_SOCKET_IFNAME"
        findings.append(warning("transport", what, fix))
    if any(name.startswith("NET/IB") for name in nccl.links) and not nccl.direct:
        what = "InfiniBand copies through host memory (no GDRDMA)"
        fix = "the nodes need the module nvidia_peermem or DMA-BUF: ask the administrators; NCCL_NET_GDR_LEVEL may help"
        findings.append(warning("transport", what, fix))
    if nvlink and "SHM" in nccl.links and "P2P" not in nccl.links:
        off = " (NCCL_P2P_DISABLE is set)" if nccl.settings.get("NCCL_P2P_DISABLE", "0") != "0" else ""
        what = f"GPUs of a node talk through host memory (SHM), though NVLink links them{off}"
        fix = "unset NCCL_P2P_DISABLE; in a container: --ipc=host and the same GPUs visible to all its processes"
        findings.append(warning("transport", what, fix))
    findings += _multicast(nccl)
    findings += [
        warning("NCCL", each, "NCCL says so; if the run is slow or hangs, begin here") for each in nccl.warnings[:4]
    ]
    return findings


def _infiniband_fix(nccl: Nccl, ports: Sequence[str], container: str) -> str:
    if nccl.settings.get("NCCL_IB_DISABLE", "0") != "0":
        return "unset NCCL_IB_DISABLE"
    if nccl.settings.get("NCCL_NET") == "Socket":
        return "unset NCCL_NET"
    if nccl.no_library:
        where = "in the container" if container else "on the nodes"
        return f"install libibverbs1 and ibverbs-providers (rdma-core) {where}: libibverbs.so.1 cannot be loaded"
    hca = nccl.settings.get("NCCL_IB_HCA")
    if hca:
        return f"NCCL_IB_HCA={hca} fits no active device: unset it, or NCCL_IB_HCA={ports[0].partition(':')[0]}"
    bind = "bind /dev/infiniband into the container; " if container else ""
    return (
        f"{bind}see whether /dev/infiniband is there for this user and `ulimit -l` is unlimited; then "
        f"NCCL_IB_HCA={ports[0].partition(':')[0]}, and NCCL_SOCKET_IFNAME for the start-up (ib0, say)"
    )


def _multicast(nccl: Nccl) -> list[Finding]:
    if nccl.nvls and nccl.nvls_channels:
        text = f"multicast over NVLink is in use, {nccl.nvls_channels} channels"
        return [ok("NVLS", text, "should a start hang or fail in NVLS or multicast: NCCL_NVLS_ENABLE=0")]
    if nccl.settings.get("NCCL_NVLS_ENABLE") == "0":
        return [ok("NVLS", "multicast over NVLink is switched off (NCCL_NVLS_ENABLE=0)")]
    return []
