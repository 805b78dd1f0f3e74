"""The prompts of cells: a file's lines with their fields renamed, or token ids at random; as many as are asked for."""

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import xxhash

from jaxinfer.checkpoint.files import json_bytes
from jaxinfer.engine.params import SamplingParams
from jaxinfer.inputs import FIELDS, KINDS, parse_record, record_id, split_lines, token_ids
from jaxinfer.json_text import parse
from jaxinfer.study.errors import StudyError, shown, unknown
from jaxinfer.study.file import Prompts, RandomPrompts, beside

Line = dict[str, Any]
META = "meta"


def read_lines(prompts: Prompts) -> list[Line]:
    """Of a file, each with its id first and its fields renamed.

    Raises:
      StudyError: no such file, a line that generate would refuse, or a name to rename to that no field has.
    """
    path = beside(Path(prompts.file))
    for name, target in prompts.fields.items():
        if target not in (*FIELDS, META) and not target.startswith(f"{META}."):
            raise StudyError(f"prompts.fields.{name}: {unknown('field', target, [*FIELDS, 'meta.NAME'])}")
    if path.suffix not in (".jsonl", ".txt"):
        raise StudyError(f"prompts.file: {path}: ends in {path.suffix or 'nothing'!r}, legal is .jsonl or .txt")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise StudyError(f"prompts.file: {path}: {error.strerror}") from None
    lines, seen = [], {}
    for number, text in enumerate(split_lines(data, str(path)), 1):
        if not text.strip():
            continue
        try:
            fields = _renamed(_fields(text.decode(), path.suffix), prompts.fields)
            name = record_id(fields, str(number))
            if name in seen:
                raise StudyError(f"id: {name!r} is used by line {seen[name]} already")
            seen[name] = number
            lines.append({"id": name} | {key: value for key, value in fields.items() if key != "id"})
            check_line(lines[-1], SamplingParams(max_new_tokens=1 << 20))
        except UnicodeDecodeError:
            raise StudyError(f"{path}, line {number}: not UTF-8") from None
        except ValueError as error:
            hint = "; prompts.fields of the study renames fields" if "unknown field" in str(error) else ""
            raise StudyError(f"{path}, line {number}: {error}{hint}") from None
    if not lines:
        raise StudyError(f"prompts.file: {path}: there is no prompt in it")
    return lines


def _fields(text: str, suffix: str) -> dict[str, Any]:
    if suffix == ".txt":
        return {"prompt": text.rstrip("\r")}
    fields = parse(text)
    if not isinstance(fields, dict):
        raise StudyError(f"found {shown(fields)}, legal is a JSON object")
    return fields


def _renamed(fields: Mapping[str, Any], names: Mapping[str, str]) -> Line:
    line: Line = {}
    for name, value in fields.items():
        target = names.get(name, name)
        into, key = line, target
        if target.startswith(f"{META}."):
            into, key = line.setdefault(META, {}), target.removeprefix(f"{META}.")
        if key in into:
            raise StudyError(f"{name}: becomes {target}, which the line has already")
        into[key] = value
    return line


def check_line(line: Line, defaults: SamplingParams) -> SamplingParams:
    """`params_of` a line that nobody has looked at yet.

    Raises:
      ValueError: as generate would say it.
    """
    fields = {name: value for name, value in line.items() if name != META}
    return parse_record(fields, 0, str(line["id"]), defaults).params


def params_of(line: Line, defaults: SamplingParams) -> SamplingParams:
    """What the line's request will ask of sampling, with the cell's settings as defaults.

    Raises:
      ValueError: fields of both that contradict each other.
    """
    own = {name: value for name, value in line.items() if name not in ("id", META, *KINDS)}
    return defaults.merge(own) if own else defaults


def random_lines(asked: RandomPrompts, count: int, vocabulary: int) -> list[Line]:
    """The first `count` prompts of this seed: the same ones however many are asked for."""
    draw, ids = random.Random(asked.seed), range(vocabulary)
    return [
        {"id": str(number), "prompt_token_ids": draw.choices(ids, k=asked.tokens)} for number in range(1, count + 1)
    ]


def as_many(lines: list[Line], count: int) -> list[Line]:
    """The first `count` lines, from the start again where there are fewer; ids of a second round end in ``.2``."""
    taken, ids = [], {line["id"] for line in lines}
    for place in range(count):
        line, again = lines[place % len(lines)], place // len(lines)
        name = line["id"] if not again else f"{line['id']}.{again + 1}"
        while again and name in ids:
            name += "'"
        taken.append(line | {"id": name})
    return taken


def encoded(lines: list[Line]) -> bytes:
    return b"".join(map(json_bytes, lines))


def hashed(data: bytes) -> str:
    return xxhash.xxh3_64_hexdigest(data)


def token_counts(lines: list[Line], tokenizer: Any, known: dict[str, int]) -> list[int]:
    """Tokens of each prompt; those of a value that is in `known` are not counted again.

    Raises:
      StudyError: text for a model that has no tokenizer.
    """
    counts = []
    for line in lines:
        kind = next(each for each in KINDS if line.get(each) is not None)
        key = f"{kind} {line[kind]}"
        if key not in known:
            record = parse_record({kind: line[kind]}, 0, line["id"], SamplingParams())
            try:
                known[key] = len(token_ids(record, tokenizer))
            except ValueError as error:
                raise StudyError(f"prompt {line['id']!r}: {error}") from None
        counts.append(known[key])
    return counts
