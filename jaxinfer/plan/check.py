"""``--check``: runs the model on the devices that are here and puts what they report beside the prediction."""

import argparse
import os
from typing import Any

import attrs
import numpy as np
from rich.table import Table

from jaxinfer.checkpoint.files import write_json
from jaxinfer.cluster import distributed
from jaxinfer.cluster.cpu import use_virtual_devices
from jaxinfer.cluster.launch import find_launch
from jaxinfer.engine.device import claim_memory, device_memory
from jaxinfer.engine.layout import auto_mesh
from jaxinfer.parallel.axes import LayoutError, mesh_text, parse_mesh
from jaxinfer.plan.hardware import Gpus, GpuType, recognise
from jaxinfer.plan.layouts import Ask, Layout
from jaxinfer.plan.predict import Place, Workload, predict
from jaxinfer.plan.show import console, lines, memory_table
from jaxinfer.plan.source import Source

GIB = 1 << 30
ORDINARY = 3  # below are the start and end tokens of most vocabularies


@attrs.frozen
class Row:
    """A figure of one device: bytes or seconds. `xla`: what the compiled programs say that they take."""

    name: str
    predicted: float | None
    measured: float | None = None
    xla: float | None = None

    def cells(self) -> list[str]:
        scale, unit = (1e3, "ms") if self.name.startswith("TPOT") else (1 / GIB, "GiB")
        figures = [self.predicted, self.measured, self.xla]
        shown = ["" if each is None else f"{each * scale:,.3f} {unit}" for each in figures]
        found = self.measured if self.measured is not None else self.xla
        known = self.predicted and found
        return [self.name, *shown, f"{self.predicted / found - 1:+.1%}" if known else ""]


def check(args: argparse.Namespace, source: Source, ask: Ask) -> int:
    """Prints predicted beside measured, in the first process. `ask.batch` sequences run twice; the second counts."""
    import jax

    from jaxinfer.llm import LLM

    device, gpus = jax.local_devices()[0], here()
    mesh = parse_mesh(args.mesh) if args.mesh else auto_mesh(source.manifest.model, distributed.hosts())[0]
    batch = ask.batch or 1
    config = attrs.evolve(ask, batch=batch).config(mesh)
    weights = source.checkpoint is not None and bool(source.manifest.leaves)
    try:
        llm = LLM(
            source.checkpoint if weights else source.manifest,
            mesh,
            dtype=ask.dtype,
            load_format="checkpoint" if weights else "dummy",
            max_batch=config.max_batch,
            max_context=ask.context,
            memory_fraction=ask.memory_fraction,
            prefill_chunk=ask.prefill_chunk,
        )
    except LayoutError as error:
        return _refused(Layout(mesh, gpus, str(error), getattr(error, "plan", None)))
    work = Workload(batch, ask.context, ask.new_tokens)
    measured = _tpot(llm, work)
    memory = llm.engine.memory
    stats = [each for each in (each.memory_stats() or {} for each in jax.local_devices()) if each]
    arguments, most = _programs(llm)
    rows = [
        Row("weights and cache", memory.weights + memory.cache, _most(stats, "bytes_in_use"), arguments),
        Row("with workspace, at most", memory.needed, _most(stats, "peak_bytes_in_use"), most),
        Row("limit", int(memory.limit * memory.share), _most(stats, "bytes_limit")),
    ]
    predicted = None
    if gpus is not None:
        predicted = predict(Place(ask.model, llm.engine.fitted, mesh, gpus, ask.dtype), work).tpot_s
    rows.append(Row(f"TPOT, {batch} at once", predicted, measured))
    everywhere = distributed.everyone([attrs.asdict(row) for row in rows])
    if jax.process_index() == 0:
        text = mesh_text(mesh) or "one device"
        place = f"{text} of {device.device_kind}, {ask.dtype}, {batch} x {ask.context} tokens"
        show(f"{source.name} on {place}", rows, everywhere, gpus, bool(stats))
        if args.json is not None:
            data = {"model": source.name, "mesh": text, "device": device.device_kind, "dtype": ask.dtype}
            data |= {"batch": batch, "context": ask.context, "new_tokens": ask.new_tokens, "ranks": everywhere}
            write_json(args.json, data)
    distributed.wait_for_all("jaxinfer.plan ends")
    distributed.leave()
    return 0


def _refused(layout: Layout) -> int:
    import jax

    if jax.process_index() == 0:
        out = console()
        lines(out, layout.refusal)
        if layout.memory is not None:
            memory_table(out, layout)
    return 1


def start(args: argparse.Namespace) -> None:
    """Starts JAX, with the other processes where the options or Slurm say that there are any."""
    claim_memory()
    if args.cpu_devices is not None:
        use_virtual_devices(args.cpu_devices)
    launch = find_launch(os.environ, args.coordinator, args.num_processes, args.process_id, args.port)
    if launch is not None:
        distributed.start(launch)


def here() -> Gpus | None:
    """The GPUs of all processes, where they are of a type that the plan knows."""
    import jax

    found: GpuType | None = recognise(jax.local_devices()[0].device_kind, device_memory(jax.local_devices()[0])[0])
    nodes = len(set(distributed.hosts()))
    return found and Gpus(found, nodes, jax.device_count() // nodes)


def _tpot(llm: Any, work: Workload) -> float | None:
    """Seconds per token after all first tokens are there; programs are compiled in a round before. None where a request
    ended early, for logits that are NaN or infinite (of which `LLM.generate` warns)."""
    draws = np.random.default_rng(0)
    prompts = [draws.integers(ORDINARY, llm.engine.model.vocab_size, work.prompt).tolist() for _ in range(work.batch)]
    params = {"max_new_tokens": work.new_tokens, "ignore_eos": True}
    for _ in range(2):
        done = [each.samples[0] for each in llm.generate(prompts, params)]
    if any(each.error for each in done):
        return None
    first = max(each.ttft_s for each in done)
    return (max(each.latency_s for each in done) - first) / max(1, work.new_tokens - 1)


def _programs(llm: Any) -> tuple[float, float]:
    """Of the compiled programs, on one device: bytes of arguments (weights and state), and of all that one needs."""
    found = [program.memory_analysis() for program in llm.engine.compiled().values()]
    arguments = [each.argument_size_in_bytes for each in found]
    more = [each.temp_size_in_bytes + each.output_size_in_bytes - each.alias_size_in_bytes for each in found]
    return max(arguments), max(map(sum, zip(arguments, more)))


def _most(stats: list[dict[str, int]], name: str) -> int | None:
    return max((each[name] for each in stats if name in each), default=None)


def show(title: str, rows: list[Row], everywhere: list[Any], gpus: Gpus | None, has_stats: bool) -> None:
    """Of several processes, what that one measured which needs most."""
    out = console()
    out.print(title, markup=False)
    table = Table("of one device", "predicted", "measured", "by XLA's count", "predicted is off by")
    for index, row in enumerate(rows):
        measured = [rank[index]["measured"] for rank in everywhere if rank[index]["measured"] is not None]
        table.add_row(*attrs.evolve(row, measured=max(measured, default=None)).cells())
    out.print(table)
    if not has_stats:
        lines(out, "these devices do not report memory; XLA's count is that of the compiled programs")
    if gpus is None:
        lines(out, "no prediction of TPOT: these devices are of no type that the plan knows")
