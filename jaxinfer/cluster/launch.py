"""Which process of which run this is: from the command's options, or from Slurm."""

import re
import socket
from collections.abc import Mapping
from pathlib import Path

import attrs

from jaxinfer.cluster.slurm import ClusterError, in_step, read_step


@attrs.frozen
class Launch:
    """One process of a run.

    Attributes:
      host, port: where process 0 listens for the others.
      num_processes, process_id: how many, and which one this is.
      gpus: those of this process, as indices into the visible ones; None: all that are visible.
      hosts: of each process, as far as it is known before they meet ("" where not).
      run: tells this run from others that might use the same port.
      step: ``job.step`` for scancel; None outside of Slurm.
    """

    host: str
    port: int
    num_processes: int
    process_id: int
    gpus: tuple[int, ...] | None
    hosts: tuple[str, ...]
    run: str
    step: str | None = None

    @property
    def name(self) -> str:
        return f"rank {self.process_id}/{self.num_processes} on {socket.gethostname()}"


def find_launch(
    env: Mapping[str, str],
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    port: int | None = None,
) -> Launch | None:
    """The options where they are given, else the srun step of `env`; None for a program of one process by itself.

    Raises:
      ClusterError: options or variables that cannot be, with what would be right.
    """
    if coordinator is not None and num_processes is not None and process_id is not None:
        host, found = parse_address(coordinator)
        if num_processes < 1 or not 0 <= process_id < num_processes:
            raise ClusterError(f"process_id: found {process_id} of {num_processes}, legal is 0 to num_processes - 1")
        hosts = (host, *("",) * (num_processes - 1))
        return Launch(host, found, num_processes, process_id, None, hosts, coordinator)
    step = read_step(env, count_gpus())
    if step is None:
        return None
    if port is not None and not 0 < port < 65536:
        raise ClusterError(f"port: found {port}, legal is 1 to 65535")
    return Launch(
        host=step.hosts[0],
        port=port or step.port,
        num_processes=step.num_processes,
        process_id=step.process_id,
        gpus=step.gpus,
        hosts=tuple(host for host, count in zip(step.hosts, step.tasks) for _ in range(count)),
        run=step.run,
        step=f"{step.job}.{step.step}",
    )


def missed_srun(env: Mapping[str, str]) -> str | None:
    """A warning for a command inside a job of several tasks that srun did not start: it uses one of them."""
    tasks = env.get("SLURM_NTASKS", "1")
    if in_step(env) or "SLURM_JOB_ID" not in env or tasks == "1":
        return None
    return f"this job has {tasks} tasks, but without srun in front of the command one process runs alone"


def parse_address(text: str) -> tuple[str, int]:
    """``host:port``; an IPv6 address stands in brackets."""
    host, _, port = text.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ClusterError(f"coordinator: found {text!r}, legal is host:port")
    return host.strip("[]"), int(port)


def count_gpus(devices: Path = Path("/dev")) -> int:
    """NVIDIA GPUs that this machine, or its container, shows."""
    return sum(bool(re.fullmatch(r"nvidia\d+", each.name)) for each in devices.iterdir())
