"""What Slurm tells the tasks of an srun step, as pure functions of their environment."""

import re
from collections.abc import Mapping
from itertools import product

import attrs

FIRST_PORT, PORTS = 61440, 4096  # above the ports that Linux hands out by itself
STEPS = 64  # steps of one job that have ports of their own


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
    def port(self) -> int:
        """Of the job and the step: steps of one job that run at once do not meet."""
        return FIRST_PORT + (self.job * STEPS + self.step % STEPS) % PORTS


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
        low, dash, high = part.partition("-")
        if not low.isdigit() or (dash and not (high.isdigit() and int(low) <= int(high))):
            raise ClusterError(f"host list: found [{text}], legal are numbers and ranges such as [01-03,7]")
        # leading zeros are part of a name: 01-03 are three names of two digits
        numbers += [str(each).zfill(len(low)) for each in range(int(low), int(high or low) + 1)]
    return numbers


def expand_counts(text: str) -> list[int]:
    """``2(x3),1`` to 2, 2, 2, 1.

    Raises:
      ClusterError: not a list of Slurm's counts.
    """
    counts = []
    for part in text.split(","):
        found = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if not found:
            raise ClusterError(f"tasks per node: found {text!r}, legal is a list such as 2(x3),1")
        counts += [int(found[1])] * int(found[2] or 1)
    return counts


def in_step(env: Mapping[str, str]) -> bool:
    """Whether srun started this process; a batch script has job variables, but no step."""
    return "SLURM_STEP_NODELIST" in env and "SLURM_PROCID" in env


def read_step(env: Mapping[str, str], gpus_present: int = 0) -> Step | None:
    """The step that this task belongs to; None outside of one.

    `gpus_present` is how many GPUs the machine shows where neither Slurm nor CUDA_VISIBLE_DEVICES says anything.

    Raises:
      ClusterError: variables that contradict each other, GPUs that do not divide among the tasks.
    """
    if not in_step(env):
        return None
    hosts = tuple(expand_hosts(env["SLURM_STEP_NODELIST"]))
    tasks = tuple(expand_counts(env["SLURM_STEP_TASKS_PER_NODE"]))
    node, local = int(env["SLURM_NODEID"]), int(env["SLURM_LOCALID"])
    if len(hosts) != len(tasks) or not (node < len(hosts) and local < tasks[node]):
        raise ClusterError(
            f"SLURM_STEP_NODELIST={env['SLURM_STEP_NODELIST']} and SLURM_STEP_TASKS_PER_NODE="
            f"{env['SLURM_STEP_TASKS_PER_NODE']} do not fit SLURM_NODEID={node} and SLURM_LOCALID={local}"
        )
    return Step(
        job=int(env["SLURM_JOB_ID"]),
        step=int(env.get("SLURM_STEP_ID", 0)),
        restart=int(env.get("SLURM_RESTART_COUNT", 0)),
        hosts=hosts,
        tasks=tasks,
        node=node,
        local=local,
        task=int(env["SLURM_PROCID"]),
        gpus=_own_gpus(env, gpus_present, tasks[node], local, hosts[node]),
    )


def _own_gpus(env: Mapping[str, str], present: int, tasks: int, local: int, host: str) -> tuple[int, ...] | None:
    on_node = int(env.get("SLURM_GPUS_ON_NODE") or present)
    listed = env.get("CUDA_VISIBLE_DEVICES")
    if listed is None:
        visible = present or on_node
    else:
        visible = len([each for each in listed.split(",") if each and each != "NoDevFiles"])
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
