"""A run as a step of the allocation that the command is in, with the script that a job of its own would have."""

import signal
import subprocess
from collections.abc import Mapping
from pathlib import Path

from jaxinfer.cluster.slurm import NAMED_STEPS, expand_counts
from slurm import runs
from slurm.follow import follow
from slurm.jobs import State
from slurm.presets import Cluster
from slurm.render import FOLDER

LOOK_S = 0.5  # the end of a step costs no question to Slurm


def step_options(cluster: Cluster, name: str, env: Mapping[str, str]) -> list[str]:
    """srun's, for a step called `name` of the allocation that `env` tells of.

    Raises:
      UsageError: no allocation, or one that is too small.
    """
    if "SLURM_JOB_ID" not in env:
        what = "SLURM_JOB_ID is not set, so this is no allocation of Slurm's: salloc or sbatch comes first"
        raise runs.UsageError(f"--inside: {what}; without --inside a job is submitted")
    job, nodes = env["SLURM_JOB_ID"], int(env.get("SLURM_JOB_NUM_NODES") or env.get("SLURM_NNODES") or 1)
    if cluster.nodes > nodes:
        raise runs.UsageError(f"--nodes: found {cluster.nodes}, legal is 1 to {nodes}, which job {job} has")
    tasks = cluster.tasks_per_node
    cpus = min(cluster.cpus_per_node, *expand_counts(env.get("SLURM_JOB_CPUS_PER_NODE", str(cluster.cpus_per_node))))
    if tasks > cpus:
        raise runs.UsageError(f"--inside: found {cpus} cores of a node for {tasks} tasks, legal is one or more each")
    options = [f"--job-name={name}", f"--nodes={cluster.nodes}", f"--ntasks={cluster.nodes * tasks}"]
    options += [f"--ntasks-per-node={tasks}", f"--cpus-per-task={cpus // tasks}", *cluster.gpu_options()]
    if not cluster.gpus_per_node:
        options.append("--gres=none")  # else the step has those of the allocation
    step = env.get("SLURM_STEP_ID", "")
    if step.isdigit() and int(step) not in NAMED_STEPS.values():
        options.append("--overlap")  # else it would wait for the step that we are in
    return options


def run_inside(run: Path, told: runs.Told) -> tuple[int, State]:
    """Runs the folder's script to its end and shows how it gets on; its exit status and what became of it. SIGTERM and
    Ctrl-C end the step in order: what is finished stays."""
    script: subprocess.Popen | None = None
    stopped = False

    def stop(number: int, frame: object) -> None:
        nonlocal stopped
        stopped = True
        if script is not None:
            script.terminate()

    def look() -> State:
        status = script.poll()
        if status is None:
            return State("RUNNING")
        return State("FAILED", f"exit status {_shell(status)}") if status else State("COMPLETED")

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        with open(run / "job.log", "ab") as log:
            # in a session of its own: Ctrl-C is for this command alone
            script = subprocess.Popen(
                ["bash", run / "job.sh"],
                cwd=FOLDER.parent,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        if stopped:
            script.terminate()
        state = follow(runs.name(told), look, runs.outputs(run, told), told["results"], LOOK_S)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return _shell(script.returncode), state


def _shell(status: int) -> int:
    """As a shell says it: 128 and the number of the signal that ended it."""
    return 128 - status if status < 0 else status
