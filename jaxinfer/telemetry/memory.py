"""The most memory that a process and its devices had in use."""

import re
from typing import Any


def memory_peaks(nvml: dict[int, int]) -> dict[str, Any]:
    """Of this process, ``host_peak_bytes``, and of each of its ``devices`` what JAX's allocator knows of and what
    NVML saw (`nvml`, by local hardware id), which counts all that is on the card. None where nobody measured it."""
    import jax

    return {
        "host_peak_bytes": host_peak_bytes(),
        "devices": [
            {
                "device": device.local_hardware_id,
                "allocator_peak_bytes": (device.memory_stats() or {}).get("peak_bytes_in_use"),
                "nvml_peak_bytes": nvml.get(device.local_hardware_id),
            }
            for device in jax.local_devices()
        ],
    }


def host_peak_bytes() -> int | None:
    """Resident memory of this program (getrusage(2) would tell its parent's before it, where that had more)."""
    try:
        with open("/proc/self/status") as file:
            found = re.search(r"^VmHWM:\s+(\d+) kB$", file.read(), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) << 10 if found else None
