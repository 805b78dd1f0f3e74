"""What the benchmarks of the engine share: their options, the model on its mesh, and the report."""

import argparse
import gc
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import attrs

from benchmarks import report
from benchmarks.limits import Limits, measure
from benchmarks.peers import run_peer
from benchmarks.report import Row
from benchmarks.shapes import NAMES, dtype_of, hf_config, model_config
from convert.dummy import write_dummy
from convert.tensor import ConvertError
from jaxinfer import __version__
from jaxinfer.cluster import distributed
from jaxinfer.cluster.cpu import ThreadPoolError, use_virtual_devices
from jaxinfer.cluster.launch import find_launch
from jaxinfer.cluster.slurm import ClusterError
from jaxinfer.engine.device import claim_memory
from jaxinfer.models.config import ConfigError, ModelConfig
from jaxinfer.options import Parser, add_process_options, file_to_write
from jaxinfer.parallel.axes import mesh_text, parse_mesh
from jaxinfer.screen import escape_unencodable
from jaxinfer.telemetry.manifest import describe_run

FIXED = {"mesh", "stage_layers", "load_format"}
ITEM = {"bfloat16": 2, "float16": 2, "float32": 4}


def parser(name: str, text: str) -> argparse.ArgumentParser:
    """With the options that every benchmark of the engine has; `text` is the module's docstring, examples and all."""
    escape_unencodable()
    made = Parser(
        prog=f"python -m benchmarks.{name}",
        description=text,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    group = made.add_argument_group("model and place")
    what = f"{', '.join(NAMES)}, or the path of a config.json (default: llama-3.1-8b); weights are random"
    group.add_argument("--model", default="llama-3.1-8b", metavar="NAME", help=what)
    group.add_argument("--mesh", default="", metavar="AXES", help="tensor=8, say (default: one device)")
    group.add_argument("--cpu-devices", type=int, metavar="N", help="run on N virtual CPU devices")
    what = "fields of EngineConfig, but for mesh, stage_layers and load_format: kernels=off,decode_steps=16, say"
    group.add_argument("--engine", type=fields, default={}, metavar="NAME=VALUE,...", help=what)
    group.add_argument("--json", type=file_to_write, metavar="FILE", help="write the figures there")
    add_process_options(made)
    return made


def add_peer_option(made: argparse.ArgumentParser, name: str) -> None:
    made.add_argument("--peer", action="store_true", help=f"first run {name} on the same work (needs torch)")


def peer_first(
    name: str, args: argparse.Namespace, module: str, options: Mapping[str, Any]
) -> tuple[dict[str, float], dict[str, str]]:
    """The figures of a peer and notes on them, while this process holds nothing of the GPU."""
    with user_errors(name):
        model_config(args.model)
        launch = find_launch(os.environ, args.coordinator, args.num_processes, args.process_id, args.port)
        if launch is not None and launch.num_processes > 1:
            raise ValueError(f"--peer: found {launch.num_processes} processes, legal is one: it has the GPU for itself")
    return run_peer(module, args.model, args.cpu_devices, options)


def numbers(text: str) -> list[int]:
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or min(found) < 1:
        raise argparse.ArgumentTypeError(f"found {text!r}, legal is N,N,... with N of at least 1")
    return found


def count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"found {text!r}, legal is a whole number of at least 1")
    return int(text)


def fields(text: str) -> dict[str, Any]:
    pairs = [part.partition("=") for part in text.split(",")]
    if not all(name and equals and value for name, equals, value in pairs):
        raise argparse.ArgumentTypeError(f"found {text!r}, legal is NAME=VALUE,NAME=VALUE,...")
    return {name: _value(value) for name, _, value in pairs}


def _value(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


@attrs.frozen
class Bench:
    """A benchmark on its way: the options, the model's config, the mesh's sizes and what the device can do."""

    name: str
    args: argparse.Namespace
    model: ModelConfig
    dtype: str
    sizes: dict[str, int]
    limits: Limits
    folder: Path  # a checkpoint without weights

    @property
    def item(self) -> int:
        """Bytes per number."""
        return ITEM[self.dtype]

    def llm(self, **options: Any) -> Any:
        """The model on its mesh; what --engine says wins over `options`."""
        from jaxinfer.llm import LLM

        needed, longest = options.get("max_context", 0), self.model.max_context
        if needed > longest:
            raise ValueError(f"prompt and new tokens: {needed:,} together, legal is the model's context of {longest:,}")
        return LLM(self.folder, self.sizes, load_format="dummy", **options | self.args.engine)

    def finish(self, rows: list[Row], details: Mapping[str, Any], notes: Mapping[str, str]) -> None:
        """Shows and writes the figures, in the first process alone."""
        import jax

        mesh, kind = mesh_text(self.sizes), jax.devices()[0].device_kind
        run = describe_run(__version__, _plain(vars(self.args)), self.sizes, distributed.hosts())
        if jax.process_index() > 0:
            return
        rows = report.with_goals(rows, self.name, self.args.model, mesh, kind)
        copy, matmul = self.limits.copy_bytes_per_s / 1e9, self.limits.matmul_flops_per_s / 1e12
        measured = f"copy {copy:,.0f} GB/s, {self.dtype} matmul {matmul:,.1f} TFLOP/s"
        where = f"{mesh or 'one device'} of {kind}"
        report.show(f"{self.name}: {self.args.model}, {where}", rows, {"limits, measured": measured, **notes})
        if self.args.json is not None:
            data = {"benchmark": self.name, "model": self.args.model, "mesh_text": mesh, **run}
            data |= {"limits": attrs.asdict(self.limits), "details": dict(details), "notes": dict(notes)}
            report.write(self.args.json, data, rows)


@contextmanager
def benchmark(name: str, args: argparse.Namespace) -> Iterator[Bench]:
    """Joins the other processes if there are any, starts JAX, measures the device. A user's mistake ends the program
    with one line and status 2."""
    with user_errors(name), tempfile.TemporaryDirectory() as folder:
        if fixed := args.engine.keys() & FIXED:
            raise ValueError(
                f"--engine: {', '.join(sorted(fixed))} cannot be set there (--mesh is an option of its own)"
            )
        model, dtype, sizes = model_config(args.model), dtype_of(args.model), parse_mesh(args.mesh)
        dtype = args.engine.get("dtype", dtype)
        write_dummy(hf_config(args.model), folder, dtype)
        start(args)
        yield Bench(name, args, model, dtype, sizes, measure(dtype), Path(folder))


@contextmanager
def user_errors(name: str) -> Iterator[None]:
    try:
        yield
    except (ValueError, ConfigError, ConvertError, ClusterError, ThreadPoolError) as error:
        print(f"python -m benchmarks.{name}: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


def start(args: argparse.Namespace) -> None:
    """Virtual devices or other processes, where the options or Slurm say so; before JAX starts."""
    claim_memory()
    if args.cpu_devices is not None:
        use_virtual_devices(args.cpu_devices)
    launch = find_launch(os.environ, args.coordinator, args.num_processes, args.process_id, args.port)
    if launch is not None:
        distributed.start(launch)


@attrs.frozen
class Run:
    """Requests that were all given at once. Times in seconds; `tpot` of each, TTFT left out; `work` as in a run's
    metrics: from the first scheduling to the last token, without compiling."""

    ttft: list[float]
    tpot: list[float]
    latency: float  # of the last
    work: float
    tokens: int

    @property
    def last_ttft(self) -> float:
        return max(self.ttft)


def run(llm: Any, prompts: list[list[int]], new_tokens: int) -> Run:
    """Greedy, `new_tokens` of each whatever they are.

    Raises:
      ValueError: logits that are NaN or infinite.
    """
    before = llm.engine.stats.work_seconds
    done = llm.generate(prompts, {"max_new_tokens": new_tokens, "ignore_eos": True})
    samples = [each.samples[0] for each in done]
    if error := next((each.error for each in samples if each.error), None):
        raise ValueError(error)
    return Run(
        ttft=[each.ttft_s for each in samples],
        tpot=[(each.latency_s - each.ttft_s) / (each.completion_tokens - 1) for each in samples if new_tokens > 1],
        latency=max(each.latency_s for each in samples),
        work=llm.engine.stats.work_seconds - before,
        tokens=sum(each.completion_tokens for each in samples),
    )


def middle(runs: list[Run], figure: Callable[[Run], float]) -> float:
    return median(map(figure, runs))


def free_devices() -> None:
    """Gives a dropped model's memory back before the next is made."""
    gc.collect()


def _plain(args: Mapping[str, Any]) -> dict[str, Any]:
    return {name: str(value) if isinstance(value, Path) else value for name, value in args.items() if value is not None}
