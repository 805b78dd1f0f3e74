"""What ran: versions, machine, command."""

import importlib.metadata
import platform
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxinfer.telemetry.software import gpu_versions

PACKAGES = ("jax", "jaxlib", "flax", "numpy", "transformers")


def describe_run(version: str, flags: Mapping[str, Any], mesh: Mapping[str, int], hosts: list[str]) -> dict[str, Any]:
    """A run as JSON: `version` of this package, the command's flags, the mesh, and the host of each process. ``gpus``
    are the names of all devices that are some, in JAX's order; versions below JAX are of this process's host."""
    import jax

    devices = jax.devices()
    packages = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": sys.argv,
        "flags": dict(flags),
        "mesh": dict(mesh),
        "devices": {"kind": devices[0].device_kind, "count": len(devices), "processes": jax.process_count()},
        "hosts": hosts,
        "versions": {"jaxinfer": version, "python": platform.python_version(), **packages},
        "gpus": [device.device_kind for device in devices if device.platform == "gpu"],
        **gpu_versions(),
        "commit": git_commit(Path(__file__).parent),
    }


def git_commit(folder: Path) -> str | None:
    """The commit that `folder` is checked out at, with ``+`` where tracked files differ from it; None outside git."""

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10, check=True
        )
        return done.stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None
