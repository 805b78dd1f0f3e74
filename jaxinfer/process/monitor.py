"""The monitors of a run's processes: started on one clock, ended with one file and the figures of all."""

import os
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attrs

from jaxinfer.checkpoint.files import is_stream
from jaxinfer.cluster import distributed
from jaxinfer.cluster.visible import visible_devices
from jaxinfer.parallel.axes import LayoutError, parse_mesh
from jaxinfer.process.run import Run
from jaxinfer.telemetry.clock import Passage, apart
from jaxinfer.telemetry.gpu_summary import run_energy
from jaxinfer.telemetry.gpus import own_gpus
from jaxinfer.telemetry.monitor import Monitor
from jaxinfer.telemetry.nvml import Gpu
from jaxinfer.telemetry.rapl import Rapl
from jaxinfer.telemetry.samples import merge, merged_path, part_files, part_path

ROUNDS = 5  # barriers, of which each narrows how far the clocks are known to be apart


@attrs.define
class Watch:
    """A run whose processes are watched: all of them have one, also those without a GPU that NVML knows.

    Attributes:
      monitor: this process's own, which counts from where the first process's run began; None where it has no such GPU.
      output: the run's.
      devices: how many the process has on the mesh.
      error_s: the most by which its clock may differ from the first one's.
      ended: the samples are in the run's file, or about to be.
    """

    monitor: Monitor | None
    output: Path
    devices: int
    error_s: float
    ended: bool = False

    def peaks(self) -> dict[int, int]:
        return {} if self.monitor is None else self.monitor.peaks()


@contextmanager
def watching(run: Run) -> Iterator[Watch | None]:
    """The monitor, where the options want one, there is an output and JAX runs on GPUs; None in all processes
    otherwise. Parts that a killed run left beside the output go, and those of this one unless it comes to `end_watch`.
    All processes call it, on the mesh that ``--mesh`` says by now."""
    watch = _begin(run)
    try:
        yield watch
    finally:
        if watch is not None and watch.monitor is not None and not watch.ended:
            watch.monitor.stop()
            watch.monitor.part.unlink(missing_ok=True)


def _begin(run: Run) -> Watch | None:
    if run.args.output is None:
        return None
    output = Path(run.args.output)
    stream = is_stream(output)
    if run.first and not stream:
        for old in part_files(output):
            old.unlink(missing_ok=True)
    if run.args.monitor == "off" or on_cpu():
        return None
    run.life.beat("start", 4, waits=True)
    if distributed.share(stream):
        return None
    try:
        devices = gpus_on(parse_mesh(run.args.mesh))
    except LayoutError:
        return None  # loading the model says it
    zero, error = run_zero(run.phases.began)
    hosts = distributed.hosts()
    gpus = [gpu for gpu in devices if gpu is not None]
    if not gpus:
        return Watch(None, output, len(devices), error)
    # what RAPL counts is of the whole host: one process looks
    rapl = Rapl() if hosts.index(hosts[run.rank]) == run.rank else None
    monitor = Monitor(gpus, part_path(output, run.rank), run.rank, socket.gethostname(), zero, rapl)
    return Watch(monitor, output, len(devices), error)


def on_cpu() -> bool:
    import jax

    return jax.default_backend() == "cpu"


def gpus_on(mesh: Mapping[str, int]) -> list[Gpu | None]:
    """This process's devices on the mesh; None for one that NVML does not know.

    Raises:
      LayoutError: no such mesh.
    """
    import jax

    from jaxinfer.parallel.mesh import make_mesh

    devices = [each for each in make_mesh(dict(mesh)).devices.flat if each.process_index == jax.process_index()]
    numbers = [each.local_hardware_id for each in devices if each.platform != "cpu"]
    found = {gpu.device: gpu for gpu in own_gpus(numbers, visible_devices(os.environ))}
    return [found.get(each) for each in numbers]


def run_zero(began: float) -> tuple[float, float]:
    """When the first process's run began, by this one's ``time.perf_counter``, and the most by which that is wrong, in
    seconds. All processes call it; `began` is each one's own."""
    import jax

    if jax.process_count() == 1:
        return began, 0.0
    passages = []
    for _ in range(ROUNDS):
        came = time.perf_counter()
        distributed.wait_for_all("clocks")
        passages.append(Passage(came, time.perf_counter()))
    told = distributed.everyone({"began": began, "passages": passages})
    first = [Passage(*each) for each in told[0]["passages"]]
    more, error = (0.0, 0.0) if jax.process_index() == 0 else apart(first, passages)
    return told[0]["began"] + more, error


def end_watch(run: Run, watch: Watch | None, window: tuple[float, float], output_tokens: int) -> dict[str, Any]:
    """Ends the monitors and makes one file of theirs. All processes call it, each with its own `window`, see
    `Monitor.window`. Returns ``gpus`` and ``energy`` as OUT.metrics.json has them, in the first process; None elsewhere
    and where nothing was watched."""
    if watch is None:
        return {"gpus": None, "energy": None}
    run.life.beat("end", waits=True)
    own: dict[str, Any] = {"host": socket.gethostname(), "devices": watch.devices, "error_s": watch.error_s}
    if watch.monitor is not None:
        watch.monitor.window(*window)
        watch.monitor.stop()
        own |= watch.monitor.result()
    told = distributed.everyone(own)
    watch.ended = True
    watched = {rank: each for rank, each in enumerate(told) if "gpus" in each}
    if not run.first or not watched:
        return {"gpus": None, "energy": None}
    for rank, each in watched.items():
        if each["failed"] is not None:
            run.say(f"WARNING: the monitor of rank {rank} on {each['host']} ended early: {each['failed']}")
    _merge(run, watch.output, list(watched))
    gpus = [gpu | {"clock_error_s": each["error_s"]} for each in watched.values() for gpu in each["gpus"]]
    rapl: dict[str, float | None] = dict.fromkeys(each["host"] for each in told)
    rapl |= {each["host"]: each["rapl_j"] for each in watched.values() if each["rapl_j"] is not None}
    devices = sum(each["devices"] for each in told)
    energy = run_energy(gpus, devices, list(rapl.values()), output_tokens, window[1] - window[0])
    return {"gpus": gpus, "energy": energy}


def _merge(run: Run, output: Path, ranks: list[int]) -> None:
    parts = [part_path(output, rank) for rank in ranks]
    missing = [str(part) for part in parts if not part.exists()]
    if missing:
        run.say(f"WARNING: {merged_path(output)} lacks what is not to be found from here: {', '.join(missing)}")
    try:
        merge([part for part in parts if part.exists()], merged_path(output))
    except OSError as error:
        run.say(f"WARNING: {merged_path(output)}: {error.strerror}; the samples are in {', '.join(map(str, parts))}")
