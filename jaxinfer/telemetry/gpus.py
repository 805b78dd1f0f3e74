"""Which of a node's GPUs, as NVML has them, are those that CUDA shows to this process."""

import ctypes
import uuid
from collections.abc import Sequence
from typing import Any

import pynvml

from jaxinfer.telemetry.nvml import Gpu, ask


def own_gpus(devices: Sequence[int], visible: Sequence[str] | None) -> list[Gpu]:
    """`devices` are numbers among the GPUs that CUDA shows; `visible` is what CUDA_VISIBLE_DEVICES names, None where it
    is unset. Empty where NVML does not run; a GPU that it does not know is left out.

    CUDA itself is asked who its devices are, since its order need not be NVML's: it puts the fastest first."""
    if not nvml_runs():
        return []
    handles = {device: _handle(device, visible) for device in devices}
    return [Gpu(device, handle) for device, handle in handles.items() if handle is not None]


def nvml_runs() -> bool:
    try:
        pynvml.nvmlInit()
        return True
    except pynvml.NVMLError:
        return False


def _handle(device: int, visible: Sequence[str] | None) -> Any:
    if found := ask(None, _cuda_uuid, device):
        for kind in ("GPU", "MIG"):
            handle = ask(None, pynvml.nvmlDeviceGetHandleByUUID, f"{kind}-{found}")
            if handle is not None:
                return handle
    if visible is None:
        return ask(None, pynvml.nvmlDeviceGetHandleByIndex, device)
    if device >= len(visible):
        return None
    if visible[device].isdigit():
        return ask(None, pynvml.nvmlDeviceGetHandleByIndex, int(visible[device]))
    return _by_start(visible[device])


def _by_start(name: str) -> Any:
    """The GPU whose UUID begins so, which is enough for CUDA_VISIBLE_DEVICES."""
    if handle := ask(None, pynvml.nvmlDeviceGetHandleByUUID, name):
        return handle
    for index in range(ask(0, pynvml.nvmlDeviceGetCount)):
        handle = ask(None, pynvml.nvmlDeviceGetHandleByIndex, index)
        if handle is not None and str(ask("", pynvml.nvmlDeviceGetUUID, handle)).startswith(name):
            return handle
    return None


def _cuda_uuid(device: int) -> str | None:
    """Of the device, or of the slice of it that MIG shows; CUDA runs in this process already."""
    driver = ctypes.CDLL("libcuda.so.1")
    number, found = ctypes.c_int(), (ctypes.c_ubyte * 16)()
    if driver.cuDeviceGet(ctypes.byref(number), device) or driver.cuDeviceGetUuid_v2(ctypes.byref(found), number):
        return None
    return str(uuid.UUID(bytes=bytes(found)))
