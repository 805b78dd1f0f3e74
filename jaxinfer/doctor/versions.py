"""What must be equal on all ranks: versions, the sources, flags in the environment."""

import hashlib
import importlib.metadata
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jaxinfer
from jaxinfer.cluster.visible import visible_devices
from jaxinfer.doctor.finding import Finding, error, ok

PACKAGES = ("jax", "jaxlib", "jax-cuda12-plugin", "jax-cuda13-plugin", "nvidia-nccl-cu12", "nvidia-nccl-cu13")
PACKAGES += ("flax", "numpy", "transformers")
NEEDED = ("jax", "jaxlib", "flax", "numpy")
PREFIXES = ("XLA_", "JAX_", "NCCL_", "LIBTPU_")
NAMES = ("NPROC", "PJRT_NPROC", "LD_LIBRARY_PATH", "PYTHONPATH", "CUDA_DEVICE_ORDER", "CUDA_HOME")
# each rank has its own
OWN = ("JAX_PROCESS_ID",)


def check_versions(env: Mapping[str, str]) -> tuple[list[Finding], dict[str, Any]]:
    versions = {"python": platform.python_version(), "jaxinfer": f"{jaxinfer.__version__} (sources {source_hash()})"}
    missing = []
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            missing += [name] if name in NEEDED else []
    flags = {name: value for name, value in env.items() if is_flag(name)}
    listed = visible_devices(env)
    # the numbers may differ from rank to rank, how many there are should not
    flags["GPUs in CUDA_VISIBLE_DEVICES"] = "not set" if listed is None else str(len(listed))
    facts = {"versions": versions, "flags": flags}
    if missing:
        what = f"{', '.join(missing)} not installed beside {platform.python_version()} of {platform.node()}"
        return [error("versions", what, "is the environment activated on this node? pip install jaxinfer")], facts
    text = ", ".join(f"{name} {value}" for name, value in versions.items())
    found = [ok("versions", text)]
    ours = {name: value for name, value in flags.items() if name.startswith(PREFIXES)}
    if ours:
        found.append(ok("flags", " ".join(f"{name}={value}" for name, value in sorted(ours.items()))))
    return found, facts


def is_flag(name: str) -> bool:
    return (name.startswith(PREFIXES) or name in NAMES) and name not in OWN


def source_hash() -> str:
    """Eight digits that change with any of this package's source files: two nodes may see different copies."""
    digest, root = hashlib.sha256(), Path(jaxinfer.__file__).parent
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:8]
