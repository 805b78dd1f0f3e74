"""``python -m jaxinfer.study.reference``: greedy tokens of a Hugging Face model by transformers itself, in float32 on
the CPU, for a study's correctness to be held against. Nothing else in jaxinfer runs torch."""

import argparse
import shutil
import sys
import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import xxhash

from convert.source import Source, open_source
from convert.tensor import ConvertError
from jaxinfer import __version__
from jaxinfer.engine.params import MOST_TOP_LOGPROBS, SamplingParams
from jaxinfer.engine.request import Output, TokenLogprob, stop_ids
from jaxinfer.inputs import InputError, InputRecord, read_file, token_ids
from jaxinfer.models.config import ConfigError, ModelConfig
from jaxinfer.options import Parser
from jaxinfer.outputs import OutputError, Writer, output_line, prepare
from jaxinfer.screen import escape_unencodable
from jaxinfer.telemetry.manifest import git_commit
from jaxinfer.telemetry.progress import Progress
from jaxinfer.tokenizer import load_tokenizer

PROGRAM = "jaxinfer.study.reference"
TAKEN = ("max_new_tokens", "ignore_eos", "stop_token_ids", "logprobs", "seed")  # of the sampling fields

Prompt = tuple[InputRecord, list[int], Any]  # with its token ids and the tokenizer, None where there is none


class NoReference(RuntimeError):
    """Why there is no reference: one line for the user."""


def main() -> int:
    escape_unencodable()
    args = parse_arguments()
    try:
        return run(args)
    except (NoReference, ConvertError, ConfigError, OutputError, ValueError) as error:
        print(f"{PROGRAM}: error: {error}", file=sys.stderr)
    except OSError as error:
        print(f"{PROGRAM}: error: {error.filename or ''}: {error.strerror or error}", file=sys.stderr)
    except KeyboardInterrupt:
        print(f"{PROGRAM}: interrupted; the same command does the rest", file=sys.stderr)
        return 130
    return 2


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(
        prog=PROGRAM,
        description="Continues prompts with a Hugging Face model by transformers: greedy, float32, on the CPU, one "
        "after the other. The lines are those of jaxinfer.generate; the same command again does what is missing.",
        epilog="example: python -m jaxinfer.study.reference --source examples/tinystories/model "
        "--prompts examples/tinystories/prompts.jsonl --output build/reference.jsonl --max-new-tokens 40",
        allow_abbrev=False,
    )
    parser.add_argument("--source", required=True, metavar="HF_DIR", help="the folder that the checkpoint was made of")
    parser.add_argument("--prompts", required=True, metavar="FILE", help="FILE.jsonl or FILE.txt, as for generate")
    parser.add_argument("--output", required=True, metavar="OUT.jsonl", help="as that of generate")
    parser.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="of lines without it (default: 64)")
    what = f"likeliest tokens with their logprobs at each position, up to {MOST_TOP_LOGPROBS} (default: 5)"
    parser.add_argument("--logprobs", type=int, default=5, metavar="N", help=what)
    parser.add_argument("--ignore-eos", action="store_true", help="go on past the model's end token")
    parser.add_argument("--overwrite", action="store_true", help="start over where the output has results")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> int:
    """Raises the errors that `main` tells."""
    defaults = SamplingParams(max_new_tokens=args.max_new_tokens, logprobs=args.logprobs, ignore_eos=args.ignore_eos)
    records = read_file(args.prompts, defaults)
    if not records:
        raise NoReference(f"{args.prompts}: there is no prompt in it")
    source = open_source(args.source)
    prompts = _prompts(args.prompts, records, source)
    torch = _torch()
    began = {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": sys.argv,
        "flags": {name: value for name, value in vars(args).items() if value is not None},
        "versions": {"jaxinfer": __version__, "torch": torch.__version__, "transformers": version("transformers")},
        "commit": git_commit(Path(__file__).parent),
    }
    settings = {"source": _identity(source), "dtype": "float32"} | defaults.to_dict()
    with Writer(Path(args.output)) as writer:
        done = prepare(writer, records, settings, began, args.overwrite, anyway=False)
        if todo := [each for each in prompts if each[0].id not in done]:
            _write(torch, source, todo, writer)
    print(f"{PROGRAM}: {args.output} has all {len(records):,} requests", file=sys.stderr)
    return 0


def _torch() -> Any:
    try:
        import torch
    except ImportError:
        raise NoReference(
            "torch is not installed: the extra reference brings it (pip install -e '.[reference]'); "
            "nothing else in jaxinfer needs it"
        ) from None
    return torch


def _identity(source: Source) -> str:
    """Another value for another model: by its small files, and by size and time of those of the weights."""
    state = xxhash.xxh3_128()
    for path in source.notes:
        state.update(path.read_bytes())
    for path in source.weights:
        stat = path.stat()
        state.update(f"{path.name} {stat.st_size} {stat.st_mtime_ns}".encode())
    return state.hexdigest()


def _prompts(file: str, records: list[InputRecord | InputError], source: Source) -> list[Prompt]:
    """Each record with its token ids and the tokenizer.

    Raises:
      NoReference: a line that cannot be run: a reference with holes is none.
    """
    with TemporaryDirectory() as folder:  # as in a checkpoint, so that prompts become the same tokens
        (Path(folder) / "tokenizer").mkdir()
        for path in source.tokenizer:
            shutil.copy(path, Path(folder) / "tokenizer")
        tokenizer = load_tokenizer(folder)
    prompts: list[Prompt] = []
    for record in records:
        where = f"{file}, line {record.line} (id {record.id!r})"
        if isinstance(record, InputError):
            raise NoReference(f"{where}: {record.message}")
        try:
            ids = token_ids(record, tokenizer)
        except ValueError as error:
            raise NoReference(f"{where}: {error}") from None
        _check(where, record.params, ids, source)
        prompts.append((record, ids, tokenizer))
    return prompts


def _check(where: str, params: SamplingParams, ids: list[int], source: Source) -> None:
    plain = SamplingParams(**{name: getattr(params, name) for name in TAKEN})
    if params != plain:
        now, before = params.to_dict(), plain.to_dict()
        name = next(name for name in now if now[name] != before[name])
        raise NoReference(f"{where}: {name}: found {now[name]}, legal is {before[name]}: a reference is greedy")
    if not params.max_new_tokens:
        raise NoReference(f"{where}: max_new_tokens: found 0, legal is a number from 1")
    model = source.config
    if not 0 < len(ids) < model.max_context:
        raise NoReference(f"{where}: {len(ids):,} tokens; legal: 1 to {model.max_context - 1:,}")
    for token in (*ids, *params.stop_token_ids):
        if not 0 <= token < model.vocab_size:
            raise NoReference(f"{where}: token id {token} is out of range; legal: 0 to {model.vocab_size - 1}")


def _write(torch: Any, source: Source, todo: list[Prompt], writer: Writer) -> None:
    from transformers import AutoModelForCausalLM

    # Falcon's eager attention adds alibi twice; everywhere else eager is the plain form
    attention = "sdpa" if source.config.alibi else "eager"
    load = {"dtype": torch.float32, "attn_implementation": attention, "local_files_only": True}
    model = AutoModelForCausalLM.from_pretrained(source.folder, **load).eval()
    progress, began = Progress("reference", "requests", len(todo)), time.monotonic()
    for record, prompt, tokenizer in todo:
        with torch.inference_mode():
            output = _continue(torch, model, source.config, record, prompt, began)
        shown = output.token_ids[:-1] if output.finish_reason == "stop" else output.token_ids
        writer.write(output_line(output if tokenizer is None else replace(output, text=tokenizer.decode(shown))))
        progress.update(1, len(output.token_ids))
    progress.close()


def _continue(
    torch: Any, model: Any, config: ModelConfig, record: InputRecord, prompt: list[int], began: float
) -> Output:
    """Token after token, each the likeliest of a forward pass over what is new, with transformers' own cache."""
    params = record.params
    stops, room = stop_ids(params, config.eos_token_ids), config.max_context - len(prompt)
    tokens: list[int] = []
    logprobs: list[TokenLogprob] = []
    cache, feed, first = None, prompt, 0.0
    while len(tokens) < min(params.max_new_tokens, room):
        result = model(torch.tensor([feed]), past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache, row = result.past_key_values, result.logits[0, -1].log_softmax(-1)
        likeliest = row.topk(max(params.logprobs or 0, 1))
        top = list(zip(likeliest.indices.tolist(), likeliest.values.tolist()))
        token, logprob = top[0]
        first = first or time.monotonic() - began
        tokens.append(token)
        logprobs.append(TokenLogprob(token, logprob, 1, top[: params.logprobs]))
        if token in stops:
            break
        feed = [token]
    stopped = tokens[-1] in stops
    limit = None if stopped else "max_new_tokens" if len(tokens) == params.max_new_tokens else "context"
    return Output(
        id=record.id,
        index=0,
        text="",
        token_ids=tokens,
        finish_reason="stop" if stopped else "length",
        limit=limit,
        prompt_tokens=len(prompt),
        completion_tokens=len(tokens),
        ttft_s=first,
        latency_s=time.monotonic() - began,
        logprobs=None if params.logprobs is None else logprobs,
        meta=record.meta,
    )


if __name__ == "__main__":
    sys.exit(main())
