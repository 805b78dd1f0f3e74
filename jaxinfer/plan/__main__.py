"""``python -m jaxinfer.plan``: whether a model fits on GPUs, on which layouts, and how fast; without GPU or queue."""

import argparse
import sys
from pathlib import Path
from typing import Any

import attrs

from jaxinfer import __version__
from jaxinfer.checkpoint.files import write_json
from jaxinfer.cluster.cpu import ThreadPoolError
from jaxinfer.cluster.slurm import ClusterError
from jaxinfer.engine.config import DTYPES, EngineConfig
from jaxinfer.options import Parser, add_process_options, writable
from jaxinfer.parallel.axes import LayoutError, parse_mesh
from jaxinfer.plan.advice import advise
from jaxinfer.plan.hardware import GPUS, Gpus, parse_gpus
from jaxinfer.plan.layouts import Ask, Layout, consider, largest_batch, largest_context, meshes, rank
from jaxinfer.plan.show import console, layouts_table, lines, memory_table
from jaxinfer.plan.source import Source, read_source
from jaxinfer.screen import escape_unencodable

PROGRAM = "jaxinfer.plan"

EXAMPLES = f"""
examples:
  Which layouts of 70B fit on a node, and which is best for 64 requests at once:
    python -m jaxinfer.plan --preset llama-2-70b --gpus 8xA100-40 --batch 64

  Is this one legal, and what does it take of each GPU; two nodes of four:
    python -m jaxinfer.plan --preset llama-2-70b --gpus 2x4xA100-64 --mesh stage=2,tensor=4 --context 2048

  A model of your own, from its config.json or its checkpoint:
    python -m jaxinfer.plan --config config.json --gpus 2xT4
    python -m jaxinfer.plan --model CKPT_DIR --gpus H200

  Is the prediction right? On the GPUs of this job, with random weights:
    srun ... python -m jaxinfer.plan --preset llama-3.1-8b --check --batch 8 --context 1024

GPU types: {", ".join(GPUS)} (MI250X: one GCD of two); V100 means V100-32.

The cache has the dtype of the weights. Memory is counted by the functions that the engine itself uses; speed is
predicted from bytes, floating-point operations and link speeds (docs/plan.md has the model and how near it comes).

exit status: 0 it fits; 1 it cannot be or does not fit, and the first lines say why and what would do; 2 an option is
  wrong.
"""


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(
        prog=PROGRAM,
        description="Says whether a model fits on GPUs, on which layouts, and how fast it will be there. Needs no GPU.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"jaxinfer {__version__}")
    group = parser.add_argument_group("what to run").add_mutually_exclusive_group(required=True)
    group.add_argument("--preset", metavar="NAME", help="a published model, of configs/models")
    group.add_argument("--model", type=Path, metavar="DIR", help="a checkpoint, or a Hugging Face folder")
    group.add_argument("--config", type=Path, metavar="FILE", help="a Hugging Face config.json")
    group = parser.add_argument_group("where")
    group.add_argument("--gpus", type=_gpus, metavar="NxTYPE", help="8xA100-40, or nodes first: 2x4xA100-40")
    group.add_argument("--mesh", metavar="AXES", help="stage=2,tensor=4 (default: every mesh of all the GPUs)")
    share = EngineConfig.memory_fraction
    what = f"share of each GPU for weights, workspace and cache (default: {share})"
    group.add_argument("--memory-fraction", type=_share, default=share, metavar="X", help=what)
    group = parser.add_argument_group("the work")
    what = "tokens of prompt and output together, of each sequence (default: the model's longest)"
    group.add_argument("--context", type=_count, metavar="N", help=what)
    what = "sequences in flight at once, which the cache must hold (default: as many as the engine would take)"
    group.add_argument("--batch", type=_count, metavar="N", help=what)
    what = "how many of the context's tokens are output (default: 256)"
    group.add_argument("--new-tokens", type=_count, default=256, metavar="N", help=what)
    what = "of weights and cache (default: the model's; float16 in place of bfloat16 on T4 and V100)"
    group.add_argument("--dtype", choices=DTYPES, help=what)
    what = "prompt tokens per prefill tick (default: what the engine takes)"
    group.add_argument("--prefill-chunk", type=_count, metavar="N", help=what)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything there, for machines")
    what = "run it on the devices that are here, with random weights, and compare; alone or under srun"
    parser.add_argument("--check", action="store_true", help=what)
    parser.add_argument("--cpu-devices", type=_count, metavar="N", help="with --check: on N virtual CPU devices")
    add_process_options(parser)
    args = parser.parse_args(argv)
    if args.gpus is None and not args.check:
        parser.error(f"--gpus is missing: 8xA100-40, say; types: {', '.join(GPUS)}")
    if args.check and args.gpus is not None:
        parser.error("--check looks at the devices that are here: leave --gpus out")
    if args.json is not None and not args.check and not writable(args.json):  # a check's first process alone writes
        parser.error(f"--json: {args.json}: cannot be written")
    return args


def main(argv: list[str] | None = None) -> None:
    escape_unencodable()
    args = parse_arguments(argv)
    try:
        source = read_source(args.preset, args.model, args.config)
        if args.check:
            sys.exit(_check(args, source))
        sys.exit(plan(args, source))
    except (ValueError, OSError, ClusterError, ThreadPoolError) as error:
        text = f"{error.filename}: {error.strerror}" if getattr(error, "filename", None) else str(error)
        print(f"{PROGRAM}: error: {' '.join(text.split())}", file=sys.stderr)
        sys.exit(2)


def _check(args: argparse.Namespace, source: Source) -> int:
    from jaxinfer.plan.check import check, here, start

    start(args)
    gpus = here()
    ask, _ = question(args, source, gpus is None or gpus.type.bfloat16)
    return check(args, source, ask)


def plan(args: argparse.Namespace, source: Source) -> int:
    """Prints and writes the plan; the exit status."""
    gpus, notes = args.gpus, []
    ask, dtype_note = question(args, source, gpus.type.bfloat16)
    notes += [each for each in (dtype_note, gpus.type.note and f"{gpus.type.name}: {gpus.type.note}") if each]
    if args.mesh is None:
        tried = list(meshes(gpus.count))
    else:
        tried = [parse_mesh(args.mesh)]
        used = tried[0]["stage"] * tried[0]["data"] * tried[0]["tensor"]
        if used > gpus.count:
            raise LayoutError(f"mesh {args.mesh} needs {used} GPUs, --gpus gives {gpus.count}")
        if used < gpus.count:
            notes.append(f"{gpus.count - used} of {gpus.count} GPUs stay idle: mesh {args.mesh} takes {used}")
            gpus = gpus.of(used)
    layouts = rank([consider(ask, gpus, sizes) for sizes in tried])
    best = layouts[0]
    out = console()
    sequences = "" if ask.batch is None else f"{ask.batch:,} x "
    lines(
        out,
        f"{source.name}: {source.parameters:,} parameters in {ask.dtype} (the cache too), on {gpus}",
        f"work: contexts of {sequences}{ask.context:,} tokens, {ask.new_tokens:,} of them new",
    )
    advice: list[str] = []
    if best.fits:
        most = {"batch": largest_batch(ask, best), "context": largest_context(ask, best)}
        answer = f"FITS: --mesh {best.mesh}: {best.speed} (predicted)"
        limits = f"holds {most['batch']:,} sequences of {ask.context:,} tokens at once"
        shown = ask.batch or 1
        limits += f", or {shown:,} of {most['context']:,} (the model's longest: {ask.model.max_context:,})"
        lines(out, answer, limits)
    else:
        most = {"batch": 0, "context": 0}
        advice = advise(ask, gpus, layouts)
        lines(out, best.refusal)
        lines(out, *[f"would do: {each}" for each in advice] or ["nothing of these GPUs would do"])
    lines(out, *(f"note: {each}" for each in notes))
    if best.memory is not None:
        memory_table(out, best)
    layouts_table(out, ask, layouts)
    if args.json is not None:
        data = {"model": source.name, "parameters": source.parameters, "gpus": str(gpus), "fits": best.fits}
        data |= {"dtype": ask.dtype, "context": ask.context, "batch": ask.batch, "new_tokens": ask.new_tokens}
        data |= {"advice": advice, "notes": notes, "largest": most, "layouts": [to_json(each) for each in layouts]}
        write_json(args.json, data)
    return 0 if best.fits else 1


def question(args: argparse.Namespace, source: Source, bfloat16: bool) -> tuple[Ask, str]:
    """What is asked, and a note where the dtype is not the model's own."""
    dtype, note = args.dtype or source.dtype, ""
    if args.dtype is None and dtype == "bfloat16" and not bfloat16:
        dtype, note = (
            "float16",
            "the model's bfloat16 is not there on this GPU: float16 (generate needs --dtype float16)",
        )
    longest = source.model.max_context
    context = args.context or longest
    if context > longest:
        raise ValueError(f"context: {context} is beyond the model's longest, {longest}")
    if context < 2:
        raise ValueError(f"context: {context} is below 2")
    new_tokens = min(args.new_tokens, context - 1)
    ask = Ask(source.model, dtype, context, new_tokens, args.batch, args.memory_fraction, args.prefill_chunk)
    return ask, note


def to_json(layout: Layout) -> dict[str, Any]:
    data: dict[str, Any] = {"mesh": layout.mesh, "fits": layout.fits, "reason": layout.reason}
    if layout.memory is not None:
        memory = layout.memory
        data["memory"] = {name: size for name, size, _ in memory.rows()} | {"pages": memory.pages}
    if layout.fitted is not None:
        data |= {"stage_layers": layout.fitted.decoder.stage_layers, "holds": layout.holds}
        data |= {"max_batch": layout.fitted.config.max_batch, "prefill_chunk": layout.fitted.config.prefill_chunk}
        data |= {"batch": layout.work.batch, "predicted": attrs.asdict(layout.prediction)}
    return data


def _gpus(text: str) -> Gpus:
    try:
        return parse_gpus(text)
    except LayoutError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"found {text!r}, legal is a whole number of at least 1")
    return int(text)


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = 0
    if not 0 < share <= 1:
        raise argparse.ArgumentTypeError(f"found {text!r}, legal is above 0 and up to 1")
    return share


if __name__ == "__main__":
    main()
