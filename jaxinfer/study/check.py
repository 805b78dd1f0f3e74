"""What a study would take: whether each cell can be, fits, and how long it will run. Nothing of it runs."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import attrs
from rich.console import Console
from rich.table import Table

from jaxinfer.engine.params import SamplingParams
from jaxinfer.study.errors import StudyError
from jaxinfer.study.expand import Cell
from jaxinfer.study.place import Place
from jaxinfer.study.prompts import params_of

WIDTH = 140  # where the output is a file
START_S = 120  # assumed of each cell: start, load and compile
DEFAULT_BATCH = 64  # sequences at once that are assumed where max_batch says nothing


@attrs.frozen
class Finding:
    """Of one cell. `why`: it cannot be, or does not fit; seconds of one pass over its requests, None where unknown."""

    cell: Cell
    why: str
    memory: int | None = None
    seconds: float | None = None

    @property
    def verdict(self) -> str:
        if self.why:
            return "refused" if self.cell.refused else "skipped"
        return "legal" if self.memory is None else "fits"

    @property
    def node_hours(self) -> float | None:
        if self.seconds is None or self.cell.seats is None:
            return None
        passes = self.cell.repeats + self.cell.profile
        return self.cell.seats.nodes * (START_S + passes * self.seconds) / 3600


def reasons(cells: list[Cell], place: Place) -> dict[str, str]:
    """Folder of each cell that does not fit to the reason."""
    return {each.cell.folder: each.why for each in find(cells, place, times=False) if each.why}


def find(cells: list[Cell], place: Place, times: bool = True) -> list[Finding]:
    """Asks `jaxinfer.plan`, once for each distinct question.

    Raises:
      StudyError: it does not answer.
    """
    asked = {cell.folder: _fit_question(cell, place) for cell in cells}
    fits = _ask([each for each in asked.values() if each])
    found = []
    for cell in cells:
        layout = fits.get(asked[cell.folder] or (), {})
        # a plan says of a batch too that it does not fit; the engine lets it wait
        why = cell.why or layout.get("error") or ("" if "predicted" in layout else layout.get("reason", ""))
        memory = layout.get("memory", {})
        found.append(Finding(cell, why, memory["weights"] + memory["workspace"] if memory else None))
    if not times:
        return found
    asked = {each.cell.folder: _time_question(each.cell, place) for each in found if not each.why}
    layouts = _ask([each for each in asked.values() if each])
    answers = {folder: layouts.get(question or (), {}) for folder, question in asked.items()}
    return [attrs.evolve(each, seconds=_seconds(each.cell, answers.get(each.cell.folder, {}))) for each in found]


Question = tuple[str, ...]


def _model(cell: Cell) -> list[str]:
    declared = cell.model.declared
    if declared.checkpoint and not cell.model.missing:
        return ["--model", declared.checkpoint]
    return ["--preset", declared.preset]


def _common(cell: Cell, place: Place) -> list[str] | None:
    if cell.seats is None or cell.reference or (gpus := place.gpus_asked(cell.seats)) is None:
        return None
    words = [*_model(cell), "--gpus", gpus, "--mesh", cell.mesh]
    for name in ("dtype", "memory_fraction", "prefill_chunk"):
        if name in cell.settings:
            words += [f"--{name.replace('_', '-')}", str(cell.settings[name])]
    return words


def _fit_question(cell: Cell, place: Place) -> Question | None:
    """Whether the engine would start: one context as long as it may get, and its batch."""
    words = None if cell.why else _common(cell, place)
    if words is None:
        return None
    if "max_context" in cell.settings:
        words += ["--context", str(min(cell.settings["max_context"], cell.model.config.max_context))]
    if "max_batch" in cell.settings:
        words += ["--batch", str(cell.settings["max_batch"] * cell.data_shards)]
    return tuple(words)


def _new_tokens(cell: Cell) -> list[int]:
    sampling = {name: value for name, value in cell.settings.items() if name in attrs.fields_dict(SamplingParams)}
    defaults = SamplingParams.from_dict(sampling)
    return [params.max_new_tokens * params.n for params in (params_of(line, defaults) for line in cell.lines)]


def _time_question(cell: Cell, place: Place) -> Question | None:
    words = _common(cell, place)
    if words is None or cell.counts is None:
        return None
    new = _new_tokens(cell)
    context = min(cell.model.config.max_context, max(map(sum, zip(cell.counts, new))))
    batch = min(len(cell.lines), cell.settings.get("max_batch", DEFAULT_BATCH) * cell.data_shards)
    words += ["--context", str(max(2, context)), "--batch", str(batch), "--new-tokens", str(max(1, max(new)))]
    return tuple(words)


def _seconds(cell: Cell, layout: dict[str, Any]) -> float | None:
    predicted = layout.get("predicted")
    return sum(_new_tokens(cell)) / predicted["tokens_per_s"] if predicted and predicted["tokens_per_s"] else None


def _ask(questions: Sequence[Question]) -> dict[Question, dict[str, Any]]:
    """Each answer is a layout, or {"error": text}."""
    distinct = list(dict.fromkeys(questions))
    if not distinct:
        return {}
    words = [sys.executable, "-m", "jaxinfer.study.plans"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}  # a plan needs no GPU, and must take none
    asked = json.dumps(distinct)
    done = subprocess.run(words, input=asked, capture_output=True, text=True, errors="replace", env=environment)
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise StudyError(f"jaxinfer.study.plans: {said[-1]}")
    return dict(zip(distinct, json.loads(done.stdout)))


def show(findings: list[Finding], place: Place) -> int:
    """Prints a line per cell and the totals; the exit status, 1 where the study asks for what no device could give."""
    out = Console(highlight=False, width=None if sys.stdout.isatty() else WIDTH)
    table = Table("experiment", "cell", "mesh", "nodes", "requests", "GiB", "seconds", "node-hours", "")
    for each in findings:
        cell, nodes = each.cell, each.cell.seats.nodes if each.cell.seats else None
        table.add_row(
            cell.experiment, cell.name, cell.mesh, _number(nodes), str(len(cell.lines)),
            _number(each.memory and each.memory / (1 << 30), 2), _number(each.seconds, 1), _number(each.node_hours, 2),
            each.verdict,
        )  # fmt: skip
    out.print(table)
    for each in findings:
        if each.why:
            out.print(f"{each.verdict}: {each.cell.label}: {each.why}", markup=False, soft_wrap=True)
    able = [each for each in findings if not each.why]
    hours = [each.node_hours for each in able]
    known = [each for each in hours if each is not None]
    text = f"{len(findings)} cells on {place}: {len(able)} to run, {len(findings) - len(able)} that cannot"
    if known:
        text += f"; about {sum(known):.2f} node-hours" + (f" of {len(known)} of them" if len(known) < len(able) else "")
    out.print(text, markup=False, soft_wrap=True)
    text = "memory and times are predicted for GPUs that jaxinfer.plan knows; here only what is legal is looked at"
    if any(each.memory for each in able):
        text = "GiB: weights and workspace of each GPU, the cache takes the rest. "
        if known:
            text += "seconds: one pass over the requests, predicted. node-hours: every repeat and profile pass, and "
            text += f"{START_S} s for start, load and compile."
        else:
            text += "Times need the tokens of the prompts, which the checkpoints' tokenizers count."
    out.print(text, soft_wrap=True)
    missing = {each.cell.model.name for each in findings if each.cell.model.missing}
    for name in sorted(missing):
        text = f"{name}: its checkpoint is not there yet; checked by its preset, tokens of texts not counted"
        out.print(text, markup=False, soft_wrap=True)
    return 1 if any(each.cell.refused for each in findings) else 0


def _number(value: float | int | None, digits: int = 0) -> str:
    return "–" if value is None else f"{value:,.{digits}f}"
