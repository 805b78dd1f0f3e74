"""Records what Slurm tells tasks, in a testbed of the nodes a01, a02, a03, a7 and b2 with two GPUs each.

As root, with Slurm installed:  python tests/data/slurm_envs/capture.py [CASE ...]

Each file has the command and, for every process that it started, the host and the variables of Slurm and of GPUs;
those that hold paths are left out.
"""

import json
import re
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parents[2])]

from slurm_bed import Bed, testbed  # noqa: E402

NODES = "a01,a02,a03,a7,b2"
HOST_FILE = ["b2", "a01", "b2", "a01", "a7"]
KEPT = re.compile(r"(SLURM|SRUN|CUDA|GPU|ROCR|ZE_|HIP)")

TWO_BY_TWO = "srun -N2 --ntasks-per-node=2"
BATCH = "sbatch --quiet --wait -o /dev/null -N2 --ntasks-per-node=2"
SALLOC = "salloc --quiet -N2 --ntasks-per-node=2"
INTERACTIVE = "srun --interactive -N1 -n1 --preserve-env"  # as LaunchParameters=use_interactive_step starts a shell
CASES = {
    "one-task": "srun -n1 RECORD",
    "no-gpus": f"{TWO_BY_TWO} RECORD",
    "gpus-per-task": f"{TWO_BY_TWO} --gpus-per-task=1 RECORD",
    "gpus-per-node": f"{TWO_BY_TWO} --gpus-per-node=2 RECORD",
    "gpus-total": f"{TWO_BY_TWO} --gpus=4 RECORD",
    "gres": f"{TWO_BY_TWO} --gres=gpu:2 RECORD",
    "gpus-per-node-1-of-2": "srun -N2 --ntasks-per-node=1 --gpus-per-node=1 RECORD",
    "bind-none": f"{TWO_BY_TWO} --gpus-per-node=2 --gpu-bind=none RECORD",
    "bind-single": f"{TWO_BY_TWO} --gpus-per-node=2 --gpu-bind=single:1 RECORD",
    "bind-map": f"{TWO_BY_TWO} --gpus-per-node=2 --gpu-bind=map_gpu:1,0 RECORD",
    "bind-mask": f"{TWO_BY_TWO} --gpus-per-node=2 --gpu-bind=mask_gpu:0x1,0x2 RECORD",
    "bind-per-task": f"{TWO_BY_TWO} --gpus-per-node=2 --gpu-bind=per_task:1 RECORD",
    "gpus-per-task-bind-none": f"{TWO_BY_TWO} --gpus-per-task=1 --gpu-bind=none RECORD",
    "task-per-node": "srun -N5 --ntasks-per-node=1 --gpus-per-node=2 RECORD",
    "task-per-node-gpus-per-task-2": "srun -N3 --ntasks-per-node=1 --gpus-per-task=2 RECORD",
    "cyclic": f"{TWO_BY_TWO} --gpus-per-node=2 -m cyclic RECORD",
    "cyclic-gpus-per-task": f"{TWO_BY_TWO} --gpus-per-task=1 -m cyclic RECORD",
    "arbitrary": "SLURM_HOSTFILE=ORDER srun -n5 -m arbitrary RECORD",
    "unequal": "srun -N2 -n4 RECORD",
    "unequal-gpus-per-task": "srun -w a01,b2 -N2 -n3 --gpus-per-task=1 RECORD",
    "unequal-gpus-per-node": "srun -N2 -n4 --gpus-per-node=2 RECORD",
    "tasks-share-a-gpu": f"{TWO_BY_TWO} --gpus-per-node=1 RECORD",
    "batch-script": f"{BATCH} --gpus-per-node=2 --wrap RECORD",
    "batch-step": f"{BATCH} --gpus-per-node=2 --wrap 'srun RECORD'",
    "batch-step-gpus-per-task": f"{BATCH} --gpus-per-task=1 --wrap 'srun RECORD'",
    "batch-gpus-per-task-step-bind-none": f"{BATCH} --gpus-per-task=1 --wrap 'srun --gpu-bind=none RECORD'",
    "batch-bind-single": f"{BATCH} --gpus-per-node=2 --gpu-bind=single:1 --wrap 'srun RECORD'",
    "batch-step-part": f"{BATCH} -N4 --gpus-per-node=2 --wrap 'srun -N2 -n2 -r1 RECORD'",
    "batch-steps-at-once": f"{BATCH} --wrap 'for i in 1 2 3; do srun --overlap RECORD sleep 2 & done; wait'",
    "batch-steps-exclusive": f"{BATCH} -n2 --ntasks-per-node=1 -c2 --gpus-per-node=2 --wrap "
    "'for i in 1 2; do srun --exclusive -N2 -n2 -c1 --gpus-per-node=1 RECORD sleep 2 & done; wait'",
    "batch-step-export-none": f"{BATCH} --export=NONE --gpus-per-node=2 --wrap 'srun RECORD'",
    "batch-step-one-of-two-tasks": f"{BATCH} --ntasks-per-node=1 --wrap 'srun -N1 -n1 RECORD'",
    "batch-step-one-exact": f"{BATCH} --gpus-per-node=2 --wrap 'srun -N1 -n1 --exact --gpus=1 RECORD'",
    "batch-step-one-overlap": f"{BATCH} --gpus-per-node=2 --wrap 'srun -N1 -n1 --overlap RECORD'",
    "batch-from-a-step": f"srun -w a01 {BATCH} -w a02,b2 --wrap RECORD",
    "salloc-interactive-step": f"{SALLOC} --gpus-per-node=2 {INTERACTIVE} RECORD",
    "salloc-step-in-interactive-step": f"{SALLOC} --gpus-per-node=2 {INTERACTIVE} srun RECORD",
    "srun-export-none": f"{TWO_BY_TWO} --export=NONE --gpus-per-node=2 RECORD",
    "salloc-shell": f"{SALLOC} --gpus-per-node=2 RECORD",
    "salloc-step": f"{SALLOC} --gpus-per-node=2 srun RECORD",
    "array": f"{BATCH} --array=3-4 --gpus-per-node=2 --wrap 'srun RECORD'",
    "requeued": f"{BATCH} --wrap "
    "'srun RECORD; [ -n \"$SLURM_RESTART_COUNT\" ] || scontrol requeue $SLURM_JOB_ID; sleep 2'",
    "het-one-step": "srun -N1 -n1 --gpus-per-node=2 : -N2 -n2 RECORD",
    "het-group-1": "salloc --quiet -N1 -n1 : -N2 -n2 --gpus-per-node=2 srun --het-group=1 RECORD",
}


def capture(bed: Bed, command: str, folder: Path) -> list[dict]:
    """Runs the command and returns every process that it recorded, by job, step and task."""
    (folder / "hosts").write_text("".join(f"{host}\n" for host in HOST_FILE))
    record = folder / "record.sh"
    # RECORD may be followed by a command that keeps the step alive
    record.write_text(f'#!/bin/sh\n/usr/bin/env -0 >"{folder}/$(hostname).$$"\nexec "${{@:-true}}"\n')
    record.chmod(0o755)
    filled = command.replace("ORDER", str(folder / "hosts")).replace("RECORD", str(record))
    subprocess.run(filled, shell=True, env=bed.env, cwd=folder, check=True, timeout=90)
    processes = []
    login = socket.gethostname()
    for file in folder.glob("*.[0-9]*"):
        variables = dict(entry.split("=", 1) for entry in file.read_text().split("\0") if "=" in entry)
        kept = {
            name: value.replace(login, "login") if name == "SLURM_SUBMIT_HOST" else value
            for name, value in sorted(variables.items())
            if KEPT.match(name) and "/" not in value and "PID" not in name
        }
        host = file.name.rsplit(".", 1)[0]
        processes.append({"host": "login" if host == login else host, "env": kept})
    order = ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "SLURM_STEP_ID", "SLURM_PROCID")
    return sorted(processes, key=lambda each: [int(each["env"].get(name, -1)) for name in order])


def main(names: list[str]) -> None:
    with testbed("capture", "--names", NODES, "--gpus", "2") as bed:
        for name in names or CASES:
            with tempfile.TemporaryDirectory(dir=bed.folder) as folder:
                processes = capture(bed, CASES[name], Path(folder))
            print(name, len(processes))
            whole = {"command": CASES[name], "processes": processes}
            (HERE / f"{name}.json").write_text(json.dumps(whole, indent=1) + "\n")


main(sys.argv[1:])
