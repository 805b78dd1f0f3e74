"""A study's folder: what was asked, the cells as they were asked for, and what is left of earlier study files."""

import importlib.metadata
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs

from jaxinfer import __version__
from jaxinfer.checkpoint.files import write_json, write_whole
from jaxinfer.study.command import OUTPUT, command, environment
from jaxinfer.study.expand import Cell
from jaxinfer.study.file import Study
from jaxinfer.study.identity import code, differences
from jaxinfer.study.place import Place
from jaxinfer.study.prompts import encoded
from jaxinfer.study.state import cells_there, now, read_json, read_state, write_state
from jaxinfer.telemetry.manifest import PACKAGES, git_commit

METRICS = "out.metrics.json"

Say = Callable[[str], None]


def verdict(cell: Cell, folder: Path) -> str:
    """Why what a command left is no measurement, after it ended well; "" if it is one."""
    if cell.reference:
        try:
            with open(folder / OUTPUT, "rb") as file:
                lines = sum(line.endswith(b"\n") for line in file)
        except OSError:
            lines = 0
        return "" if lines >= len(cell.lines) else f"{lines} of {len(cell.lines)} results are there"
    found = read_json(folder / METRICS)
    if not found:
        return f"{METRICS} is not there"
    if found.get("unfinished"):
        return f"{found['unfinished']} requests are unfinished"
    if found.get("failed"):
        return f"{found['failed']} samples ended with an error: {found.get('first_failure')}"
    return ""


def describe(cell: Cell, root: Path, place: Place) -> dict[str, Any]:
    """cell.json. A cell without seats has no command."""
    return {
        "experiment": cell.experiment,
        "kind": cell.kind,
        "model": cell.model.name,
        "cell": cell.name,
        "hash": cell.hash,
        "role": cell.role,
        "x": cell.x,
        "settings": cell.settings,
        "command": command(cell, root, place) if cell.seats else None,
        "environment": environment(cell, place) if cell.seats else {},
        "device_kind": cell.device_kind,
        "identity": cell.identity,
    }


def has_job(folder: Path) -> bool:
    """Whether its last attempt was submitted and its end was not seen."""
    words = read_json(folder / "cell.json").get("command") or []
    running = read_state(folder)["state"] == "running"
    return running and "--no-follow" in words and (folder / "submit.json").exists()


def is_done(cell: Cell, root: Path) -> bool:
    folder = root / cell.folder
    return read_state(folder)["state"] == "done" and not verdict(cell, folder)


def write_prompts(cells: list[Cell], root: Path) -> None:
    for name, cell in {cell.prompts: cell for cell in cells}.items():
        if not (root / name).exists():
            write_whole(root / name, encoded(cell.lines))


def write_study(study: Study, path: Path, cells: list[Cell], place: Place, root: Path) -> None:
    write_whole(root / "study.yaml", path.read_bytes())
    write_prompts(cells, root)
    models = {cell.model.name: cell.model for cell in cells}
    write_json(root / "lock.json", {
        "study": study.study,
        "file": str(path),
        "run": now(),
        "command": sys.argv,
        "versions": {"jaxinfer": __version__, "python": sys.version.split()[0], **_versions()},
        "commit": git_commit(Path(__file__).parent),
        "code": code(),
        "cluster": place.cluster,
        "device_kind": place.device_kind,
        "models": {name: attrs.asdict(each.declared) | {"identity": each.identity} for name, each in models.items()},
        "prompts": sorted({cell.prompts for cell in cells}),
        "cells": [cell.folder for cell in cells],
    })  # fmt: skip


def _versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in PACKAGES}


def prepare(cell: Cell, why: str, place: Place, root: Path) -> None:
    """Writes what the cell is; its state becomes waiting or skipped, but for one that failed and is tried again."""
    folder = root / cell.folder
    if has_job(folder):
        return
    state = read_state(folder)
    write_json(folder / "cell.json", describe(cell, root, place))
    if why:
        write_state(folder, state, state="skipped", why=why)
    elif state["state"] == "done":
        write_state(folder, state, state="waiting", why=f"it was measured, but {verdict(cell, folder)}")
    elif state["state"] in ("skipped", "running"):
        write_state(folder, state, state="waiting", why=None if state["state"] == "skipped" else "interrupted")
    elif not (folder / "state.json").exists():
        write_state(folder, state)


def mark_orphans(cells: list[Cell], root: Path, say: Say) -> None:
    """Says which cells of the folder are none of this study file's, and why; they stay, and say it themselves."""
    mine = {cell.folder: cell for cell in cells}
    for folder in cells_there(root):
        name, state = str(folder.relative_to(root)), read_state(folder)
        orphan = name not in mine
        if state.get("orphan", False) != orphan:
            write_state(folder, state, orphan=orphan)
        if orphan:
            told = read_json(folder / "cell.json")
            place = folder.parent.name, told.get("cell")
            near = next((each for each in cells if (each.experiment, each.name) == place), None)
            changed = differences(told.get("identity", {}), near.identity) if near else []
            what = f"changed: {', '.join(changed)}" if changed else "the study file has no such cell any more"
            say(f"{name}: an orphan, which stays ({what})")
