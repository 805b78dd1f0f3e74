"""GPUs through NVML: what they are, who uses them, what links them. Any single question may be refused by a driver."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import psutil
import pynvml

from jaxinfer.cluster.visible import visible_devices
from jaxinfer.doctor.finding import Finding, error, ok, warning

GIB = 1 << 30
USED = GIB  # of a GPU's memory, above which somebody works on it
MAX_LINKS = 18


def visible_gpus(env: Mapping[str, str]) -> list[dict[str, Any]]:
    """The GPUs that CUDA would show to this process, in its order; none where NVML does not run."""
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    try:
        found = [_describe(index) for index in range(_ask(0, pynvml.nvmlDeviceGetCount))]
        found = [gpu for gpu in found if gpu]
        shown = _select(found, visible_devices(env))
        for gpu in shown:
            gpu["peers"] = _peers(gpu, shown)
        return shown
    finally:
        _ask(None, pynvml.nvmlShutdown)


def _ask(default: Any, question: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return question(*arguments)
    except (pynvml.NVMLError, AttributeError, UnicodeDecodeError, ValueError):
        return default


def _describe(index: int) -> dict[str, Any] | None:
    handle = _ask(None, pynvml.nvmlDeviceGetHandleByIndex, index)
    if handle is None:
        return None
    memory = _ask(None, pynvml.nvmlDeviceGetMemoryInfo, handle)
    processes = _ask([], pynvml.nvmlDeviceGetComputeRunningProcesses, handle)
    errors = _ask(
        0,
        pynvml.nvmlDeviceGetTotalEccErrors,
        handle,
        pynvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED,
        pynvml.NVML_VOLATILE_ECC,
    )
    active = [_ask(0, pynvml.nvmlDeviceGetNvLinkState, handle, link) for link in range(MAX_LINKS)]
    return {
        "index": index,
        "name": _ask("GPU", pynvml.nvmlDeviceGetName, handle),
        "uuid": _ask(f"index {index}", pynvml.nvmlDeviceGetUUID, handle),
        "driver": _ask("?", pynvml.nvmlSystemGetDriverVersion),
        "total": int(memory.total) if memory else None,
        "free": int(memory.free) if memory else None,
        "capability": list(_ask((0, 0), pynvml.nvmlDeviceGetCudaComputeCapability, handle)),
        "processes": [[int(each.pid), int(each.usedGpuMemory or 0)] for each in processes],
        "ecc": int(errors),
        "nvlinks": sum(map(int, active)),
        "pcie": [
            _ask(0, pynvml.nvmlDeviceGetMaxPcieLinkGeneration, handle),
            _ask(0, pynvml.nvmlDeviceGetCurrPcieLinkWidth, handle),
            _ask(0, pynvml.nvmlDeviceGetMaxPcieLinkWidth, handle),
        ],
        "mig": _ask([0], pynvml.nvmlDeviceGetMigMode, handle)[0] == 1,
    }


def _select(gpus: list[dict[str, Any]], names: list[str] | None) -> list[dict[str, Any]]:
    """Those of `names`, numbers or (starts of) UUIDs, or all; CUDA stops at the first that does not exist."""
    if names is None:
        return gpus
    chosen: list[dict[str, Any]] = []
    for name in names:
        found = [
            gpu for gpu in gpus if name == str(gpu["index"]) or (name[:3] == "GPU" and gpu["uuid"].startswith(name))
        ]
        if len(found) != 1:
            break
        if found[0] in chosen:
            return []
        chosen.append(found[0])
    return chosen


def _peers(gpu: Mapping[str, Any], gpus: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """How the other visible GPUs are reached: NVLink, PCIe or SYS (over the sockets' link)."""
    handle, found = pynvml.nvmlDeviceGetHandleByIndex(gpu["index"]), {}
    for other in gpus:
        if other["index"] == gpu["index"]:
            continue
        peer = pynvml.nvmlDeviceGetHandleByIndex(other["index"])
        linked = _ask(None, pynvml.nvmlDeviceGetP2PStatus, handle, peer, pynvml.NVML_P2P_CAPS_INDEX_NVLINK)
        if linked == pynvml.NVML_P2P_STATUS_OK:
            found[str(other["index"])] = "NVLink"
        else:
            level = _ask(None, pynvml.nvmlDeviceGetTopologyCommonAncestor, handle, peer)
            found[str(other["index"])] = "SYS" if level == pynvml.NVML_TOPOLOGY_SYSTEM else "PCIe"
    return found


def gpu_findings(gpus: Sequence[Mapping[str, Any]], own: Sequence[int]) -> list[Finding]:
    """Of the visible GPUs, those that are this rank's: `own` are indices into the visible ones."""
    absent = [index for index in own if index >= len(gpus)]
    if absent:
        what = f"this rank was given GPU {absent[0]} of the visible ones, but only {len(gpus)} are visible"
        return [error("GPUs", what, "look at CUDA_VISIBLE_DEVICES and --gpu-bind")]
    if not gpus:
        return []
    mine = "all" if len(own) == len(gpus) else ", ".join(str(gpus[index]["index"]) for index in own)
    findings = [ok("GPUs", f"{len(gpus)} visible, of them this rank's: {mine}")]
    for gpu in (gpus[index] for index in own):
        findings += _one(gpu)
    links = sorted({link for gpu in gpus for link in gpu["peers"].values()})
    if links:
        text = f"{len(gpus)} visible GPUs linked by {' and '.join(links)}"
        text += f" ({gpus[0]['nvlinks']} links each)" if gpus[0]["nvlinks"] else ""
        findings.append(ok("links", text))
    return findings


def _one(gpu: Mapping[str, Any]) -> list[Finding]:
    name, capability = f"GPU {gpu['index']}", ".".join(map(str, gpu["capability"]))
    text = f"{gpu['name']}, capability {capability}, driver {gpu['driver']}"
    if gpu["total"]:
        text += f", {gpu['free'] / GIB:.1f} of {gpu['total'] / GIB:.1f} GiB free"
    generation, width, widest = gpu["pcie"]
    text += f", PCIe {generation} x{width}" if width else ""
    findings = [ok(name, text)]
    users = [_user(pid, used) for pid, used in gpu["processes"]]
    taken = (gpu["total"] or 0) - (gpu["free"] or 0)
    if users or taken > max(USED, 0.03 * (gpu["total"] or 0)):
        who = ", ".join(users) or "a process that is not visible from here"
        what = f"{taken / GIB:.1f} GiB are used by others: {who}"
        findings.append(warning(name, what, "end it, or take another GPU; else lower --memory-fraction"))
    if gpu["ecc"]:
        what = f"{gpu['ecc']} uncorrected memory errors since the driver started"
        findings.append(
            error(name, what, "leave the node out (--exclude) and tell the administrators: it needs a reset")
        )
    if gpu["mig"]:
        what = "it is cut by MIG: its parts cannot work together in a mesh"
        findings.append(warning(name, what, "ask for whole GPUs"))
    if 0 < gpu["capability"][0] < 8:
        what = f"capability {capability} has no bfloat16"
        findings.append(warning(name, what, "run with --dtype float16 or float32"))
    if 0 < width < widest:
        what = f"PCIe x{width}, it could be x{widest}: loading and traffic without NVLink are slow"
        findings.append(
            warning(name, what, "tell the administrators: a card or riser is badly seated, or it saves power")
        )
    return findings


def _user(pid: int, used: int) -> str:
    try:
        name = psutil.Process(pid).name()
    except psutil.Error:
        name = "not visible from here"
    return f"pid {pid} ({name}{f', {used / GIB:.1f} GiB' if used else ''})"
