"""Prompts from a file: each line becomes a record or an error that says what is wrong with it."""

import codecs
import difflib
import json
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import Any

import attrs

from jaxinfer.engine.params import SamplingParams
from jaxinfer.engine.prompt import check_unicode, kind, shown, whole_numbers
from jaxinfer.json_text import parse
from jaxinfer.tokenizer import apply_chat, encode

KINDS = ("prompt", "prompt_token_ids", "messages")
FIELDS = ("id", *KINDS, "meta", *attrs.fields_dict(SamplingParams))

# UTF-32 first: one of its marks begins with one of UTF-16's
_OTHER_ENCODINGS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}

Prompt = str | list[int] | list[dict[str, Any]]


@dataclass(frozen=True)
class InputRecord:
    """One request: `value` is a text, token ids or chat messages, as `kind` says; `line` counts from 1; `meta` is the
    caller's own and comes out again, None for none."""

    line: int
    id: str
    kind: str
    value: Prompt
    params: SamplingParams
    meta: Any = None


@dataclass(frozen=True)
class InputError:
    """A line that cannot become a request."""

    line: int
    id: str
    message: str

    def to_json(self) -> dict[str, Any]:
        return {"id": self.id, "line": self.line, "error": self.message}


def read_file(path: str, defaults: SamplingParams) -> list[InputRecord | InputError]:
    """Reads ``.jsonl`` (an object per line), ``.txt`` (a prompt per line) or ``-``: standard input, JSON lines if it
    starts with ``{`` and a prompt per line otherwise. Empty lines are skipped.

    Raises:
      ValueError: a file name that ends in neither, another encoding than UTF-8; OSError: a file that cannot be read.
    """
    if path == "-":
        if sys.stdin is None:
            raise ValueError("--prompts -: standard input is closed")
        lines = split_lines(sys.stdin.buffer.read(), "standard input")
        as_json = next((line.lstrip() for line in lines if line.strip()), b"").startswith(b"{")
    else:
        suffix = Path(path).suffix
        if suffix not in (".jsonl", ".txt"):
            raise ValueError(f"{path}: the name ends in {suffix or 'nothing'!r}, legal is .jsonl, .txt or the name -")
        lines = split_lines(Path(path).read_bytes(), path)
        as_json = suffix == ".jsonl"
    return parse_lines(((number, line) for number, line in enumerate(lines, 1) if line.strip()), as_json, defaults)


def split_lines(data: bytes, name: str) -> list[bytes]:
    """Lines without byte order marks, which files put together have in their middle too.

    Raises:
      ValueError: a byte order mark of another encoding; `name` is the file's, for the message.
    """
    for mark, encoding in _OTHER_ENCODINGS.items():
        if data.startswith(mark):
            raise ValueError(f"{name}: found {encoding} (by its byte order mark), legal is UTF-8")
    return [line.removeprefix(codecs.BOM_UTF8) for line in data.split(b"\n")]


def parse_lines(
    lines: Iterable[tuple[int, bytes]], as_json: bool, defaults: SamplingParams
) -> list[InputRecord | InputError]:
    """Numbered lines to records. An id that is not given is the line's number; a second use of an id is an error."""
    seen: dict[str, int] = {}
    records: list[InputRecord | InputError] = []
    for number, line in lines:
        name = str(number)
        try:
            if b"\0" in line:
                raise ValueError("found a NUL byte, legal is UTF-8 text (UTF-16 without a byte order mark has them)")
            fields = _object(line) if as_json else {"prompt": line.decode().rstrip("\r")}
            name = record_id(fields, name)
            if name in seen:
                raise ValueError(f"id: {name!r} is used by line {seen[name]} already")
            records.append(parse_record(fields, number, name, defaults))
            seen[name] = number
        except UnicodeDecodeError as error:
            found = f"byte 0x{error.object[error.start]:02x} at byte {error.start + 1} of the line"
            records.append(InputError(number, name, f"not UTF-8: {found}"))
        except ValueError as error:
            records.append(InputError(number, name, str(error)))
    return records


def prompt_fields(prompt: Any) -> dict[str, Any]:
    """The fields of an input line for what a Python caller gives: a text, token ids, or the fields themselves.

    Raises:
      ValueError: none of those.
    """
    if isinstance(prompt, str):
        return {"prompt": prompt}
    if isinstance(prompt, Mapping):
        return dict(prompt)
    if isinstance(prompt, bytes) or not hasattr(prompt, "__iter__"):
        raise ValueError(f"found {shown(prompt)}, legal is a text, a list of token ids or a dict of {', '.join(KINDS)}")
    return {"prompt_token_ids": prompt}


def record_id(fields: dict[str, Any], default: str) -> str:
    """Raises ValueError where the id is neither a text nor a whole number."""
    name = fields.get("id")
    if name is None:
        return default
    if isinstance(name, bool) or not isinstance(name, str | Integral):
        raise ValueError(f"id: found {kind(name)}, legal is a string or a whole number")
    check_unicode("id", name)
    return str(name)


def parse_record(fields: dict[str, Any], line: int, name: str, defaults: SamplingParams) -> InputRecord:
    """One request from its fields, sampling fields over `defaults`. Every way in leads through here, `Engine.add` alone
    aside, which has no text.

    Raises:
      ValueError: an unknown field, no prompt or two, a prompt of the wrong form, an illegal sampling value.
    """
    for field in fields:
        if field not in FIELDS:
            near = difflib.get_close_matches(str(field), FIELDS, 1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ValueError(f"unknown field {shown(field)}; {hint}legal: {', '.join(FIELDS)}")
    kinds = [kind for kind in KINDS if fields.get(kind) is not None]
    if len(kinds) != 1:
        raise ValueError(f"found {' and '.join(kinds) or 'no prompt'}; legal is exactly one of {', '.join(KINDS)}")
    [given] = kinds
    value = _VALUES[given](given, fields[given])
    overrides = {field: value for field, value in fields.items() if field not in ("id", "meta", *KINDS)}
    meta = fields.get("meta")
    check_unicode("meta", meta)
    return InputRecord(line, name, given, value, defaults.merge(overrides), meta)


def token_ids(record: InputRecord, tokenizer: Any) -> list[int]:
    """The record's prompt as token ids; a text gets what the tokenizer puts before it (a BOS token, say).

    Raises:
      ValueError: text for a checkpoint without a tokenizer, or messages that its chat template cannot take.
    """
    if record.kind == "prompt_token_ids":
        return list(record.value)
    if tokenizer is None:
        raise ValueError(f"{record.kind}: the checkpoint has no tokenizer; legal is prompt_token_ids")
    return encode(tokenizer, record.value) if record.kind == "prompt" else apply_chat(tokenizer, record.value)


def _object(line: bytes) -> dict[str, Any]:
    try:
        fields = parse(line.decode())
    except json.JSONDecodeError as error:
        raise ValueError(f"bad JSON: {error.msg} at column {error.colno}") from None
    except UnicodeDecodeError:
        raise
    except ValueError as error:
        raise ValueError(f"bad JSON: {error}") from None
    if not isinstance(fields, dict):
        raise ValueError(f"found {kind(fields)}, legal is a JSON object")
    return fields


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name}: found {kind(value)}, legal is a string")
    check_unicode(name, value)
    return str(value)


def _messages(name: str, value: Any) -> list[Any]:
    if not isinstance(value, list | tuple):
        raise ValueError(f"{name}: found {kind(value)}, legal is a list of messages")
    check_unicode(name, value)
    return [dict(each) if isinstance(each, Mapping) else each for each in value]


_VALUES = {"prompt": _text, "prompt_token_ids": whole_numbers, "messages": _messages}
