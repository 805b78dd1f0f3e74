"""The model that the options name: its manifest, its mesh, its weights."""

import argparse
import sys
import warnings
from collections.abc import Callable
from typing import Any

from jaxinfer.cluster import distributed
from jaxinfer.cluster.worker import UserError
from jaxinfer.compile_cache import use_compile_cache
from jaxinfer.options import engine_options
from jaxinfer.process.errors import usage
from jaxinfer.process.run import Run
from jaxinfer.telemetry.progress import Progress


def find_manifest(args: argparse.Namespace) -> tuple[Any, bytes]:
    """The manifest of --model, or else of --preset, and the bytes by which one is known from another.

    Raises:
      ValueError: no such preset, or the checkpoint is not what it expects; CheckpointError: no checkpoint.
    """
    from jaxinfer.checkpoint.manifest import read_manifest
    from jaxinfer.checkpoint.verify import identity
    from jaxinfer.presets import load_preset

    preset = None if args.preset is None else load_preset(args.preset)
    if args.model is None:
        return preset.manifest, identity(preset.manifest, None)
    manifest = read_manifest(args.model)
    if preset is not None:
        preset.check_manifest(args.model, manifest)
    return manifest, identity(manifest, args.model)


def choose_mesh(run: Run, model: dict[str, Any], hosts: list[str]) -> dict[str, int]:
    """The sizes of the axes; ``--mesh auto`` becomes what it stands for, on `hosts` of the processes.

    Raises:
      LayoutError: no such mesh.
    """
    from jaxinfer.engine.layout import auto_mesh
    from jaxinfer.parallel.axes import mesh_text, parse_mesh

    args = run.args
    if args.mesh == "auto":
        sizes, why = auto_mesh(model, hosts)
        args.mesh = ",".join(f"{axis}={size}" for axis, size in sizes.items())
        if max(sizes.values()) > 1:
            run.say(f"mesh: {mesh_text(sizes)} ({why})")
    return parse_mesh(args.mesh)


def choose_layers(run: Run, manifest: Any, sizes: dict[str, int]) -> dict[str, Any] | None:
    """A measured --stage-layers becomes the layers of each stage; what it comes from, for the run's file.

    Raises:
      ValueError: no such cut (`choose_cut`).
    """
    from jaxinfer.engine.cut import choose_cut

    args = run.args
    if args.stage_layers is None:
        return None
    cut = choose_cut(args.stage_layers, manifest.model, sizes, args.dtype or manifest.dtype)
    if cut.source is not None:
        args.stage_layers = ",".join(map(str, cut.stage_layers))
        run.say(cut.told())
    return cut.source


def load_model(run: Run, meanwhile: Callable[[Any], None]) -> Any:
    """The `LLM` with its weights, by the options of `add_engine_options`; while they load, under a bar and with signs
    of life, `meanwhile` is called with it.

    Raises:
      UserError: what cannot be, or a checkpoint that is not whole.
    """
    import jax

    from jaxinfer.checkpoint.manifest import WithoutChecksums
    from jaxinfer.llm import LLM

    args = run.args
    run.life.beat("start", 5, waits=True)
    if warning := use_compile_cache(args.compile_cache):
        run.say(f"WARNING: {warning}")
    run.life.beat("load")
    hosts = distributed.hosts()
    place = jax.process_index()
    shown = hosts.index(hosts[place]) == place  # one line per node: what its first process does stands for all
    name = f"load on {hosts[place]}" if len(hosts) > 1 else "load"
    bar = Progress(name, "B", shown=shown, scale=True)
    pieces = 0

    def loading(done: int, total: int) -> None:
        nonlocal pieces
        pieces += 1
        run.life.beat("load", pieces)
        bar.to(done, total)

    try:
        with usage(), warnings.catch_warnings():
            warnings.simplefilter("ignore", WithoutChecksums)  # the run says it once
            llm = LLM(
                args.model or find_manifest(args)[0],
                compile_cache="none",  # it is there already
                loading=loading,
                beat=run.life.beat,
                phases=run.phases,
                wait=False,
                **engine_options(args),
            )
        if args.model is not None and (warning := llm.engine.manifest.warning(args.model)):
            run.say(f"WARNING: {warning}")
        with llm.engine.loading_stops_at_error():
            meanwhile(llm)
        with usage():
            llm.engine.wait_loaded()
    except UserError as error:
        virtual = jax.default_backend() == "cpu" and args.cpu_devices is None and "devices, found" in str(error)
        raise UserError(f"{error}{'; --cpu-devices N makes N virtual ones' if virtual else ''}", error.table) from error
    finally:
        bar.close()
    if shown and len(hosts) > 1:
        stats = llm.engine.stats
        rate = stats.load_bytes / stats.load_seconds
        size = f"{stats.load_bytes / 1e9:.3f} GB in {stats.load_seconds:.2f} s ({rate / 1e9:.1f} GB/s)"
        print(f"{run.program}: {name}: rank {place} has its {size}", file=sys.stderr)
    return llm
