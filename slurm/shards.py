"""``python -m slurm.shards``: a file of prompts in shards for a job array, and their results put together again.

Line i, from 0, is in shard i modulo the number of shards. In a shard the lines of the others are empty, so that a line
keeps its number, which is its id where it has none, and an error names the line of the whole file.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from jaxinfer.checkpoint.files import write_whole
from jaxinfer.engine.params import SamplingParams
from jaxinfer.inputs import InputRecord, read_file, split_lines
from jaxinfer.outputs import OutputError, beside
from jaxinfer.screen import escape_unencodable


class ShardError(ValueError):
    """Parts that are not the whole, or more than it; the message names the id."""


def split(prompts: Path, shard: int, count: int, output: Path) -> None:
    """Writes shard `shard` (from 0) of `count`."""
    if count < 1 or not 0 <= shard < count:
        raise ShardError(f"shard: found {shard} of {count}, legal is 0 to {count - 1}")
    lines = split_lines(prompts.read_bytes(), str(prompts))
    write_whole(output, b"\n".join(line if i % count == shard else b"" for i, line in enumerate(lines)))


def expected(prompts: Path, samples: int = 1) -> list[tuple[str, int]]:
    """Each request's id and how many results it has, in the order of the file; `samples` where a line does not say."""
    records = read_file(str(prompts), SamplingParams(n=samples))
    return [(record.id, record.params.n if isinstance(record, InputRecord) else 1) for record in records]


def merge(prompts: Path, parts: list[Path], output: Path) -> int:
    """Writes the results of all parts in the order of the prompts; returns their number.

    Raises:
      ShardError: a result that is there twice, one that is missing, or one that no prompt asks for.
    """
    found = _read_parts(parts)
    lines: list[bytes] = []
    for name, samples in expected(prompts, _samples(parts)):
        results = found.pop(name, {})
        missing = [index for index in range(samples) if index not in results]
        if missing and None not in results:
            raise ShardError(f"id {name!r}: result {missing[0]} of {samples} is in none of the {len(parts)} parts; "
                             "submit its shard again, the same line does the rest")  # fmt: skip
        lines += [results[index] for index in sorted(results, key=lambda index: -1 if index is None else index)]
    if found:
        raise ShardError(f"id {min(found)!r}: in the parts but not in {prompts}")
    write_whole(output, b"".join(lines))
    return len(lines)


def unfinished(prompts: Path, parts: list[Path]) -> list[int]:
    """The shards of which a result is missing; the results of shard k are in ``parts[k]``, which need not be there.

    Raises:
      ShardError: a part that has other lines than results.
    """
    found = [_read_parts([part] if part.exists() else []) for part in parts]
    missing = set()
    for record in read_file(str(prompts), SamplingParams(n=_samples(parts))):
        shard = (record.line - 1) % len(parts)
        results = found[shard].get(record.id, {})
        if None not in results and len(results) < (record.params.n if isinstance(record, InputRecord) else 1):
            missing.add(shard)
    return sorted(missing)


def _read_parts(parts: Iterable[Path]) -> dict[str, dict[int | None, bytes]]:
    """Lines by id and index; an error record has the index None."""
    found: dict[str, dict[int | None, bytes]] = {}
    where: dict[tuple[str, Any], str] = {}
    for part in parts:
        for number, line in enumerate(part.read_bytes().splitlines(keepends=True), 1):
            if not line.endswith(b"\n"):
                break  # what killed the run cut it off; the next run drops it
            place = f"{part}, line {number}"
            try:
                data = json.loads(line)
                name, index = data["id"], data.get("index")
                if not isinstance(name, str) or not isinstance(index, int | None):
                    raise ValueError
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                raise ShardError(f"{place}: not a result") from None
            if (name, index) in where:
                raise ShardError(f"{place}: id {name!r}, result {index} is in {where[name, index]} already")
            where[name, index] = place
            found.setdefault(name, {})[index] = line
    return found


def _samples(parts: list[Path]) -> int:
    """Results per prompt that does not say, from the settings that the parts were made with."""
    for part in parts:
        try:
            return json.loads(beside(part, "run").read_bytes())["settings"]["n"]
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return 1


def main() -> int:
    escape_unencodable()
    parser = argparse.ArgumentParser(
        prog="python -m slurm.shards", description=__doc__.split("\n")[0].split(": ", 1)[1]
    )
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("split", help="write one shard of a file of prompts")
    one.add_argument("prompts", type=Path, metavar="PROMPTS", help=".jsonl or .txt")
    one.add_argument("--shard", type=int, required=True, metavar="K", help="from 0")
    one.add_argument("--of", type=int, required=True, metavar="N", help="number of shards")
    one.add_argument("--output", type=Path, required=True, metavar="FILE")
    all_ = commands.add_parser("merge", help="put the results of all shards together, in the order of the prompts")
    all_.add_argument("prompts", type=Path, metavar="PROMPTS", help="the file that was cut")
    all_.add_argument("parts", type=Path, nargs="+", metavar="PART.jsonl")
    all_.add_argument("--output", type=Path, required=True, metavar="OUT.jsonl")
    args = parser.parse_args()
    try:
        if args.command == "split":
            split(args.prompts, args.shard, args.of, args.output)
        else:
            print(f"{args.output}: {merge(args.prompts, args.parts, args.output):,} results")
    except (ValueError, OutputError) as error:
        print(f"slurm.shards: error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"slurm.shards: error: {error.filename}: {os.strerror(error.errno)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
