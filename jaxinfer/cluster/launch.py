"""Which process of which run this is: from the command's options, or from Slurm."""

import re
import socket
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs

from jaxinfer.cluster.slurm import ClusterError, read_step

SCONTROL_S = 5.0  # for a controller that is busy: the answer is a warning's


LOOPBACK = "127.0.0.1"


@attrs.frozen
class Launch:
    """One process of a run.

    Attributes:
      host, ports: where process 0 listens for the others: at the first of these that is free there.
      num_processes, process_id: how many, and which one this is.
      gpus: those of this process, as indices into the visible ones; None: all that are visible.
      hosts: of each process, as far as it is known before they meet ("" where not).
      run: tells this run from others that might use the same port.
      step: ``job.step`` for scancel; None outside of Slurm.
    """

    host: str
    ports: tuple[int, ...]
    num_processes: int
    process_id: int
    gpus: tuple[int, ...] | None
    hosts: tuple[str, ...]
    run: str
    step: str | None = None

    @property
    def name(self) -> str:
        return f"rank {self.process_id}/{self.num_processes} on {socket.gethostname()}"

    @property
    def on_one_node(self) -> bool:
        """Whether the processes need no address that others can reach."""
        return len(set(self.hosts)) == 1 or self.host in ("localhost", LOOPBACK)

    @property
    def address(self) -> str:
        """Of process 0, for the others."""
        return LOOPBACK if self.on_one_node else self.host

    @property
    def port_text(self) -> str:
        return " or ".join(map(str, self.ports))

    @property
    def place(self) -> str:
        """Where process 0 is looked for."""
        return f"{self.host}:{self.port_text}"


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
        return Launch(host, (found,), num_processes, process_id, None, hosts, coordinator)
    step = read_step(env, count_gpus())
    if step is None:
        return None
    if port is not None and not 0 < port < 65536:
        raise ClusterError(f"port: found {port}, legal is 1 to 65535")
    return Launch(
        host=step.hosts[0],
        ports=(port,) if port else step.ports,
        num_processes=step.num_processes,
        process_id=step.process_id,
        gpus=step.gpus,
        hosts=tuple(host for host, count in zip(step.hosts, step.tasks) for _ in range(count)),
        run=step.run,
        step=f"{step.job}.{step.step}",
    )


def slurm_place(env: Mapping[str, str], launch: Launch | None) -> dict[str, Any] | None:
    """``job``, ``step`` (None without srun) and the names of the ``nodes`` of this run; None outside of a job."""
    if launch is not None and launch.step is not None:
        job, _, step = launch.step.partition(".")
        return {"job": job, "step": step, "nodes": list(dict.fromkeys(launch.hosts))}
    if "SLURM_JOB_ID" not in env:
        return None
    return {"job": env["SLURM_JOB_ID"], "step": None, "nodes": [env.get("SLURMD_NODENAME", socket.gethostname())]}


def missed_srun(env: Mapping[str, str], launch: Launch | None) -> str | None:
    """A warning for a process that runs alone in a job of several tasks: without srun, or in a step of one task."""
    if "SLURM_JOB_ID" not in env or (launch is not None and (launch.step is None or launch.num_processes > 1)):
        return None
    tasks = env.get("SLURM_NTASKS", "1")
    if launch is None or env.get("SLURM_STEP_NUM_TASKS", tasks) != tasks:  # the latter: the shell that salloc started
        alone = f"this job has {tasks} tasks, but without srun in front of the command one process runs alone"
        return alone if tasks != "1" else None
    job = _job_tasks(env)
    idle = f"this step has one task, its job {job}: the others idle, unless other steps use them (srun --ntasks={job})"
    return idle if job > 1 else None


def _job_tasks(env: Mapping[str, str]) -> int:
    """Tasks of the job that a step of one task belongs to, as far as can be known. srun puts its own over the job's."""

    def number(text: str | None) -> int:
        return int(text) if text and re.fullmatch("[0-9]+", text) else 1

    told = number(env.get("SLURM_JOB_NUM_NODES")) * number(env.get("SLURM_NTASKS_PER_NODE"))
    # more processors than this task's may be other tasks, or come with whole cores and nodes: only Slurm knows
    if told > 1 or number(env.get("SLURM_JOB_CPUS_PER_NODE")) <= number(env.get("SLURM_CPUS_PER_TASK")):
        return told
    command = ["scontrol", "--oneliner", "show", "job", env["SLURM_JOB_ID"]]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=SCONTROL_S).stdout
    except (OSError, subprocess.TimeoutExpired):
        return told
    found = re.search(r"\bNumTasks=([0-9]+)", answer)
    return int(found[1]) if found else told


def parse_address(text: str) -> tuple[str, int]:
    """``host:port``; an IPv6 address stands in brackets."""
    host, _, port = text.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ClusterError(f"coordinator: found {text!r}, legal is host:port")
    return host.strip("[]"), int(port)


def count_gpus(devices: Path = Path("/dev")) -> int:
    """NVIDIA GPUs that this machine, or its container, shows."""
    return sum(bool(re.fullmatch(r"nvidia\d+", each.name)) for each in devices.iterdir())
