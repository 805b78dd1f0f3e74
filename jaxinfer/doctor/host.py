"""The machine and what a rank was given of it: cores, memory, limits, container, proxies, names, Slurm."""

import os
import platform
import resource
import shutil
import socket
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

from jaxinfer.cluster.gather import addresses
from jaxinfer.cluster.launch import Launch, missed_srun
from jaxinfer.doctor.finding import Finding, ok, warning

GIB = 1 << 30
LEAST_MEMORY = 4 * GIB
LEAST_FILES = 1024
SCONTROL_SECONDS = 10


def check_host(env: Mapping[str, str], has_gpu: bool, has_infiniband: bool) -> tuple[list[Finding], dict[str, Any]]:
    cores, limit, total = len(os.sched_getaffinity(0)), memory_limit(), psutil.virtual_memory().total
    memory, box = min(limit or total, total), container(env)
    facts = {"cores": cores, "memory_bytes": memory, "container": box, "own_addresses": addresses(socket.gethostname())}
    where = f" in {box}" if box else ""
    text = f"{platform.machine()}, Linux {platform.release()}{where}, {cores} cores, {memory / GIB:.0f} GiB of memory"
    if limit and limit < total:
        text += f" (limit of the job; the machine has {total / GIB:.0f})"
    findings = [ok("host", text)]
    if has_gpu and cores == 1:
        what = "1 CPU core for a GPU: loading and scheduling will wait for each other"
        findings.append(warning("cores", what, "give the task more: --cpus-per-task=8"))
    if memory < LEAST_MEMORY:
        what = f"{memory / GIB:.1f} GiB of memory: loading may be killed"
        findings.append(warning("memory", what, "ask for more: --mem=0 is all of a node"))
    return [*findings, *_limits(has_infiniband), *_proxies(env)], facts


def container(env: Mapping[str, str], root: Path = Path("/")) -> str:
    """The kind of container that this process runs in; empty for none."""
    if env.get("APPTAINER_CONTAINER") or env.get("SINGULARITY_CONTAINER") or (root / ".singularity.d").exists():
        return "Apptainer"
    if (root / ".dockerenv").exists():
        return "Docker"
    return ""


def memory_limit(root: Path = Path("/sys/fs/cgroup"), groups: Path = Path("/proc/self/cgroup")) -> int | None:
    """The least memory limit in bytes of this process's control groups, version 1 or 2; None without one."""
    limits = []
    for line in groups.read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        top = root / "memory" if controllers else root
        name = "memory.limit_in_bytes" if controllers else "memory.max"
        folder = top / path.lstrip("/")
        # in a container the path may be the one outside of it
        for each in [folder, *folder.parents]:
            if each.is_relative_to(top) and (each / name).is_file():
                text = (each / name).read_text().strip()
                limits += [int(text)] if text.isdigit() else []
    # version 1 writes a number near 2**63 for no limit
    return min((limit for limit in limits if limit < 1 << 60), default=None)


def _limits(has_infiniband: bool) -> list[Finding]:
    found = {name: resource.getrlimit(getattr(resource, f"RLIMIT_{name}"))[0] for name in ("MEMLOCK", "CORE", "NOFILE")}
    findings = []
    if has_infiniband and found["MEMLOCK"] != resource.RLIM_INFINITY:
        what = f"ulimit -l is {found['MEMLOCK'] // 1024} KiB: InfiniBand may not register its buffers"
        fix = "srun --propagate=NONE, or ask the administrators for LimitMEMLOCK=infinity in slurmd's service"
        findings.append(warning("ulimit", what, fix))
    if found["CORE"] == resource.RLIM_INFINITY or found["CORE"] > GIB:
        what = "ulimit -c is above 1 GiB: an aborted rank may leave a core file of many GB"
        findings.append(warning("ulimit", what, "put `ulimit -c 0` into the job script"))
    if found["NOFILE"] != resource.RLIM_INFINITY and found["NOFILE"] < LEAST_FILES:
        what = f"ulimit -n is {found['NOFILE']}: too few open files for JAX and NCCL"
        findings.append(warning("ulimit", what, "put `ulimit -n 4096` into the job script"))
    return findings


def _proxies(env: Mapping[str, str]) -> list[Finding]:
    names = sorted(name for name in env if name.lower() in ("http_proxy", "https_proxy", "all_proxy", "grpc_proxy"))
    if not names:
        return []
    what = f"{', '.join(names)} set: gRPC would send the ranks' start-up through it"
    return [warning("proxy", what, "nothing for jaxinfer, which bypasses it; for other JAX programs unset it")]


def check_step(env: Mapping[str, str], launch: Launch | None) -> tuple[list[Finding], dict[str, Any]]:
    """How the processes were started."""
    if launch is None:
        findings = [ok("launch", "one process, no Slurm step")]
        return [*findings, *_missed(env, launch)], {}
    if launch.step is None:
        return [ok("launch", f"{launch.num_processes} processes by --coordinator {launch.place}")], {}
    nodes = len(set(launch.hosts))
    text = f"Slurm step {launch.step}: {launch.num_processes} tasks on {nodes} node{'s'[: nodes > 1]}, "
    findings = [ok("launch", text + f"rank 0 at {launch.place}"), *_missed(env, launch)]
    if launch.process_id == 0 and launch.num_processes > 1:
        findings += _kill_on_bad_exit(env)
    return findings, {"gpus_on_node": int(env.get("SLURM_GPUS_ON_NODE") or 0)}


def _missed(env: Mapping[str, str], launch: Launch | None) -> list[Finding]:
    missed = missed_srun(env, launch)
    return [warning("launch", missed, "srun in front of the command, with all tasks of the job")] if missed else []


def _kill_on_bad_exit(env: Mapping[str, str]) -> list[Finding]:
    name, value = "KillOnBadExit", env.get("SLURM_KILL_BAD_EXIT")
    if value is None and shutil.which("scontrol"):
        try:
            done = subprocess.run(
                ["scontrol", "show", "config"], capture_output=True, text=True, timeout=SCONTROL_SECONDS
            )
        except (OSError, subprocess.TimeoutExpired):
            return []
        lines = [line.partition("=") for line in done.stdout.splitlines()]
        value = next((right.strip() for left, _, right in lines if left.strip() == name), None)
    if value == "0":
        text = "off by default here, unless srun was given it: a rank that dies would leave the others waiting"
        return [ok(name, text, "nothing for jaxinfer, which ends its ranks itself; else srun --kill-on-bad-exit=1")]
    return [] if value is None else [ok(name, "on: Slurm ends the step when a rank fails")]
