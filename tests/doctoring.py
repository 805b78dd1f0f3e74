"""GPUs, ports and levels of findings: what the doctor's tests share."""

from collections.abc import Iterable

from jaxinfer.doctor.finding import Finding


def levels(lines: Iterable[Finding]) -> list[str]:
    return [line.level for line in lines]


def gpu(index: int = 0, **changes) -> dict:
    found = {
        "index": index,
        "name": "NVIDIA H200",
        "uuid": f"GPU-{index}",
        "driver": "580.1",
        "total": 140 << 30,
        "free": 139 << 30,
        "capability": [9, 0],
        "processes": [],
        "ecc": 0,
        "nvlinks": 18,
        "pcie": [5, 16, 16],
        "mig": False,
        "peers": {},
    }
    return found | changes
