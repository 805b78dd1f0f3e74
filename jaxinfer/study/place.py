"""Where the cells of a study run: this host's GPUs or virtual CPU devices, or the nodes of a cluster."""

import json
import os
import subprocess
import sys

import attrs

from jaxinfer.cluster.cpu import MOST_DEVICES
from jaxinfer.cluster.visible import visible_devices
from jaxinfer.study.errors import StudyError
from jaxinfer.study.file import Study

LOOK_S = 60.0


@attrs.frozen
class Seats:
    """Devices of a cell: `per_node` on each of `nodes`."""

    nodes: int
    per_node: int


@attrs.frozen(kw_only=True)
class Place:
    """Attributes:
    device_kind: of what cells are measured on, a part of their identity.
    gpu: the type as `jaxinfer.plan` knows it, None for CPUs and for types it does not know.
    per_node: GPUs of a node, 0 for CPUs; nodes: of a CPU cluster, how many a mesh is spread over at most.
    here: devices at hand, None on a cluster, which takes jobs of any size.
    gpus: names of this host's GPUs for CUDA_VISIBLE_DEVICES.
    inside: whether cells are steps of the allocation that this process is in.
    """

    device_kind: str
    cluster: str | None = None
    gpu: str | None = None
    per_node: int = 0
    nodes: int = 1
    here: int | None = None
    gpus: tuple[str, ...] = ()
    inside: bool = False

    def seats(self, devices: int) -> Seats:
        """Raises:
        StudyError: so many devices cannot be had here, or not in equal parts of nodes.
        """
        if self.here is not None:
            if devices > self.here:
                what = "cpu_devices gives" if not self.gpus else "this host has"
                raise StudyError(f"the mesh needs {devices} devices, {what} {self.here}")
            return Seats(1, devices)
        nodes = -(-devices // self.per_node) if self.per_node else min(self.nodes, devices)
        if devices % nodes:
            what = f"nodes of {self.per_node} GPUs" if self.per_node else f"{nodes} nodes"
            raise StudyError(f"the mesh's {devices} devices do not spread evenly over {what}")
        return Seats(nodes, devices // nodes)

    def gpus_asked(self, seats: Seats) -> str | None:
        """``2x4xA100-64`` for `jaxinfer.plan`; None where it knows no such GPU."""
        if self.gpu is None:
            return None
        return f"{seats.nodes}x{seats.per_node}x{self.gpu}" if self.cluster else f"{seats.per_node}x{self.gpu}"

    def __str__(self) -> str:
        if self.cluster is None:
            return (
                f"this host, {self.here} x {self.device_kind}" if self.gpus else f"this host, {self.here} CPU devices"
            )
        kind = f"nodes of {self.per_node} x {self.device_kind}" if self.per_node else "CPU nodes"
        return f"{self.cluster}: {kind}{', steps of this allocation' if self.inside else ''}"


def find_place(study: Study, cluster: str | None) -> Place:
    """`cluster`: a preset's name or file, over the study's.

    Raises:
      StudyError: no such cluster, no GPU, or more GPUs per node than there are.
    """
    cluster = cluster or study.cluster
    if cluster is not None:
        return _cluster(study, cluster)
    if study.gpus_per_node is not None:
        raise StudyError("gpus_per_node: legal with a cluster alone; on one host the meshes say how many")
    if study.cpu_devices is not None:
        if study.cpu_devices > MOST_DEVICES:
            raise StudyError(f"cpu_devices: found {study.cpu_devices}, legal is 1 to {MOST_DEVICES}")
        return Place(device_kind="cpu", here=study.cpu_devices)
    return _this_host()


def _this_host() -> Place:
    from jaxinfer.doctor.gpus import visible_gpus
    from jaxinfer.plan.hardware import GPUS

    found = visible_gpus(os.environ)
    if not found:
        raise StudyError(
            "no GPU here (NVML shows none), and the study has no cpu_devices; legal: cpu_devices: N for virtual CPU "
            "devices, or --cluster NAME"
        )
    name = found[0]["name"]
    if other := next((each["name"] for each in found if each["name"] != name), None):
        raise StudyError(f"GPUs of different kinds here ({name}, {other}): choose with CUDA_VISIBLE_DEVICES")
    names = visible_devices(os.environ) or [str(each["index"]) for each in found]
    gpu = next((each.name for each in GPUS.values() if each.device_kind == name), None)
    return Place(device_kind=name, gpu=gpu, here=len(found), gpus=tuple(names[: len(found)]))


def _cluster(study: Study, cluster: str) -> Place:
    command = [sys.executable, "-m", "slurm.submit", "--show-cluster", cluster]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=LOOK_S)
        told = json.loads(done.stdout) if done.returncode == 0 else None
    except (OSError, subprocess.TimeoutExpired, ValueError) as error:
        raise StudyError(f"cluster {cluster}: {' '.join(command[1:])}: {error}") from None
    if told is None:
        said = (done.stderr.strip().splitlines() or [f"slurm.submit ended with {done.returncode}"])[-1]
        raise StudyError(f"cluster {cluster}: {said.removeprefix('slurm.submit: error: ')}")
    per_node, kind = told["gpus_per_node"], told["gpu"] or f"GPU of {told['cluster']}"
    if study.gpus_per_node is not None:
        if study.gpus_per_node > per_node:
            raise StudyError(f"gpus_per_node: found {study.gpus_per_node}, nodes of {cluster} have {per_node}")
        per_node = study.gpus_per_node
    return Place(
        device_kind=kind if per_node else "cpu",
        cluster=cluster,
        gpu=told["gpu"] if per_node else None,
        per_node=per_node,
        nodes=told["nodes"],
        inside="SLURM_JOB_ID" in os.environ,
    )
