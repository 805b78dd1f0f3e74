"""The correctness experiment's rows: each cell's tokens against its model's baseline."""

from collections.abc import Sequence
from typing import Any

from jaxinfer.study.columns import values
from jaxinfer.study.correctness import compare, near_tie_nats, read_lines
from jaxinfer.study.results import Cell

BASELINE = "baseline"


def correctness(cells: Sequence[Cell]) -> tuple[list[dict[str, Any]], list[str], list[dict[str, Any]]]:
    """Rows, notes, and every divergence as a row of its own."""
    rows, divergences = [values(cell) for cell in cells], []
    base = next((cell for cell in cells if cell.role == BASELINE), None)
    if base is None or base.state != "done":
        why = "no cell of the baseline" if base is None else f"the baseline ({base.against or base.mesh}): {base.note}"
        return rows, [why], []
    for cell, row in zip(cells, rows):
        if cell.state != "done":
            continue
        if cell is base:
            row["note"] = "; ".join(filter(None, ["baseline", row["note"]]))
            continue
        try:
            found = compare(
                read_lines(base.folder / "out.jsonl"),
                read_lines(cell.folder / "out.jsonl"),
                near_tie_nats(_dtype(base), _dtype(cell)),
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            said = f"{type(error).__name__}: {error}" if isinstance(error, KeyError | TypeError) else error
            row["note"] = "; ".join(filter(None, [row["note"], f"not compared: {said}"]))
            continue
        row |= {name: found[name] for name in ("requests", "exact", "near_ties", "errors", "near_tie_nats")}
        row |= {"missing": len(found["missing"]), "drift_nats": found["drift_nats"]}
        row["agreement_percent"] = found["agreeing"] / found["tokens"] * 100 if found["tokens"] else None
        divergences += [{"model": cell.model, "mesh": cell.mesh} | each for each in found["divergences"]]
    return rows, [f"baseline: {base.against or base.mesh}, {_dtype(base)}"], divergences


def _dtype(cell: Cell) -> str:
    """What the run says that it computed in; another library's reference computes in float32."""
    if cell.against:
        return "float32"
    settings = (cell.run or {}).get("settings")
    found = settings.get("dtype") if isinstance(settings, dict) else None
    return str(found or cell.settings.get("dtype") or "float32")
