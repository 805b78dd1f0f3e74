"""Throughput, latency and memory over the batch, with the knee."""

from collections.abc import Sequence
from typing import Any

from jaxinfer import style
from jaxinfer.study import compare
from jaxinfer.study.columns import GIB
from jaxinfer.study.results import Cell, Spread, by_model

MEMORY = {"device_memory_bytes": "device", "nvml_memory_bytes": "GPU (NVML)", "host_memory_bytes": "host"}
KNEE = {"marker": "o", "markersize": 9, "markerfacecolor": "none", "color": style.BLACK, "linestyle": "",
        "markeredgewidth": 0.8}  # fmt: skip


def batch(cells: Sequence[Cell]) -> tuple[Any, str]:
    """The figure and its caption; no figure where fewer than two batches were measured."""
    models = {model: [row for row in compare.batch(own)[0] if row.get("output_tokens_per_s") and row["batch"]]
              for model, own in by_model(cells).items()}  # fmt: skip
    models = {model: rows for model, rows in models.items() if rows}
    batches = sorted({row["batch"] for rows in models.values() for row in rows})
    memory = next((name for name in MEMORY if any(row.get(name) for rows in models.values() for row in rows)), None)
    text = "Throughput, median latency of a request and peak memory over the batch."
    if len(batches) < 2:
        return None, text
    panels = 2 + (memory is not None)
    figure, axes = style.canvas(style.COLUMN, 1.45 * panels, panels, 1, sharex=True)
    handles = {}
    for place, (model, rows) in enumerate(models.items()):
        handles[model] = style.points(axes[0], *_pairs(rows, "output_tokens_per_s"), place)
        style.points(axes[1], *_pairs(rows, "latency_s"), place)
        if memory is not None:
            style.points(axes[2], *_pairs(rows, memory, 1 / GIB), place)
        for row in (row for row in rows if row.get("knee")):
            for panel, name in zip(axes, ("output_tokens_per_s", "latency_s")):
                handles["knee"] = panel.plot(row["batch"], row[name].median, **KNEE)[0]
    if "knee" in handles:
        handles["knee"] = handles.pop("knee")  # last
    axes[0].set(ylabel="tokens/s", ylim=(0, None))
    axes[1].set(ylabel="latency in s", ylim=(0, None))
    if memory is not None:
        axes[2].set(ylabel=f"{MEMORY[memory]} memory\nin GiB", ylim=(0, None))
        text += f" Memory: {MEMORY[memory]}, peak."
    style.counts(axes[-1].xaxis, batches)
    axes[-1].set(xlabel="requests at once, b")
    style.legend(figure, list(handles.values()), list(handles))
    return figure, text + " Knee: greatest throughput per latency (Kleinrock, 1979)." * ("knee" in handles)


def _pairs(rows: Sequence[dict[str, Any]], name: str, factor: float = 1.0) -> tuple[list[int], list[Spread]]:
    known = [(row["batch"], row[name]) for row in rows if row.get(name)]
    spreads = [value if isinstance(value, Spread) else Spread(value) for _, value in known]
    return [count for count, _ in known], [each.times(factor) for each in spreads]
