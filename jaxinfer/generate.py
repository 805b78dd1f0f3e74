"""``python -m jaxinfer.generate``: prompts in, completions out, on any mesh of devices."""

import argparse
import os
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jaxinfer import __version__
from jaxinfer.cluster import distributed
from jaxinfer.cluster.cpu import ThreadPoolError, use_virtual_devices
from jaxinfer.engine.params import SamplingParams
from jaxinfer.engine.request import Output, Request
from jaxinfer.inputs import InputError, InputRecord, parse_record, read_file
from jaxinfer.options import (
    Parser,
    add_engine_options,
    add_place_options,
    add_sampling_options,
    engine_options,
    sampling_params,
)
from jaxinfer.outputs import OutputError, Writer, beside, output_line, prepare, write_json
from jaxinfer.telemetry.progress import Progress

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

  Two processes of one run (start both; each reads the same files):
    ... --coordinator node1:9876 --num-processes 2 --process-id 0
    ... --coordinator node1:9876 --num-processes 2 --process-id 1

input lines (.jsonl):
  {"id": "a", "prompt": "Once upon a time", "temperature": 0.8, "n": 2}
  {"prompt_token_ids": [1, 450, 2875], "max_new_tokens": 10}
  {"messages": [{"role": "user", "content": "Tell me a story."}]}
  The id is optional (the line's number); any sampling option may follow, with underscores. In a .txt file each line is
  a prompt. A bad line becomes {"id": ..., "line": ..., "error": ...} in the output, and the rest runs.

output lines:
  id, index (0 to n-1), text, token_ids, finish_reason (stop or length), prompt_tokens, completion_tokens, ttft_s,
  latency_s, and logprobs where asked for. Beside OUT.jsonl: OUT.run.json (settings, versions, command) and
  OUT.metrics.json.

exit status: 0 done (bad lines are counted in a warning), 2 an error that says what to change, 1 anything else.
"""


class UsageError(Exception):
    """What the user can mend: one line, no traceback."""


def main() -> None:
    args = parse_arguments()
    if args.coordinator is None:
        sys.exit(_guarded(args))
    distributed.run(lambda: _guarded(args), args.process_id)


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(
        prog=PROGRAM,
        description="Continues prompts with a converted model (python -m convert), on any mesh of devices.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"jaxinfer {__version__}")
    group = parser.add_argument_group("what to run")
    group.add_argument("--model", required=True, metavar="CKPT_DIR", help="checkpoint folder of python -m convert")
    group.add_argument("--prompts", metavar="FILE", help="FILE.jsonl, FILE.txt or - for standard input")
    group.add_argument("--prompt", action="append", metavar="TEXT", help="a prompt; may be given several times")
    group.add_argument("--output", metavar="OUT.jsonl", help="results; without it the text goes to the screen alone")
    group.add_argument("--print", action="store_true", help="show the text on the screen as well")
    group.add_argument("--strict", action="store_true", help="stop at the first bad line, before anything runs")
    group.add_argument("--overwrite", action="store_true", help="start over where the output has results")
    what = "add to results of another model, other settings or other prompts"
    group.add_argument("--resume-anyway", action="store_true", help=what)
    add_place_options(parser)
    add_engine_options(parser)
    add_sampling_options(parser, "sampling, for lines that do not say otherwise")
    args = parser.parse_args(argv)
    if (args.prompts is None) == (args.prompt is None):
        parser.error("give --prompts or --prompt")
    given = {args.coordinator is None, args.num_processes is None, args.process_id is None}
    if len(given) > 1:
        parser.error("--coordinator, --num-processes and --process-id belong together")
    if args.prompts == "-" and args.coordinator:
        parser.error("--prompts - works with one process: standard input does not reach them all")
    if args.overwrite and args.resume_anyway:
        parser.error("--overwrite starts over, --resume-anyway goes on: give one of them")
    if args.output and args.prompts and Path(args.output).resolve() == Path(args.prompts).resolve():
        parser.error("--output is the file of prompts")
    return args


def execute(args: argparse.Namespace) -> int:
    """Reads, runs, writes; the exit status.

    Raises:
      UsageError, OutputError: with the text for the user.
    """
    with _usage():
        defaults = sampling_params(args)
        records = _read(args, defaults)
        if args.strict:
            _stop_at_error(records)
        if args.cpu_devices is not None:
            use_virtual_devices(args.cpu_devices)
        if args.coordinator is not None:
            distributed.initialize(args.coordinator, args.num_processes, args.process_id)
    finished = _begin(args, defaults, records)
    todo = [record for record in records if isinstance(record, InputError) or record.id not in finished]
    if any(isinstance(record, InputRecord) for record in todo):
        _run(args, todo, len(finished))
    else:
        _write_errors(args, todo)
        if finished:
            _say(args, f"nothing to run: {args.output} has all {len(finished):,} requests")
    bad = sum(isinstance(record, InputError) for record in todo)
    if bad:
        _say(args, f"WARNING: {bad:,} of {len(records):,} lines are bad and did not run")
    if bad == len(records):
        raise UsageError("no line could run")
    distributed.wait_for_all(f"{PROGRAM} ends")
    return 0


def _guarded(args: argparse.Namespace) -> int:
    try:
        return execute(args)
    except (UsageError, OutputError) as error:
        rank = f"[rank {args.process_id}] " if args.process_id else ""
        print(f"{rank}{PROGRAM}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        again = "; the same command does the rest" if args.output else ""
        print(f"{PROGRAM}: interrupted{again}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever read the screen, head say, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


@contextmanager
def _usage() -> Iterator[None]:
    """Errors in here are the user's to mend."""
    try:
        yield
    except OSError as error:
        name = f"{error.filename}: " if error.filename else ""
        raise UsageError(f"{name}{error.strerror or error}") from error
    except (ValueError, ThreadPoolError, distributed.ClusterError) as error:
        raise UsageError(str(error)) from error


def _say(args: argparse.Namespace, text: str) -> None:
    if not args.process_id:
        print(f"{PROGRAM}: {text}", file=sys.stderr)


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
            raise UsageError(f"line {record.line} (id {record.id!r}): {record.message}")


def _begin(args: argparse.Namespace, defaults: SamplingParams, records: list[InputRecord | InputError]) -> set[str]:
    """Looks at the checkpoint, makes the output ready; the ids of requests that are finished."""
    import xxhash

    from jaxinfer.checkpoint.manifest import NAME, read_manifest
    from jaxinfer.parallel.mesh import parse_mesh
    from jaxinfer.telemetry.manifest import describe_run

    with _usage():
        manifest = read_manifest(args.model)
        checkpoint = xxhash.xxh3_128_hexdigest((Path(args.model) / NAME).read_bytes())
        mesh = parse_mesh(args.mesh)
    if args.output is None:
        return set()
    settings = {"model": checkpoint, "dtype": args.dtype or manifest.dtype, "max_context": args.max_context}
    flags = {name: value for name, value in vars(args).items() if value is not None}
    run = describe_run(__version__, flags, mesh, distributed.hosts())
    answer: dict[str, Any] = {}
    if not args.process_id:  # one process decides: on a shared file system the others may see an older file
        try:
            output = Path(args.output)
            done = prepare(output, records, settings | defaults.to_dict(), run, args.overwrite, args.resume_anyway)
            answer["finished"] = sorted(done)
        except OutputError as error:
            answer["error"] = str(error)
    answer = distributed.share(answer)
    if "error" in answer:
        raise OutputError(answer["error"])
    return set(answer["finished"])


def _load(args: argparse.Namespace) -> Any:
    import jax

    from jaxinfer.llm import LLM

    bar = Progress("load", "B", shown=not args.process_id, scale=True)
    try:
        with _usage():
            return LLM(args.model, loading=bar.to, **engine_options(args))
    except UsageError as error:
        virtual = jax.default_backend() == "cpu" and args.cpu_devices is None and "devices, found" in str(error)
        raise UsageError(f"{error}{'; --cpu-devices N makes N virtual ones' if virtual else ''}") from error
    finally:
        bar.close()


def _run(args: argparse.Namespace, todo: list[InputRecord | InputError], already: int) -> None:
    """Loads the model, runs the records, writes what comes of them; a bad record gives way to its error in `todo`."""
    import jax

    from jaxinfer.telemetry.metrics import RunMetrics, show

    llm = _load(args)
    metrics = RunMetrics()
    requests: dict[str, Request] = {}
    for place, record in enumerate(todo):
        if isinstance(record, InputRecord):
            try:
                requests[record.id] = llm.add(record)
            except ValueError as error:
                todo[place] = InputError(record.line, record.id, str(error))
    if args.strict:
        _stop_at_error(todo)
    _write_errors(args, todo)
    if not requests:
        return
    first = not args.process_id
    writer = Writer(Path(args.output)) if first and args.output is not None else None
    shows = first and (args.print or args.output is None)
    bar = Progress("generate", "requests", len(requests), shown=first)
    left = Counter({name: request.params.n for name, request in requests.items()})
    try:
        for update in llm.updates():
            metrics.add(update)
            if update.output is not None:
                left[update.request_id] -= 1
                if writer is not None:
                    writer.write(output_line(update.output))
                if shows:
                    bar.write(_readable(update.output, requests[update.request_id], llm.engine.tokenizer))
            bar.update(int(update.output is not None and not left[update.request_id]), len(update.token_ids))
    finally:
        bar.close()
        if writer is not None:
            writer.close()
    if first:
        counts = {"already finished": already, "bad lines": len(todo) - len(requests)}
        summary = metrics.summary(asdict(llm.engine.stats), jax.devices()[0].device_kind)
        if writer is not None:
            write_json(beside(writer.path, "metrics"), counts | summary)
        show(summary, counts)


def _write_errors(args: argparse.Namespace, todo: list[InputRecord | InputError]) -> None:
    bad = [record for record in todo if isinstance(record, InputError)]
    for error in bad[:SHOWN_ERRORS]:
        _say(args, f"line {error.line} (id {error.id!r}): {error.message}")
    if len(bad) > SHOWN_ERRORS:
        _say(args, f"and {len(bad) - SHOWN_ERRORS:,} more bad lines")
    if bad and args.output is not None and not args.process_id:
        writer = Writer(Path(args.output))
        for error in bad:
            writer.write(error.to_json())
        writer.close()


def _readable(output: Output, request: Request, tokenizer: Any) -> str:
    title = output.id if request.params.n == 1 else f"{output.id} [{output.index}]"
    if tokenizer is None:
        return f"=== {title}\n{request.prompt_token_ids} {output.token_ids}\n"
    prompt = tokenizer.decode(request.prompt_token_ids, skip_special_tokens=True)
    return f"=== {title}\n{prompt}{output.text}\n"


if __name__ == "__main__":
    main()
