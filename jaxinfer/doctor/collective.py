"""Runs the probe beside the doctor, never longer than its bound, and reads what it and NCCL said."""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs

from jaxinfer.cluster.fabric import Nccl, parse_nccl
from jaxinfer.cluster.launch import Launch

EVENTS = ("nothing", "start", "joined", "devices", "small", "large", "done")  # of the probe, in order
LAST = 600  # characters of what the probe said before it failed


def run_probe(env: Mapping[str, str], launch: Launch, coordinator: str, on_gpu: bool, limit_s: float) -> dict[str, Any]:
    """How far the probe came, what it measured, why it ended; NCCL's choices. JSON holds it.

    Keys: event name to its values; ``last`` event; ``end``: ok, failed or hung; ``why``; ``nccl``.
    """
    with tempfile.TemporaryDirectory(prefix="jaxinfer-doctor-") as name:
        folder = Path(name)
        given = {**attrs.asdict(launch), "parent": os.getpid(), "coordinator": coordinator}
        with open(folder / "out", "wb") as out, open(folder / "err", "wb") as err:
            process = subprocess.Popen(
                [sys.executable, "-m", "jaxinfer.doctor.probe", json.dumps(given)],
                env=_environment(env, folder, on_gpu),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=True,
            )
            try:
                status = process.wait(limit_s)
            except subprocess.TimeoutExpired:
                status = None
            finally:
                state = _state(process.pid)
                _end(process)
        return _result(folder, status, state, limit_s)


def _environment(env: Mapping[str, str], folder: Path, on_gpu: bool) -> dict[str, str]:
    # what NCCL does is as the user has set it; only what it says is ours
    ours = {"NCCL_DEBUG": "INFO", "NCCL_DEBUG_SUBSYS": "INIT,NET,ENV", "NCCL_DEBUG_FILE": str(folder / "nccl.%h.%p")}
    # the memory may be another process's
    ours |= {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    # nothing of the probe needs to be found in the cache again, and reading it may hang
    given = {name: value for name, value in env.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    if not on_gpu:  # else JAX would look for devices of all kinds
        given.setdefault("JAX_PLATFORMS", "cpu")
    return {**given, **ours}


def _end(process: subprocess.Popen[bytes]) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    try:
        process.wait(5)
    except subprocess.TimeoutExpired:  # it hangs in the kernel, where no signal reaches it
        pass


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return ""


def _result(folder: Path, status: int | None, state: str, limit_s: float) -> dict[str, Any]:
    result: dict[str, Any] = {"last": "nothing"}
    for line in (folder / "out").read_text(errors="replace").splitlines():
        try:
            event = json.loads(line)
            name = event.pop("event")
        except (ValueError, AttributeError, KeyError, TypeError):
            continue  # of a library that prints
        if name in EVENTS:
            result |= {"last": name, name: event}
    said = (folder / "err").read_text(errors="replace").strip()
    if status is None:
        how = {"T": "its process is stopped", "D": "it waits for a disk or driver"}.get(state, "it waits")
        result |= {"end": "hung", "why": f"{how} after {result['last']!r}, {limit_s:.0f} s in all"}
    elif status or result["last"] != "done":
        ended = f"killed by signal {-status}" if status and status < 0 else f"exit status {status}"
        result |= {"end": "failed", "why": f"{ended} after {result['last']!r}: {_reason(said)}"}
    else:
        result["end"] = "ok"
    logs = [path.read_text(errors="replace") for path in sorted(folder.glob("nccl.*"))]
    result["nccl"] = attrs.asdict(parse_nccl("\n".join(logs))) if logs else None
    return result


def _reason(said: str) -> str:
    """The line that tells most: one that a library aborted with, else the last that names an error, else the last."""
    lines = [line.strip() for line in said.splitlines() if line.strip()] or ["it said nothing"]
    fatal = [line for line in lines if re.match(r"F\d{4}", line)]
    errors = [line for line in lines if "Error" in line or "ERROR" in line or "error:" in line]
    return (fatal or errors or lines)[-1][-LAST:]


def merge_nccl(logs: Sequence[Mapping[str, Any]]) -> Nccl:
    """What the logs of several ranks say together."""
    found = Nccl()
    for log in logs:
        found.version, found.network = found.version or log["version"], found.network or log["network"]
        found.devices, found.interfaces = (
            found.devices or tuple(log["devices"]),
            found.interfaces or tuple(log["interfaces"]),
        )
        found.nodes, found.ranks = max(found.nodes, log["nodes"]), max(found.ranks, log["ranks"])
        found.links.update(log["links"])
        found.direct += log["direct"]
        found.nvls = log["nvls"] if found.nvls is None else found.nvls
        found.nvls_channels = max(found.nvls_channels, log["nvls_channels"])
        found.no_library |= log["no_library"]
        found.no_device |= log["no_device"]
        found.settings |= log["settings"]
        found.warnings += [text for text in log["warnings"] if text not in found.warnings]
    return found
