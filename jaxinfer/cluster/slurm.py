"""What Slurm tells the tasks of an srun step, as pure functions of their environment."""

import hashlib
import re
import struct
from collections.abc import Callable, Mapping
from itertools import product
from typing import Any

import attrs

from jaxinfer.cluster.visible import visible_devices

FIRST_PORT, PORTS = 61440, 4096  # above the ports that Linux hands out by itself
CHOICES = 4  # ports of a step
STEPS = 64  # steps of one job whose first ports differ
# what Slurm itself counts these steps as
NAMED_STEPS = {"interactive": 0xFFFFFFFA, "batch": 0xFFFFFFFB, "extern": 0xFFFFFFFC}
ADVICE = (
    "srun sets it for each task: start the command by srun itself, and let a container or wrapper pass Slurm's "
    "variables on; or give --coordinator HOST:PORT --num-processes N --process-id I"
)


class ClusterError(RuntimeError):
    """Processes that cannot find each other, or a launch that cannot work: the message says what would be right."""


@attrs.frozen
class Step:
    """A task's view of its srun step.

    Attributes:
      job, step, restart: ids, and how often the job was requeued.
      hosts: the nodes of the step.
      tasks: how many tasks each of them has.
      node: index of this task's node in `hosts`.
      local: this task's number on its node.
      task: its number in the step (SLURM_PROCID), which depends on ``--distribution``.
      gpus: the GPUs that are this task's, as indices into those that it can see; None where nothing tells of GPUs.
    """

    job: int
    step: int
    restart: int
    hosts: tuple[str, ...]
    tasks: tuple[int, ...]
    node: int
    local: int
    task: int
    gpus: tuple[int, ...] | None

    @property
    def process_id(self) -> int:
        """Node by node under any ``--distribution``: consecutive devices of a mesh then share a node."""
        return sum(self.tasks[: self.node]) + self.local

    @property
    def num_processes(self) -> int:
        return sum(self.tasks)

    @property
    def run(self) -> str:
        """Tells this start of this step from every other."""
        return f"{self.job}.{self.step}.{self.restart}"

    @property
    def ports(self) -> tuple[int, ...]:
        """Of the job and the step, to be tried in this order: others may have the first, or all but one."""
        first = self.job * STEPS + self.step % STEPS
        # as if by chance: of two jobs that have one of them in common the next differ
        digest = hashlib.sha256(f"{self.job}.{self.step}".encode()).digest()
        more = struct.unpack_from(f"!{CHOICES - 1}H", digest)
        return tuple(FIRST_PORT + number % PORTS for number in (first, *more))


def expand_hosts(text: str) -> list[str]:
    """``a[01-03,7],b2`` to its host names, in order.

    Raises:
      ClusterError: not a Slurm host list.
    """
    parts = re.findall(r"(?:[^,\[\]]|\[[^\[\]]*\])+", text)
    if not text or ",".join(parts) != text:
        raise ClusterError(f"host list: found {text!r}, legal is a list such as a[01-03,7],b2")
    return [host for part in parts for host in _expand_name(part)]


def _expand_name(name: str) -> list[str]:
    pieces = re.split(r"\[([^\]]*)\]", name)  # plain text and bracket contents in turn
    choices = [_expand_ranges(piece) if place % 2 else [piece] for place, piece in enumerate(pieces)]
    return ["".join(each) for each in product(*choices)]


def _expand_ranges(text: str) -> list[str]:
    numbers = []
    for part in text.split(","):
        found = re.fullmatch(r"([0-9]+)(?:-([0-9]+))?", part)
        if not found or int(found[2] or found[1]) < int(found[1]):
            raise ClusterError(f"host list: found [{text}], legal are numbers and ranges such as [01-03,7]")
        low, high = found[1], found[2] or found[1]
        # leading zeros are part of a name: 01-03 are three names of two digits
        numbers += [str(each).zfill(len(low)) for each in range(int(low), int(high) + 1)]
    return numbers


def expand_counts(text: str) -> list[int]:
    """``2(x3),1`` to 2, 2, 2, 1.

    Raises:
      ClusterError: not a list of Slurm's counts.
    """
    counts = []
    for part in text.split(","):
        found = re.fullmatch(r"([0-9]+)(?:\(x([0-9]+)\))?", part)
        if not found:
            raise ClusterError(f"tasks per node: found {text!r}, legal is a list such as 2(x3),1")
        counts += [int(found[1])] * int(found[2] or 1)
    return counts


def in_step(env: Mapping[str, str]) -> bool:
    """Whether srun started this process.

    A batch script has job variables and a task number 0, but no step, unless one of another job was left to it: by
    sbatch in a shell that srun had started.

    Raises:
      ClusterError: a step's node list that cannot be read.
    """
    named = {"SLURM_STEP_NODELIST", "SLURM_STEP_TASKS_PER_NODE", "SLURM_STEP_NUM_TASKS"} & env.keys()
    if env.get("SLURM_PROCID", "0") != "0":
        return True
    if not named:
        return False
    here, hosts = env.get("SLURMD_NODENAME"), env.get("SLURM_STEP_NODELIST")
    return not (here and hosts) or here in _read(env, "SLURM_STEP_NODELIST", expand_hosts)


def read_step(env: Mapping[str, str], gpus_present: int = 0) -> Step | None:
    """The step that this task belongs to; None outside of one.

    `gpus_present` is how many GPUs the machine shows where neither Slurm nor CUDA_VISIBLE_DEVICES says anything.

    Raises:
      ClusterError: variables that are missing, odd or contradict each other, GPUs that do not divide among the tasks.
    """
    if not in_step(env):
        return None
    hosts = tuple(_read(env, "SLURM_STEP_NODELIST", expand_hosts))
    tasks = tuple(_read(env, "SLURM_STEP_TASKS_PER_NODE", expand_counts))
    node, local, task = (_read(env, f"SLURM_{name}", _whole) for name in ("NODEID", "LOCALID", "PROCID"))
    if len(hosts) != len(tasks) or not (node < len(hosts) and local < tasks[node] and task < sum(tasks)):
        raise ClusterError(
            f"SLURM_STEP_NODELIST={env['SLURM_STEP_NODELIST']} and SLURM_STEP_TASKS_PER_NODE="
            f"{env['SLURM_STEP_TASKS_PER_NODE']} do not fit SLURM_NODEID={node}, SLURM_LOCALID={local} and "
            f"SLURM_PROCID={task}: was a variable changed after srun had set it?"
        )
    return Step(
        job=_read(env, "SLURM_JOB_ID", _whole),
        step=_read(env, "SLURM_STEP_ID", _step_number, default="0"),
        restart=_read(env, "SLURM_RESTART_COUNT", _whole, default="0"),
        hosts=hosts,
        tasks=tasks,
        node=node,
        local=local,
        task=task,
        gpus=_own_gpus(env, gpus_present, tasks[node], local, hosts[node]),
    )


def _read(env: Mapping[str, str], name: str, parse: Callable[[str], Any], default: str | None = None) -> Any:
    """A variable's value; one that is empty counts as not set."""
    text = env.get(name) or default
    if text is None:
        raise ClusterError(f"{name} is not set for {_who(env)}; {ADVICE}")
    try:
        return parse(text)
    except ClusterError as error:
        raise ClusterError(f"{name}={text} of {_who(env)}: {error}; {ADVICE}") from None


def _who(env: Mapping[str, str]) -> str:
    where = env.get("SLURMD_NODENAME")
    return f"rank {env.get('SLURM_PROCID', '?')}" + (f" on {where}" if where else "")


def _whole(text: str) -> int:
    if not re.fullmatch("[0-9]+", text):
        raise ClusterError(f"found {text!r}, legal is a whole number")
    return int(text)


def _step_number(text: str) -> int:
    return NAMED_STEPS[text] if text in NAMED_STEPS else _whole(text)


def _own_gpus(env: Mapping[str, str], present: int, tasks: int, local: int, host: str) -> tuple[int, ...] | None:
    on_node = _read(env, "SLURM_GPUS_ON_NODE", _whole, default=str(present))
    listed = visible_devices(env)
    visible = len(listed) if listed is not None else present or on_node
    if not visible:
        return None
    # where CUDA_VISIBLE_DEVICES is not set, nothing is bound (--gpu-bind=none), whatever the job's options were
    if tasks == 1 or (listed is not None and _bound_to_tasks(env)) or visible < on_node:
        return tuple(range(visible))
    # every task sees every GPU
    if visible % tasks:
        raise ClusterError(
            f"{host}: {visible} visible GPUs do not divide among {tasks} tasks; legal is one task per node, or as many "
            "tasks as GPUs (--ntasks-per-node), or --gpus-per-task"
        )
    share = visible // tasks
    return tuple(range(local * share, (local + 1) * share))


def _bound_to_tasks(env: Mapping[str, str]) -> bool:
    bound = env.get("SLURMD_TRES_BIND", "") + "," + env.get("SLURM_GPU_BIND", "")
    return bool(re.search(r"per_task|single|map|mask", bound)) or "SLURM_GPUS_PER_TASK" in env
