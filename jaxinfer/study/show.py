"""How far a study is, as a table."""

import sys
from collections import Counter
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from jaxinfer.study.errors import StudyError
from jaxinfer.study.state import cells_there, holder, read_json, read_state

WIDTH = 140  # where the output is a file


def status(root: Path) -> int:
    """Prints every cell's state and whether a study is running. Raises StudyError: no study there."""
    lock = read_json(root / "lock.json")
    if not lock:
        raise StudyError(f"{root}: no study (lock.json is missing)")
    order = {name: place for place, name in enumerate(lock.get("cells", []))}
    folders = sorted(cells_there(root), key=lambda path: (order.get(str(path.relative_to(root)), len(order)), path))
    who, counts = holder(root), Counter()
    table = Table("experiment", "cell", "state", "results", "took", "attempts", "")
    for folder in folders:
        told, state = read_json(folder / "cell.json"), read_state(folder)
        name = state["state"]
        if name == "running" and not who and state["job"] is None:
            name = "interrupted"
        counts["orphan" if state.get("orphan") else name] += 1
        why = state["why"] or (f"job {state['job']}" if state["job"] and name == "running" else "")
        row = told.get("experiment", folder.parent.name), told.get("cell", folder.name), name, _results(folder, told)
        why = f"orphan: this study file has it no more. {why}" if state.get("orphan") else why
        table.add_row(*map(Text, (*row, _took(state, name), str(state["attempts"]), why)))
    out = Console(highlight=False, width=None if sys.stdout.isatty() else WIDTH)
    out.print(table)
    total = sum(count for name, count in counts.items() if name != "orphan")
    out.print(f"{lock.get('study')}: {total} cells: {', '.join(f'{count} {name}' for name, count in counts.items())}")
    if who:
        out.print(f"process {who['pid']} on {who['host']} runs it, since {who['began']}", markup=False)
    return 0


def _results(folder: Path, told: dict[str, Any]) -> str:
    try:
        with open(folder / "out.jsonl", "rb") as file:
            lines = sum(line.endswith(b"\n") for line in file)
        return f"{lines}/{told.get('x', {}).get('requests', '?')}"
    except OSError:
        return "–"


def _took(state: dict[str, Any], name: str) -> str:
    try:
        began = datetime.strptime(state["began"], "%Y-%m-%dT%H:%M:%S%z")
        ended = (
            datetime.strptime(state["ended"], "%Y-%m-%dT%H:%M:%S%z") if state["ended"] else datetime.now(began.tzinfo)
        )
    except (TypeError, ValueError):
        return "–"
    return f"{(ended - began).total_seconds():.0f} s" if name in ("done", "failed", "running") else "–"
