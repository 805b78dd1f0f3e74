"""``python -m jaxinfer.generate``: prompts in, completions out, on any mesh of devices."""

import argparse
import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from jaxinfer import __version__
from jaxinfer.cluster import distributed
from jaxinfer.cluster.launch import slurm_place
from jaxinfer.cluster.worker import UserError
from jaxinfer.engine.params import SamplingParams
from jaxinfer.engine.request import Request
from jaxinfer.inputs import InputError, InputRecord, parse_record, read_file
from jaxinfer.options import (
    Parser,
    add_engine_options,
    add_limit_options,
    add_place_options,
    add_profile_options,
    add_sampling_options,
    sampling_params,
    unicode,
)
from jaxinfer.outputs import OutputError, Writer, prepare, take_back
from jaxinfer.process.agree import same_everywhere
from jaxinfer.process.errors import memory, usage
from jaxinfer.process.join import join, leave
from jaxinfer.process.model import choose_layers, choose_mesh, find_manifest, load_model
from jaxinfer.process.monitor import Watch, watching
from jaxinfer.process.parse import parse_together
from jaxinfer.process.run import Run, find_process, start
from jaxinfer.screen import escape_unencodable

PROGRAM = "jaxinfer.generate"
SHOWN_ERRORS = 20

EXAMPLES = """
examples:
  One prompt, the text on the screen:
    python -m jaxinfer.generate --model build/tinystories --prompt "Once upon a time"

  A file of prompts on 2 pipeline stages x 2-way tensor parallel; run again after a kill, it does the rest:
    python -m jaxinfer.generate --model CKPT --prompts in.jsonl --output out.jsonl --mesh stage=2,tensor=2

  The same mesh without a GPU, on four virtual CPU devices:
    ... --mesh stage=2,tensor=2 --cpu-devices 4

  On two nodes of a Slurm cluster with four GPUs each, one process per GPU; the mesh becomes stage=2,tensor=4:
    srun -N2 --ntasks-per-node=4 --gpus-per-node=4 --kill-on-bad-exit=1 \\
      python -m jaxinfer.generate --model CKPT --prompts in.jsonl --output out.jsonl

  The speed of a published model on these GPUs, without its weights (presets have no tokenizer: prompt_token_ids alone):
    python -m jaxinfer.generate --preset falcon-40b --random-weights --prompts in.jsonl --output out.jsonl

  Two processes of one run without Slurm (start both; each reads the same files):
    ... --coordinator node1:9876 --num-processes 2 --process-id 0
    ... --coordinator node1:9876 --num-processes 2 --process-id 1

input lines (.jsonl):
  {"id": "a", "prompt": "Once upon a time", "temperature": 0.8, "n": 2}
  {"prompt_token_ids": [1, 450, 2875], "max_new_tokens": 10}
  {"messages": [{"role": "user", "content": "Tell me a story."}]}
  The id is optional (the line's number); any sampling option may follow, with underscores, and meta: any JSON, which
  comes out again with the result. In a .txt file each line is a prompt. A bad line becomes
  {"id": ..., "line": ..., "error": ...} in the output, and the rest runs.

output lines:
  id, index (0 to n-1), text, token_ids, finish_reason (stop or length), limit (of a length: max_new_tokens, or
  context where the model has no room for so many), prompt_tokens, completion_tokens, ttft_s, latency_s; logprobs where
  asked for, meta where given. Beside OUT.jsonl: OUT.run.json (settings, versions, command), OUT.metrics.json,
  OUT.profile.json of --profile (where each device's time went), and on NVIDIA GPUs OUT.gpu.csv of --monitor (a line per
  sample and GPU, in seconds since the first process began; an empty cell was not measured). A pipe or a device
  (/dev/stdout) takes the lines alone: nothing is beside it, nothing continued.
  Logits that are NaN or infinite end a sample, no other, as {"id": ..., "index": ..., "error": ...};
  the next run of the same command tries it again, and with another --dtype and --resume-anyway those alone.

signals: SIGTERM and SIGUSR1 let nothing new begin, finish what runs within --grace-s, put the rest back and end with
  status 0; OUT.metrics.json says how many are "unfinished", and the same command does them.

exit status: 0 done (bad lines and errors are counted in a warning) or stopped by a signal, 2 an error that says what to
  change (as where all lines are bad, or all samples errors), 1 anything else: a rank died, failed or was stuck, and the
  last lines of rank 0 say which.
"""


def main() -> None:
    escape_unencodable()
    args = parse_together(PROGRAM, parse_arguments)
    launch = find_process(PROGRAM, args)
    start(PROGRAM, args, launch, execute, lambda: args.output is None or take_back(Path(args.output)))


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser()
    return _checked(parser, parser.parse_args(argv))


def make_parser() -> Parser:
    """All options of the command; a study's settings are most of them."""
    parser = Parser(
        prog=PROGRAM,
        description="Continues prompts with a converted model (python -m convert), on any mesh of devices.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"jaxinfer {__version__}")
    group = parser.add_argument_group("what to run")
    group.add_argument("--model", metavar="CKPT_DIR", help="checkpoint folder of python -m convert")
    what = "a model of configs/models: --model has to be it; without --model, --random-weights are its weights"
    group.add_argument("--preset", metavar="NAME", help=what)
    group.add_argument("--prompts", metavar="FILE", help="FILE.jsonl, FILE.txt or - for standard input")
    what = "a prompt; may be given several times"
    group.add_argument("--prompt", action="append", type=unicode, metavar="TEXT", help=what)
    group.add_argument("--output", metavar="OUT.jsonl", help="results; without it the text goes to the screen alone")
    group.add_argument("--print", action="store_true", help="show the text on the screen as well")
    group.add_argument("--strict", action="store_true", help="stop at the first bad line, before anything runs")
    group.add_argument("--overwrite", action="store_true", help="start over where the output has results")
    what = "add to results of another model, other settings or other prompts"
    group.add_argument("--resume-anyway", action="store_true", help=what)
    add_place_options(parser)
    add_engine_options(parser)
    add_sampling_options(parser, "sampling, for lines that do not say otherwise")
    add_profile_options(parser)
    add_limit_options(parser)
    return parser


def _checked(parser: Parser, args: argparse.Namespace) -> argparse.Namespace:
    if args.model is None and args.preset is None:
        parser.error("give --model CKPT_DIR, or --preset NAME --random-weights")
    if args.model is None and args.load_format != "dummy":
        parser.error(
            f"--preset {args.preset} brings no weights: give --model CKPT_DIR (its converted checkpoint) or "
            "--random-weights"
        )
    if args.model is None and args.prompt is not None:
        parser.error("--prompt: a preset has no tokenizer; give --prompts FILE.jsonl with prompt_token_ids")
    if (args.prompts is None) == (args.prompt is None):
        parser.error("give --prompts or --prompt")
    args.warm_up = args.warm_up or args.repeats is not None  # or the first time would differ from the others
    given = {args.coordinator is None, args.num_processes is None, args.process_id is None}
    if len(given) > 1:
        parser.error("--coordinator, --num-processes and --process-id belong together")
    if args.overwrite and args.resume_anyway:
        parser.error("--overwrite starts over, --resume-anyway goes on: give one of them")
    if args.output == "-":
        parser.error("--output -: found no file; /dev/stdout takes the lines, and without --output the text is shown")
    if args.output and args.prompts and Path(args.output).resolve() == Path(args.prompts).resolve():
        parser.error("--output is the file of prompts")
    return args


def execute(run: Run) -> int:
    """Reads, runs, writes; the exit status.

    Raises:
      UserError: with the text for the user.
    """
    try:
        return _execute(run)
    except OutputError as error:
        raise UserError(str(error)) from error
    except KeyboardInterrupt:
        raise KeyboardInterrupt(*["the same command does the rest"] if run.args.output else []) from None


def _execute(run: Run) -> int:
    args = run.args
    if run.launch and run.launch.num_processes > 1 and args.prompts == "-":
        raise UserError("--prompts - works with one process: standard input does not reach them all")
    with usage():
        defaults = sampling_params(args)
        with run.phases.within("preprocess"):
            records = _read(args, defaults)
        if args.strict:
            _stop_at_error(records)
        join(run)
    with ExitStack() as stack:
        finished, writer = _begin(run, defaults, records, stack)
        return _finish(run, records, finished, writer)


def _finish(run: Run, records: list[InputRecord | InputError], finished: set[str], writer: Writer | None) -> int:
    """Runs what is not finished; the exit status."""
    args = run.args
    todo = [record for record in records if isinstance(record, InputError) or record.id not in finished]
    if any(isinstance(record, InputRecord) for record in todo):
        with memory(), watching(run) as watch:
            _run(run, todo, len(finished), writer, watch)
    else:
        _write_errors(run, todo, writer)
        if finished:
            run.say(f"nothing to run: {args.output} has all {len(finished):,} requests")
        if writer is not None:
            from jaxinfer.batch import note_unfinished

            note_unfinished(writer, 0, fresh=False)
    bad = sum(isinstance(record, InputError) for record in todo)
    if bad:
        run.say(f"WARNING: {bad:,} of {len(records):,} lines are bad and did not run")
    if bad == len(records):
        raise UserError("no line could run")
    leave(run)
    return 0


def _read(args: argparse.Namespace, defaults: SamplingParams) -> list[InputRecord | InputError]:
    if args.prompts is None:
        prompts = enumerate(args.prompt, 1)
        return [parse_record({"prompt": text}, number, str(number), defaults) for number, text in prompts]
    records = read_file(args.prompts, defaults)
    if not records:
        raise ValueError(f"{args.prompts}: there is no prompt in it")
    return records


def _stop_at_error(records: list[InputRecord | InputError]) -> None:
    for record in records:
        if isinstance(record, InputError):
            raise UserError(f"line {record.line} (id {record.id!r}): {record.message}")


def _begin(
    run: Run, defaults: SamplingParams, records: list[InputRecord | InputError], stack: ExitStack
) -> tuple[set[str], Writer | None]:
    """Looks at the checkpoint, chooses the mesh, makes the output ready; the ids of requests that are finished, and in
    the first process the output, which `stack` closes."""
    import xxhash

    from jaxinfer.telemetry.manifest import describe_run

    args = run.args
    run.life.beat("start", 1)
    with usage():
        manifest, content = find_manifest(args)
        checkpoint = xxhash.xxh3_128(content)
        run.life.beat("start", 2, waits=True)
        hosts = distributed.hosts()
        run.phases.started()
        same_everywhere(hosts, "checkpoint", checkpoint.digest())
        same_everywhere(hosts, "prompts or options", _digest(args, records))
        mesh = choose_mesh(run, manifest.model, hosts)
        flags = {name: value for name, value in vars(args).items() if value is not None}
        cut_from = choose_layers(run, manifest, mesh)
    if args.output is None:
        return set(), None
    settings = {"model": checkpoint.hexdigest(), "dtype": args.dtype or manifest.dtype, "max_context": args.max_context}
    settings["load_format"] = args.load_format
    described = describe_run(__version__, flags, mesh, hosts) | {"stage_layers_from": cut_from}
    described["slurm"] = slurm_place(os.environ, run.launch)
    answer: dict[str, Any] = {}
    writer = None
    if run.first:  # one process decides: on a shared file system the others may see an older file
        run.life.beat("start", 3)
        try:
            writer = stack.enter_context(Writer(Path(args.output)))
            if args.repeats is not None and writer.size and not args.overwrite:
                raise OutputError(
                    f"{args.output} has results, and --repeats measures whole runs: choose another output, or "
                    "--overwrite to start over"
                )
            done = prepare(
                writer, records, settings | defaults.to_dict(), described, args.overwrite, args.resume_anyway
            )
            answer["finished"] = sorted(done)
        except OutputError as error:
            answer["error"] = str(error)
    run.life.beat("start", 4, waits=True)
    answer = distributed.share(answer)
    if "error" in answer:
        raise OutputError(answer["error"])
    return set(answer["finished"]), writer


def _digest(args: argparse.Namespace, records: list[InputRecord | InputError]) -> bytes:
    """Of all by which the processes must agree."""
    import xxhash

    from jaxinfer.engine.cut import identity
    from jaxinfer.outputs import prompt_hash

    own = ("process_id", "prompts", "model", "output", "compile_cache")  # paths may be spelt differently on each node
    flags = vars(args) | {"stage_layers": identity(args.stage_layers)}
    parts = [repr(sorted((key, value) for key, value in flags.items() if key not in own))]
    parts += [f"{each.id}\0{prompt_hash(each) if isinstance(each, InputRecord) else ''}" for each in records]
    return xxhash.xxh3_128_digest("\n".join(parts).encode())


def _run(
    run: Run, todo: list[InputRecord | InputError], already: int, writer: Writer | None, watch: Watch | None
) -> None:
    """Loads the model, runs the records, writes what comes of them; a bad record gives way to its error in `todo`."""
    from jaxinfer.batch import of_processes, run_batch
    from jaxinfer.profiled import begin, conclude
    from jaxinfer.telemetry.metrics import show

    args = run.args
    requests: dict[str, Request] = {}

    def add(llm: Any) -> None:
        for place, record in enumerate(todo):
            run.life.beat("load")
            if isinstance(record, InputRecord):
                try:
                    requests[record.id] = llm.add(record)
                except ValueError as error:
                    todo[place] = InputError(record.line, record.id, str(error))
        if args.strict:
            _stop_at_error(todo)
        llm.engine.foresee() if args.warm_up else llm.engine.prepare()

    llm = load_model(run, add)
    _write_errors(run, todo, writer)
    if not requests:
        return
    counts = {"already finished": already, "bad lines": len(todo) - len(requests)}
    shows = run.first and (args.print or args.output is None)
    profile = None
    if args.profile is not None:
        with usage():
            profile = begin(run, llm.engine)
    summary = run_batch(llm, requests, run, writer, shows, counts, profile, watch)
    if profile is not None:
        summary |= conclude(run, profile, llm.engine, writer)
        summary |= of_processes(run, llm.engine, watch)  # reading traces took its time too
        if writer is not None:
            writer.note("metrics", summary)
    if run.first:
        show(summary, counts)
    if failed := summary["failed"]:
        told = f"{failed:,} of {summary['samples']:,} samples ended with an error; {summary['first_failure']}"
        if failed == summary["samples"] and not summary["stopped_by"]:
            raise UserError(told)
        run.say(f"WARNING: {told}")
    if summary["stopped_by"]:
        left = f"{summary['unfinished']:,} of {len(requests):,} requests are left; the same command does the rest"
        if args.repeats is not None:
            whole = "the results are whole" if not summary["unfinished"] else "the results are not whole"
            left = (
                f"{summary['repeats']['count']} of {args.repeats} repeats were done, {whole}; --overwrite measures anew"
            )
        run.say(f"stopped by {summary['stopped_by']}: {left}")


def _write_errors(run: Run, todo: list[InputRecord | InputError], writer: Writer | None) -> None:
    bad = [record for record in todo if isinstance(record, InputError)]
    for error in bad[:SHOWN_ERRORS]:
        run.say(f"line {error.line} (id {error.id!r}): {error.message}")
    if len(bad) > SHOWN_ERRORS:
        run.say(f"and {len(bad) - SHOWN_ERRORS:,} more bad lines")
    if writer is not None:
        with run.phases.within("write"):
            for error in bad:
                writer.write(error.to_json())


if __name__ == "__main__":
    main()
