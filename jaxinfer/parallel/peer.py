"""Memory that the GPUs of a `tensor` group on one host write to each other: an inbox per GPU, outside of XLA's pool.

Inside a process by plain peer access, between processes by CUDA's handles for sharing memory."""

import ctypes
import functools
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxinfer.ops import cuda
from jaxinfer.parallel import all_reduce
from jaxinfer.parallel.axes import AXES

RANKS = (2, 4, 8)
ALREADY_ENABLED = 704  # CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED
ENABLE_LAZILY = 1  # CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS


class PeerError(RuntimeError):
    """The GPUs cannot reach each other's memory; the message says which, and what CUDA calls it."""


class _Handle(ctypes.Structure):
    _fields_ = (("reserved", ctypes.c_char * 64),)


@functools.cache
def connect(mesh: Mesh, everyone: Callable[[Any], list[Any]]) -> tuple[jax.Array | None, str]:
    """The addresses of the inboxes for `all_reduce.peer_sum`, uint32 [stage, data, tensor, ranks + 1, 2] with each
    device's own part on it; or None, and why `psum` has to do.

    All processes of the mesh call it, and get the same answer. `everyone` gives what each process has in a value that
    JSON holds. An inbox stays until the process ends, so a mesh is connected only once.
    """
    groups = mesh.devices.reshape(-1, mesh.shape["tensor"])
    reason = refusal(groups)
    if reason:  # the same on every process: no need to ask
        return None, reason
    here = jax.process_index()
    own = [device for device in groups.flat if device.process_index == here]
    told: dict[str, Any] = {"host": socket.gethostname(), "error": ""}
    try:
        told["inboxes"] = {str(device.id): _make_inbox(device, groups.shape[1]) for device in own}
    except (PeerError, OSError, AttributeError) as error:
        told["error"] = str(error)
    all_told = everyone(told)
    reason = next((each["error"] for each in all_told if each["error"]), "") or spread(
        groups, [each["host"] for each in all_told]
    )
    if reason:
        return None, reason
    tables, error = {}, ""
    try:
        for device in own:
            tables[device] = _table(device, next(group for group in groups if device in group), all_told)
    except PeerError as failed:
        error = str(failed)
    reason = next(filter(None, everyone(error)), "")
    if reason:
        return None, reason
    shape = (*mesh.devices.shape, groups.shape[1] + 1, 2)
    arrays = [jax.device_put(table[None, None, None], device) for device, table in tables.items()]
    return jax.make_array_from_single_device_arrays(shape, NamedSharding(mesh, P(*AXES)), arrays), ""


def refusal(groups: np.ndarray) -> str:
    """What about these devices [groups, ranks] rules out peer access or the kernel; empty if nothing."""
    if groups.shape[1] not in RANKS:
        return f"tensor={groups.shape[1]}; the kernel is for {', '.join(map(str, RANKS))}"
    for device in groups.flat:
        capability = getattr(device, "compute_capability", "")
        if not capability.replace(".", "").isdigit():
            return f"device {device.id} is not an NVIDIA GPU"
        if float(capability) < 8:
            return f"device {device.id} has compute capability {capability}; the kernel needs 8.0"
    return ""


def spread(groups: np.ndarray, hosts: list[str]) -> str:
    """Says so where a group spans hosts, given each process's host; else empty."""
    for group in groups:
        found = sorted({hosts[device.process_index] for device in group})
        if len(found) > 1:
            return f"a tensor group spans the hosts {', '.join(found)}"
    return ""


def _make_inbox(device: jax.Device, ranks: int) -> list[Any]:
    """Address and handle of new memory on the device, all zero."""
    if cuda.gpu(device) is None:
        raise PeerError("NVRTC (libnvrtc) was not found")
    size, address, handle = all_reduce.inbox_bytes(ranks), ctypes.c_uint64(), _Handle()
    with _current(device):
        _do("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(size))
        _do("cuMemsetD8_v2", address, ctypes.c_ubyte(0), ctypes.c_size_t(size))
        _do("cuCtxSynchronize")
        if jax.process_count() > 1:
            _do("cuIpcGetMemHandle", ctypes.byref(handle), address)
    return [address.value, bytes(handle).hex()]


def _table(device: jax.Device, group: np.ndarray, all_told: list[dict[str, Any]]) -> np.ndarray:
    """[ranks + 1, 2]: low and high words of the inboxes as this device reaches them, its own first, then its rank."""
    own = list(group).index(device)
    addresses = []
    for peer in (*group[own:], *group[:own]):
        address, handle = all_told[peer.process_index]["inboxes"][str(peer.id)]
        if peer is not device:
            try:
                address = _reach(device, peer, address, handle)
            except PeerError as error:
                raise PeerError(f"device {device.id} cannot reach device {peer.id}: {error}") from None
        addresses.append(address)
    return np.array([(each & 0xFFFFFFFF, each >> 32) for each in (*addresses, own)], np.uint32)


def _reach(device: jax.Device, peer: jax.Device, address: int, handle: str) -> int:
    if peer.process_index != device.process_index:
        opened = ctypes.c_uint64()
        with _current(device):
            memory = _Handle.from_buffer_copy(bytes.fromhex(handle))
            _do("cuIpcOpenMemHandle_v2", ctypes.byref(opened), memory, ctypes.c_uint(ENABLE_LAZILY))
        return opened.value
    can = ctypes.c_int()
    _do("cuDeviceCanAccessPeer", ctypes.byref(can), _ordinal(device), _ordinal(peer))
    if not can.value:
        raise PeerError("no peer access between them")
    with _current(peer) as context:
        pass
    with _current(device):
        _do("cuCtxEnablePeerAccess", context, ctypes.c_uint(0), fine=(0, ALREADY_ENABLED))
    return address


def _ordinal(device: jax.Device) -> ctypes.c_int:
    found = ctypes.c_int()
    _do("cuDeviceGet", ctypes.byref(found), ctypes.c_int(device.local_hardware_id))
    return found


@contextmanager
def _current(device: jax.Device) -> Iterator[ctypes.c_void_p]:
    """The device's primary context, which JAX uses too."""
    context, popped = ctypes.c_void_p(), ctypes.c_void_p()
    _do("cuDevicePrimaryCtxRetain", ctypes.byref(context), _ordinal(device))
    _do("cuCtxPushCurrent_v2", context)
    try:
        yield context
    finally:
        _do("cuCtxPopCurrent_v2", ctypes.byref(popped))


@functools.cache
def _driver() -> ctypes.CDLL:
    library = ctypes.CDLL("libcuda.so.1")
    library.cuInit(ctypes.c_uint(0))
    return library


def _do(name: str, *arguments: Any, fine: tuple[int, ...] = (0,)) -> None:
    driver, text = _driver(), ctypes.c_char_p()
    status = getattr(driver, name)(*arguments)
    if status not in fine:
        driver.cuGetErrorName(ctypes.c_int(status), ctypes.byref(text))
        raise PeerError(f"{name}: {(text.value or b'unknown').decode()}")
