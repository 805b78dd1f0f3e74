"""The NVIDIA driver, the CUDA libraries that JAX would load, and JAX's plugin: what is there, what is missing."""

import ctypes
import importlib.metadata
import importlib.util
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxinfer.doctor.finding import Finding, error, ok, warning

# in the order in which one needs another; {} is CUDA's main version
LIBRARIES = ("libcudart.so.{}", "libcublasLt.so.{}", "libcublas.so.{}", "libcudnn.so.9", "libnccl.so.2")
OLDEST_DRIVER = {12: "525", 13: "580"}


def check_cuda(env: Mapping[str, str], gpus: int, container: str) -> tuple[list[Finding], dict[str, Any]]:
    """`gpus`: how many are visible to this process."""
    driver, plugins = driver_version(), plugin_versions()
    in_kernel = Path("/proc/driver/nvidia/version").exists() or Path("/dev/nvidiactl").exists()
    given = _given(env)
    facts = {"driver_cuda": driver and f"{driver // 1000}.{driver % 1000 // 10}", "plugins": plugins}
    findings = platform_findings(env.get("JAX_PLATFORMS", ""), gpus)
    if driver is None:
        return [*findings, *_no_driver(in_kernel, given, container, plugins)], facts
    findings += [ok("driver", f"libcuda.so.1 is there, for CUDA up to {facts['driver_cuda']}")]
    if not gpus:
        facts["no_nvml"] = not _loads("libnvidia-ml.so.1")
        if facts["no_nvml"]:
            what = "libnvidia-ml.so.1 cannot be loaded: nothing can be said about GPUs beforehand"
            findings.append(
                warning("GPUs", what, "it belongs to the driver, beside libcuda.so.1; in a container: --nv")
            )
        elif given:
            what = f"Slurm gave GPUs ({given}), but none is visible"
            findings.append(error("GPUs", what, "look at CUDA_VISIBLE_DEVICES and --gpu-bind; ask the administrators"))
        else:
            findings.append(ok("GPUs", "no GPU: JAX runs on the CPU"))
        return findings, facts
    findings += plugin_findings(plugins, importlib.metadata.version("jaxlib"), driver // 1000)
    if len(plugins) == 1:
        findings += _libraries(next(iter(plugins)))
    return [*findings, *_shadowing(env)], facts


def driver_version() -> int | None:
    """CUDA's version that the driver is made for, as 12040 for 12.4; None where libcuda cannot be loaded."""
    try:
        library, version = ctypes.CDLL("libcuda.so.1"), ctypes.c_int()
        return version.value if library.cuDriverGetVersion(ctypes.byref(version)) == 0 else None
    except (OSError, AttributeError):
        return None


def _loads(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


def plugin_versions() -> dict[str, str]:
    """JAX's CUDA plugins that are installed: 12 and 13 (as text) to their version."""
    found = {}
    for major in OLDEST_DRIVER:
        try:
            found[str(major)] = importlib.metadata.version(f"jax-cuda{major}-plugin")
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def plugin_findings(plugins: Mapping[str, str], jaxlib: str, driver: int) -> list[Finding]:
    """Whether the plugin fits jaxlib and the driver, which is made for CUDA `driver` (12, say)."""
    best = 13 if driver >= 13 else 12
    if not plugins:
        what = "JAX has no CUDA plugin: it would run on the CPU"
        return [error("plugin", what, f"pip install 'jaxinfer[cuda{best}]'")]
    if len(plugins) > 1:
        what = "the plugins for CUDA 12 and 13 are both installed: JAX takes one of them"
        return [warning("plugin", what, f"pip uninstall jax-cuda{25 - best}-plugin jax-cuda{25 - best}-pjrt")]
    ((major, version),) = plugins.items()
    name = f"jax-cuda{major}-plugin"
    # the plugin may have a post-release of its own
    if re.sub(r"\.post\d+$", "", version) != jaxlib:
        what = f"{name} is {version}, jaxlib {jaxlib}: JAX refuses the plugin"
        return [error("plugin", what, f"pip install {name}=={jaxlib} jax-cuda{major}-pjrt=={jaxlib}")]
    if int(major) > driver:
        what = (
            f"{name} needs a driver for CUDA {major} ({OLDEST_DRIVER[int(major)]} or newer), this one ends at {driver}"
        )
        return [
            error("plugin", what, f"pip uninstall {name} jax-cuda{major}-pjrt; pip install 'jaxinfer[cuda{driver}]'")
        ]
    return [ok("plugin", f"{name} {version} fits jaxlib and the driver")]


def platform_findings(platforms: str, gpus: int) -> list[Finding]:
    """What JAX_PLATFORMS asks for, against the GPUs that are there."""
    first, fix = platforms.partition(",")[0], "unset JAX_PLATFORMS"
    if first in ("cuda", "gpu") and not gpus:
        return [error("platform", f"JAX_PLATFORMS={platforms}, but no GPU is visible: JAX does not start", fix)]
    if first == "cpu" and gpus:
        return [warning("platform", f"JAX_PLATFORMS={platforms}: the GPUs stay idle", fix)]
    return []


def _given(env: Mapping[str, str]) -> str:
    names = ("SLURM_STEP_GPUS", "SLURM_JOB_GPUS", "SLURM_GPUS_ON_NODE")
    return next((f"{name}={env[name]}" for name in names if env.get(name)), "")


def _no_driver(in_kernel: bool, given: str, container: str, plugins: Mapping[str, str]) -> list[Finding]:
    evidence = f"Slurm gave GPUs ({given})" if given else "NVIDIA's kernel driver runs on this node"
    what = f"libcuda.so.1 is missing in the container, but {evidence}"
    if container == "Apptainer" and (in_kernel or given):
        return [
            error("driver", what, "apptainer exec --nv ...; inside, LD_LIBRARY_PATH must keep /.singularity.d/libs")
        ]
    if container and (in_kernel or given):
        return [error("driver", what, "docker run --gpus all ... (NVIDIA container toolkit)")]
    if in_kernel:
        what = "NVIDIA's kernel driver runs, but libcuda.so.1 is not found"
        return [
            error("driver", what, "add its folder to LD_LIBRARY_PATH (`find / -name 'libcuda.so.1'`), or run ldconfig")
        ]
    if given:
        what = f"Slurm gave GPUs ({given}), but there is no NVIDIA driver on this node"
        return [error("driver", what, "show it to the administrators: the driver is not loaded, or no such GPUs exist")]
    if plugins:
        what = "JAX's CUDA plugin is installed, but there is no GPU: JAX runs on the CPU"
        return [warning("GPUs", what, "on a login node that is normal; in a job ask for GPUs: --gpus-per-node")]
    return [ok("GPUs", "no GPU: JAX runs on the CPU")]


def _libraries(major: str) -> list[Finding]:
    """Loads them as JAX does: from the wheels, else where the loader looks."""
    findings, loaded = [], []
    for name in (each.format(major) for each in LIBRARIES):
        try:
            ctypes.CDLL(wheel_library(name) or name)
        except OSError as problem:
            fix = f"pip install 'jaxinfer[cuda{major}]' brings them; else add their folder to LD_LIBRARY_PATH"
            findings.append(error("libraries", f"{name} cannot be loaded: {problem}", fix))
        else:
            loaded.append(name)
    return [*findings, *([ok("libraries", f"{', '.join(loaded)} can be loaded")] if loaded else [])]


def wheel_library(name: str) -> str | None:
    """The file of a library in NVIDIA's wheels (``nvidia/*/lib``); None where no wheel has it."""
    spec = importlib.util.find_spec("nvidia")
    for root in (spec.submodule_search_locations or []) if spec else []:
        for path in Path(root).glob(f"*/lib/{name}"):
            return str(path)
    return None


def _shadowing(env: Mapping[str, str]) -> list[Finding]:
    """Libraries that the loader would take before those of the wheels."""
    for folder in filter(None, env.get("LD_LIBRARY_PATH", "").split(os.pathsep)):
        stems = [name.partition(".")[0] for name in LIBRARIES]
        found = [stem for stem in stems if any(Path(folder).glob(f"{stem}.so*"))]
        if found and "site-packages" not in folder:
            what = f"LD_LIBRARY_PATH has {', '.join(found)} in {folder}, which may hide those that JAX brings"
            return [
                warning("libraries", what, "module unload cuda cudnn nccl, or unset LD_LIBRARY_PATH, and look again")
            ]
    return []
