"""GPU types, as data: what the driver and the datasheets say of them.

`memory` is what CUDA reports as total where it is least (ECC on, newest drivers); bandwidths (telemetry/peaks.py) and
matmul rates are the manufacturers' (dense, SXM where there are several forms), but T4 stands with half of its 65
TFLOP/s, which 70 W do not sustain (assumed); the shares of them that programs reach are in predict.py. Links are per
GPU and direction. Between nodes they are an assumption: InfiniBand at 200 Gbit/s per GPU, half of that for V100 and
A100-64 (Leonardo's nodes), 10-Gbit Ethernet for T4. The latencies are those of NCCL's small all-reduces: measured on
H200, assumed elsewhere.
"""

import re
from collections.abc import Mapping
from math import prod

import attrs

from jaxinfer.parallel.axes import LayoutError
from jaxinfer.telemetry.peaks import memory_bandwidth

GIB = 1 << 30


@attrs.frozen
class Link:
    """Bytes per second, one way; seconds of a small collective."""

    bytes_per_s: float
    latency_s: float


NVLINK_2 = Link(150e9, 20e-6)
NVLINK_3 = Link(300e9, 17e-6)
NVLINK_4 = Link(450e9, 15e-6)
PCIE_3 = Link(12e9, 30e-6)
INFINITY = Link(50e9, 25e-6)
HDR = Link(25e9, 30e-6)
HDR100 = Link(12.5e9, 30e-6)
ETHERNET = Link(1.2e9, 100e-6)


@attrs.frozen
class GpuType:
    """`matmul`: dtype to FLOP/s. `device_kind` and `compute_capability` are as JAX gives them."""

    name: str
    device_kind: str
    compute_capability: str
    memory: int
    bandwidth: float
    matmul: Mapping[str, float]
    per_node: int
    inside: Link
    between: Link
    note: str = ""

    @property
    def bfloat16(self) -> bool:
        return "bfloat16" in self.matmul


def _type(name, kind, capability, gib, half, single, per_node, inside, between, note="") -> GpuType:
    matmul = {"float16": half * 1e12, "float32": single * 1e12}
    if not capability.startswith("7"):
        matmul["bfloat16"] = half * 1e12
    memory = int(gib * GIB)
    return GpuType(name, kind, capability, memory, memory_bandwidth(kind), matmul, per_node, inside, between, note)


NO_KERNELS = "compute capability below 8.0: no bfloat16, no hand-written kernels"
ROCM = "one GCD of two; jaxinfer has not been run on ROCm, and has no kernels there"

GPUS = {
    each.name: each
    for each in (
        _type("T4", "Tesla T4", "7.5", 14.56, 32, 8.1, 1, PCIE_3, ETHERNET, NO_KERNELS),
        _type("V100-16", "Tesla V100-SXM2-16GB", "7.0", 15.77, 125, 15.7, 4, NVLINK_2, HDR100, NO_KERNELS),
        _type("V100-32", "Tesla V100-SXM2-32GB", "7.0", 31.73, 125, 15.7, 4, NVLINK_2, HDR100, NO_KERNELS),
        _type("A100-40", "NVIDIA A100-SXM4-40GB", "8.0", 39.38, 312, 19.5, 8, NVLINK_3, HDR),
        _type("A100-64", "NVIDIA A100-SXM-64GB", "8.0", 63.42, 358, 22.4, 4, NVLINK_3, HDR100, "124 SMs, custom"),
        _type("A100-80", "NVIDIA A100-SXM4-80GB", "8.0", 79.14, 312, 19.5, 8, NVLINK_3, HDR),
        _type("H100", "NVIDIA H100 80GB HBM3", "9.0", 79.1, 989, 67, 8, NVLINK_4, HDR),
        _type("H200", "NVIDIA H200", "9.0", 139.72, 989, 67, 8, NVLINK_4, HDR),
        _type("MI250X", "AMD Instinct MI250X", "gfx90a", 63.98, 191.5, 23.9, 8, INFINITY, HDR, ROCM),
    )
}
SAME = {"V100": "V100-32", "H100-80": "H100", "H200-141": "H200"}


@attrs.frozen
class Gpus:
    """GPUs of one type, `per_node` on each node. `stated`: the size of the nodes, where it was."""

    type: GpuType
    nodes: int
    per_node: int
    stated: int | None = attrs.field(default=None, eq=False)

    @property
    def count(self) -> int:
        return self.nodes * self.per_node

    @property
    def node(self) -> int:
        """How many a whole node has."""
        return self.stated or max(self.per_node, self.type.per_node)

    def __str__(self) -> str:
        nodes = f" ({self.nodes} nodes of {self.per_node})" if self.nodes > 1 else ""
        return f"{self.count} x {self.type.name}{nodes}"

    def of(self, count: int) -> "Gpus":
        """As many of the same type: on one node if they find room there, else spread evenly."""
        per_node = max(each for each in range(1, self.node + 1) if count % each == 0)
        return Gpus(self.type, count // per_node, per_node, self.stated)


def parse_gpus(text: str) -> Gpus:
    """Reads ``T4``, ``8xA100-40`` or, nodes first, ``2x4xA100-64``.

    Raises:
      LayoutError: no such type, or not such a text.
    """
    found = re.fullmatch(r"(?:(\d+)x)?(?:(\d+)x)?([A-Za-z][\w-]*)", text.strip())
    counts = [int(each) for each in (found[1], found[2]) if each] if found else []
    if not found or not all(counts):
        raise LayoutError(f"gpus: found {text!r}, legal is 8xA100-40, or with nodes 2x4xA100-40")
    names = {name.upper(): name for name in (*GPUS, *SAME)}
    name = names.get(found[3].upper())
    if name is None:
        raise LayoutError(f"gpus: unknown type {found[3]!r}; legal: {', '.join(GPUS)}")
    type_ = GPUS[SAME.get(name, name)]
    if len(counts) == 2:
        return Gpus(type_, *counts, stated=counts[1])
    return Gpus(type_, 1, type_.per_node).of(prod(counts))


def recognise(device_kind: str, memory: int) -> GpuType | None:
    """The type of a device that is here; None where it is none of these."""
    alike = [each for each in GPUS.values() if _family(each.device_kind) == _family(device_kind)]
    near = [each for each in alike if abs(each.memory - memory) < 0.1 * memory]
    return near[0] if near else None


def _family(device_kind: str) -> str:
    return next((name for name in ("T4", "V100", "A100", "H100", "H200", "MI250X") if name in device_kind), device_kind)
