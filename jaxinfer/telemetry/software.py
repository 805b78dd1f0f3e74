"""Versions of what runs below JAX on GPUs: the driver, CUDA, NCCL."""

import ctypes
import importlib.metadata
import os
from collections.abc import Callable

CUDA_PACKAGES = ("nvidia-cuda-runtime", "nvidia-cuda-runtime-cu13", "nvidia-cuda-runtime-cu12")
NCCL_PACKAGES = ("nvidia-nccl-cu13", "nvidia-nccl-cu12")


def gpu_versions() -> dict[str, str | None]:
    """``driver``, ``cuda`` and ``nccl`` as JAX uses them; None on other devices, and where nobody tells."""
    import jax

    if jax.default_backend() != "gpu":
        return {"driver": None, "cuda": None, "nccl": None}
    return {
        "driver": _asked(_driver),
        "cuda": _asked(_cuda) or _package(CUDA_PACKAGES),
        "nccl": _asked(_nccl) or _package(NCCL_PACKAGES),
    }


def cuda_text(version: int) -> str:
    """12080 as 12.8."""
    return f"{version // 1000}.{version % 1000 // 10}"


def nccl_text(version: int) -> str:
    """22703 as 2.27.3."""
    return f"{version // 10000}.{version % 10000 // 100}.{version % 100}"


def _driver() -> str:
    import pynvml

    pynvml.nvmlInit()
    try:
        return pynvml.nvmlSystemGetDriverVersion()
    finally:
        pynvml.nvmlShutdown()


def _cuda() -> str:
    from jax._src.lib import cuda_versions

    return cuda_text(cuda_versions.cuda_runtime_get_version())


def _nccl() -> str:
    library = ctypes.CDLL("libnccl.so.2", mode=os.RTLD_NOLOAD | os.RTLD_LAZY)  # the one that JAX has, if it has by now
    version = ctypes.c_int()
    library.ncclGetVersion(ctypes.byref(version))
    return nccl_text(version.value)


def _asked(question: Callable[[], str]) -> str | None:
    try:
        return question()
    except Exception:  # a version is no reason to end a run
        return None


def _package(names: tuple[str, ...]) -> str | None:
    for name in names:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            pass
    return None
