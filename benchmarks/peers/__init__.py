"""Other programs on the same work, each in a process of its own that leaves the GPU's memory free when it ends."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def run_peer(
    module: str, model: str, cpu_devices: int | None, options: Mapping[str, Any]
) -> tuple[dict[str, float], dict[str, str]]:
    """Runs ``benchmarks.peers.MODULE``: its figures by name, and a note on what it was.

    A peer that fails is a note, not an error: what it is beside is worth having without it.
    """
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "peer.json"
        command = [sys.executable, "-m", f"benchmarks.peers.{module}", "--model", model, "--json", str(found)]
        command += [part for name, value in options.items() for part in (f"--{name}", str(value))]
        hidden = {"CUDA_VISIBLE_DEVICES": ""} if cpu_devices else {}
        done = subprocess.run(command, env=os.environ | hidden, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            lines = done.stderr.strip().splitlines() or ["no message"]
            sys.stderr.write(done.stderr[-4000:])
            return {}, {module: f"failed with status {done.returncode}: {lines[-1]}"}
        data = json.loads(found.read_bytes())
    return {row["name"]: row["value"] for row in data["rows"]}, {module: data["what"]}
