"""From the start of the process to the first token: with an empty compile cache, and with the one that this left.

    python -m benchmarks.startup --model llama-3.1-8b --json build/bench/startup.json
    python -m benchmarks.startup --model llama-3.1-8b --engine max_batch=64,max_context=2048 --new-tokens 64
    python -m benchmarks.startup --model tiny --cpu-devices 1 --prompt-tokens 32

Runs `python -m jaxinfer.generate --random-weights` twice, in fresh processes. The file of prompts has a request for
one token and one for --new-tokens: the first line of the output is the first token, the end stands for a run that has
its decode programs too. Phases are those of the run's metrics.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.common import count, fields, user_errors
from benchmarks.report import Row, with_goals
from benchmarks.shapes import NAMES, dtype_of, hf_config, model_config, random_prompts
from convert.dummy import write_dummy
from jaxinfer.compile_cache import OF_JAX, VARIABLE
from jaxinfer.options import Parser, file_to_write
from jaxinfer.parallel.axes import mesh_text, parse_mesh
from jaxinfer.screen import escape_unencodable
from jaxinfer.telemetry.manifest import git_commit

PHASES = ("load", "compile", "prefill", "decode")
POLL_SECONDS = 0.005


def main() -> None:
    escape_unencodable()
    made = Parser(
        prog="python -m benchmarks.startup",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    what = f"{', '.join(NAMES)}, or the path of a config.json (default: llama-3.1-8b)"
    made.add_argument("--model", default="llama-3.1-8b", metavar="NAME", help=what)
    made.add_argument("--mesh", default="", metavar="AXES", help="tensor=8, say (default: one device)")
    made.add_argument("--cpu-devices", type=int, metavar="N", help="run on N virtual CPU devices")
    what = "options of jaxinfer.generate: max_batch=64,max_context=2048, say"
    made.add_argument("--engine", type=fields, default={}, metavar="NAME=VALUE,...", help=what)
    made.add_argument("--prompt-tokens", type=count, default=512, metavar="N", help="(default: 512)")
    made.add_argument("--new-tokens", type=count, default=64, metavar="N", help="of the second request (default: 64)")
    made.add_argument("--json", type=file_to_write, metavar="FILE", help="write the figures there")
    args = made.parse_args()
    with user_errors("startup"), tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_dummy(hf_config(args.model), folder / "model", dtype_of(args.model))
        prompts = random_prompts(model_config(args.model).vocab_size, [args.prompt_tokens] * 2)
        lines = [
            {"prompt_token_ids": prompt, "max_new_tokens": new, "ignore_eos": True}
            for prompt, new in zip(prompts, (1, args.new_tokens))
        ]
        (folder / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        runs = {which: start(args, folder, which) for which in ("cold", "warm")}
    finish(args, runs)


def start(args: argparse.Namespace, folder: Path, which: str) -> dict[str, Any]:
    """Seconds from the start of a process to its first result and to its end, and the run's own metrics."""
    output = folder / f"{which}.jsonl"
    command = [sys.executable, "-m", "jaxinfer.generate", "--model", str(folder / "model"), "--random-weights"]
    command += ["--prompts", str(folder / "prompts.jsonl"), "--output", str(output), "--mesh", args.mesh]
    command += ["--cpu-devices", str(args.cpu_devices)] if args.cpu_devices else []
    # the model's own context may be more than one device can hold
    engine = {"max_context": args.prompt_tokens + args.new_tokens, **args.engine}
    command += [part for name, value in engine.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    env = {name: value for name, value in os.environ.items() if name != OF_JAX} | {VARIABLE: str(folder / "compiled")}
    began = time.perf_counter()
    first = None
    with open(folder / f"{which}.log", "w+") as log:
        process = subprocess.Popen(command, env=env, stdout=log, stderr=log)
        while process.poll() is None:
            if first is None and output.exists() and b"\n" in output.read_bytes():
                first = time.perf_counter() - began
            time.sleep(POLL_SECONDS)
        ended = time.perf_counter() - began
        if process.returncode or first is None:
            log.seek(0)
            text = log.read()
            sys.stderr.write(text[-4000:])
            last = (text.strip().splitlines() or ["no message"])[-1]
            raise ValueError(f"jaxinfer.generate ended with status {process.returncode}: {last}")
    metrics = json.loads(output.with_suffix(".metrics.json").read_bytes())
    run = json.loads(output.with_suffix(".run.json").read_bytes())["runs"][-1]
    return {"first_token_s": first, "end_s": ended, "metrics": metrics, "run": run}


def finish(args: argparse.Namespace, runs: dict[str, dict[str, Any]]) -> None:
    rows, phases = [], {}
    for which, run in runs.items():
        engine = run["metrics"]["engine"]
        phases[which] = {name: engine[f"{name}_seconds"] for name in PHASES}
        rows += [
            Row(f"{which}, first token", "s", run["first_token_s"]),
            Row(f"{which}, end of {args.new_tokens} tokens", "s", run["end_s"]),
        ]
    run = runs["warm"]["run"]
    kind = run["devices"]["kind"]
    mesh = mesh_text(parse_mesh(args.mesh))
    rows = with_goals(rows, "startup", args.model, mesh, kind)
    notes = {which: ", ".join(f"{name} {took:.2f} s" for name, took in each.items()) for which, each in phases.items()}
    report.show(f"startup: {args.model}, {mesh or 'one device'} of {kind}", rows, notes)
    if args.json is not None:
        data = {"benchmark": "startup", "model": args.model, "mesh_text": mesh, **run, "command": sys.argv}
        data |= {"commit": git_commit(Path(__file__).parent), "limits": {}, "details": phases, "notes": notes}
        report.write(args.json, data, rows)


if __name__ == "__main__":
    main()
