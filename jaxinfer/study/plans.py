"""``python -m jaxinfer.study.plans``: questions to `jaxinfer.plan`, in a process of their own: a plan needs
JAX, which the study's process does without, and whose import takes longer than the answers.

Standard input has a JSON list of lists, each the words of a command line of jaxinfer.plan; standard output gets a list
of layouts as in its --json, or {"error": text}.
"""

import json
import sys
from functools import cache
from pathlib import Path
from typing import Any

from jaxinfer.parallel.axes import parse_mesh
from jaxinfer.plan.__main__ import parse_arguments, question, to_json
from jaxinfer.plan.layouts import consider
from jaxinfer.plan.source import Source, read_source


@cache
def _source(preset: str | None, model: Path | None) -> Source:
    return read_source(preset, model, None)


def answer(words: list[str]) -> dict[str, Any]:
    args = parse_arguments(words)
    try:
        source = _source(args.preset, args.model)
        ask, _ = question(args, source, args.gpus.type.bfloat16)
        return to_json(consider(ask, args.gpus, parse_mesh(args.mesh)))
    except (ValueError, OSError) as error:
        return {"error": " ".join(str(error).split())}


if __name__ == "__main__":
    json.dump([answer(words) for words in json.load(sys.stdin)], sys.stdout)
