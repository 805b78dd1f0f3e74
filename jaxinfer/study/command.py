"""A cell's command line, which anyone can paste: generate here, slurm.submit on a cluster."""

import os
import shlex
import sys
from pathlib import Path

from jaxinfer.study.expand import Cell
from jaxinfer.study.place import Place
from jaxinfer.study.settings import MEASURED, flags

OUTPUT = "out.jsonl"
PROFILE = "out.profile.json"


def python() -> str:
    """This interpreter, by a path from the working directory where it lies below it."""
    try:
        return str(Path(sys.executable).relative_to(Path.cwd()))
    except ValueError:
        return sys.executable


def command(cell: Cell, root: Path, place: Place) -> list[str]:
    """`root` is the study's folder."""
    if place.cluster is not None:
        root = root.absolute()  # a job has a working directory of its own
    folder, prompts = root / cell.folder, str(root / cell.prompts)
    declared = cell.model.declared
    if cell.reference:
        words = [python(), "-m", "jaxinfer.study.reference", "--source", declared.source, "--prompts", prompts]
        asked = {name: cell.settings[name] for name in ("max_new_tokens", "logprobs") if name in cell.settings}
        return [*words, "--output", str(folder / OUTPUT), *flags(asked)]
    what = ["--model", declared.checkpoint] if declared.checkpoint else []
    what += ["--preset", declared.preset] if declared.preset else []
    what += ["--random-weights"] if declared.random_weights else []
    what += ["--prompts", prompts]
    options = _options(cell, root)
    seats = cell.seats
    if place.cluster is None:
        words = [python(), "-m", "jaxinfer.generate", *what, "--output", str(folder / OUTPUT), "--mesh", cell.mesh]
        return [*words, *([] if place.gpus else ["--cpu-devices", str(seats.per_node)]), *options]
    words = [python(), "-m", "slurm.submit", "--cluster", place.cluster, *what, "--output-dir", str(folder)]
    words += ["--mesh", cell.mesh, "--nodes", str(seats.nodes)]
    if place.per_node:
        words += ["--gpus-per-node", str(seats.per_node)]
    elif seats.per_node > 1:
        options = ["--cpu-devices", str(seats.per_node), *options]
    return [*words, "--inside" if place.inside else "--no-follow", "--", *options]


def _options(cell: Cell, root: Path) -> list[str]:
    """Of generate, where nothing depends on where it runs."""
    settings = dict(cell.settings)
    if cell.after is not None:
        settings["stage_layers"] = f"{MEASURED}:{root / cell.after.folder / PROFILE}"
    words = flags(settings)
    if cell.warm_up:
        words += ["--warm-up", "--repeats", str(cell.repeats)]
    return words + (["--profile", str(root / cell.folder / "traces")] if cell.profile else [])


def environment(cell: Cell, place: Place) -> dict[str, str]:
    """What is set for the command: a mesh of fewer GPUs than there are leaves the others alone, memory and all."""
    if cell.reference or not place.gpus or cell.seats.per_node == len(place.gpus):
        return {}
    return {"CUDA_VISIBLE_DEVICES": ",".join(place.gpus[: cell.seats.per_node])}


def script(words: list[str], variables: dict[str, str]) -> str:
    """As a file to paste from or to run, from the folder that its paths are relative to."""
    return f"#!/bin/sh\ncd {shlex.quote(os.getcwd())} &&\n{line(words, variables)}\n"


def line(words: list[str], variables: dict[str, str]) -> str:
    return " ".join([f"{name}={shlex.quote(value)}" for name, value in variables.items()] + [shlex.join(words)])
