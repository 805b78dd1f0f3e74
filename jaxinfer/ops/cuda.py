"""CUDA kernels of our own: source to PTX by NVRTC, which JAX's CUDA packages bring along, and PTX into XLA's programs.

No compiler needs to be installed, and a kernel is part of the program's CUDA graph like XLA's own."""

import ctypes
import functools
import importlib.util
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

# bytes of shared memory that one block may have (CUDA C++ Programming Guide, technical specifications per capability)
SHARED = {"8.0": 166_912, "8.7": 166_912, "9.0": 232_448, "10.0": 232_448, "10.3": 232_448}
SHARED_ELSE = 101_376
# The driver compiles PTX, and refuses a version newer than itself, which NVRTC writes where it is newer. Ours needs no
# more than 8.1 (CUDA 12.1: a kernel's arguments may take more than 4 KiB).
PTX_VERSION, DRIVER = "8.1", 12010


class CudaError(RuntimeError):
    """NVRTC is not there, or does not take the source."""


@dataclass(frozen=True)
class Gpu:
    """What a kernel must know of the GPU that it is compiled for."""

    capability: str  # as "9.0"
    multiprocessors: int

    @property
    def shared_bytes(self) -> int:
        return SHARED.get(self.capability, SHARED_ELSE)


def gpu(device: jax.Device) -> Gpu | None:
    """None where CUDA kernels of ours cannot run: no NVIDIA GPU, one below compute capability 8.0, no NVRTC, a driver
    older than CUDA 12.1."""
    capability = getattr(device, "compute_capability", "")
    if not capability.replace(".", "").isdigit() or float(capability) < 8 or _library() is None or _driver() < DRIVER:
        return None
    return Gpu(capability, device.core_count)


@functools.cache
def compile_ptx(source: str, capability: str) -> str:
    """Raises:
    CudaError: with NVRTC's log.
    """
    nvrtc = _library()
    if nvrtc is None:
        raise CudaError("NVRTC (libnvrtc) was not found; it comes with the packages of jax[cuda12] and jax[cuda13]")
    program = ctypes.c_void_p()
    _check(nvrtc, nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"jaxinfer.cu", 0, None, None))
    options = [b"--std=c++17", f"--gpu-architecture=compute_{capability.replace('.', '')}".encode()]
    failed = nvrtc.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options))
    log = _text(nvrtc, "ProgramLog", program)
    if failed:
        raise CudaError(f"NVRTC does not take the source:\n{log}")
    ptx = _text(nvrtc, "PTX", program)
    if float(capability) >= 10:  # known to newer versions only
        return ptx
    ptx = re.sub(r'^\s*\.pragma "used_bytes_mask.*\n', "", ptx, flags=re.MULTILINE)  # a hint, newer too
    return re.sub(r"^\.version .*", f".version {PTX_VERSION}", ptx, count=1, flags=re.MULTILINE)


def call(
    ptx: str,
    name: str,
    operands: Sequence[jax.Array],
    results: Sequence[jax.ShapeDtypeStruct],
    aliases: Mapping[int, int],
    blocks: int,
    threads: int,
    shared_bytes: int,
) -> list[jax.Array]:
    """Runs the kernel `name` of `ptx`; its arguments are pointers to the operands, then to the results.

    `aliases`: operand to the result that is the same memory.
    """
    sizes = {"grid_x": blocks, "block_x": threads, "shared_mem_bytes": shared_bytes}
    sizes |= {"grid_y": 1, "grid_z": 1, "block_y": 1, "block_z": 1}
    run = jax.ffi.ffi_call("__gpu$xla.gpu.ptx", list(results), input_output_aliases=dict(aliases))
    fields: dict[str, Any] = {each: np.int32(size) for each, size in sizes.items()}
    return run(*operands, name=name, kernel_type="ptx", kernel_data=ptx, **fields)


@functools.cache
def _library() -> ctypes.CDLL | None:
    found = importlib.util.find_spec("nvidia")
    places = [Path(each) for each in (found.submodule_search_locations if found else None) or []]
    for path in (path for place in places for path in sorted(place.glob("*/lib/libnvrtc.so.*"))):
        try:
            # some versions look for this one by its name alone, which finds what is loaded
            for builtins in path.parent.glob("libnvrtc-builtins.so.*"):
                ctypes.CDLL(str(builtins))
            return ctypes.CDLL(str(path))
        except OSError:
            continue
    for name in ("libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so"):
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    return None


def _driver() -> int:
    """The CUDA version of the driver, 12010 for 12.1; 0 without one."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    version = ctypes.c_int()
    driver.cuDriverGetVersion(ctypes.byref(version))
    return version.value


def _check(nvrtc: ctypes.CDLL, status: int) -> None:
    if status:
        nvrtc.nvrtcGetErrorString.restype = ctypes.c_char_p
        raise CudaError(f"NVRTC: {nvrtc.nvrtcGetErrorString(status).decode()}")


def _text(nvrtc: ctypes.CDLL, what: str, program: ctypes.c_void_p) -> str:
    size = ctypes.c_size_t()
    _check(nvrtc, getattr(nvrtc, f"nvrtcGet{what}Size")(program, ctypes.byref(size)))
    text = ctypes.create_string_buffer(size.value)
    _check(nvrtc, getattr(nvrtc, f"nvrtcGet{what}")(program, text))
    return text.value.decode()
