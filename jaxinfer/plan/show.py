"""The plan on the screen: the answer first, then the tables that it stands on."""

import sys
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from jaxinfer.plan.layouts import Ask, Layout, tpot

GIB = 1 << 30
WIDTH = 140  # where the output is a file
SHOWN = 12


def console() -> Console:
    return Console(highlight=False, width=None if sys.stdout.isatty() else WIDTH)


def memory_table(out: Console, layout: Layout) -> None:
    """A line per stage: its GPUs all hold the same."""
    memory, sizes = layout.memory, layout.sizes
    table = Table("stage", "GPUs", "layers", "weights", "workspace", "cache", "together", "headroom", "limit, GiB")
    each = sizes["data"] * sizes["tensor"]
    parts = memory.weights, memory.workspace, memory.cache, memory.needed, memory.headroom
    limit = f"{memory.share:.0%} of {memory.limit / GIB:.1f}"
    first = 0
    for stage in range(sizes["stage"]):
        count = layout.fitted.decoder.stage_layers[stage] if layout.fitted else None
        layers = "" if count is None else f"{first}-{first + count - 1} ({count})"
        gpus = f"{stage * each}" if each == 1 else f"{stage * each}-{stage * each + each - 1}"
        table.add_row(str(stage), gpus, layers, *(f"{size / GIB:.2f}" for size in parts), limit)
        first += count or 0
    out.print(f"\nPer GPU, --mesh {layout.mesh}, GiB", markup=False)
    out.print(table)
    if layout.fitted:
        page, config = memory.page_size, layout.fitted.config
        notes = (
            f"{memory.pages:,} pages of {page} tokens in each of {sizes['data']} caches"
            if sizes["data"] > 1
            else (f"{memory.pages:,} pages of {page} tokens")
        )
        out.print(
            f"cache: {notes}; up to {config.max_batch} sequences decode at once per cache; prefill in ticks of "
            f"{config.prefill_chunk} tokens; kernels {layout.fitted.decoder.kernels}",
            soft_wrap=True,
        )
        out.print(f"layers: {balance_text(layout)}", soft_wrap=True)


def balance_text(layout: Layout) -> str:
    layers = layout.fitted.decoder.stage_layers
    if len(layers) == 1:
        return f"all {layers[0]} on one stage"
    idle = 1 - sum(layers) / (max(layers) * len(layers))
    text = ",".join(map(str, layers))
    wait = f"; the stages with fewer wait, {idle:.1%} of all stages' time" if idle else "; balanced"
    return f"{text}{wait} (embedding and head are spread over all stages)"


def layouts_table(out: Console, ask: Ask, layouts: list[Layout]) -> None:
    table = Table(
        "--mesh",
        "layers",
        "TPOT",
        "tokens/s",
        "first token",
        "holds",
        "headroom",
        "of a step: weights, cache, layers, links",
    )
    ranked = [each for each in layouts if each.prediction is not None]
    for layout in ranked[:SHOWN]:
        prediction, layers = layout.prediction, layout.fitted.decoder.stage_layers
        spread = f"{max(layers)}" if len(set(layers)) == 1 else f"{min(layers)}-{max(layers)}"
        parts = ", ".join(f"{part / prediction.tpot_s:.0%}" for part in prediction.parts.values())
        table.add_row(
            layout.mesh,
            spread,
            f"{prediction.tpot_s * 1e3:.3g} ms",
            f"{prediction.tokens_per_s:,.0f}",
            f"{prediction.first_s:.3g} s",
            f"{layout.holds:,}" + ("" if layout.fits else " (too few)"),
            f"{layout.memory.headroom / GIB:.1f} GiB",
            parts,
        )
    if ranked:
        out.print("\nLayouts, best throughput first (predicted)", markup=False)
        out.print(table)
        if len(ranked) > SHOWN:
            out.print(f"and {len(ranked) - SHOWN} more; --json has them")
        fit = [each for each in ranked if each.fits]
        if len(fit) > 1:
            out.print(best_text(ask, fit), soft_wrap=True, markup=False)
    refused = [each for each in layouts if each.prediction is None]
    if len(layouts) == 1:  # the answer has said why
        return
    if refused:
        out.print("\nCannot be")
    for layout in refused[:SHOWN]:
        out.print(f"  {layout.mesh}: {layout.reason}", soft_wrap=True, markup=False)
    if len(refused) > SHOWN:
        out.print(f"  and {len(refused) - SHOWN} more; --json has them")


def best_text(ask: Ask, fit: list[Layout]) -> str:
    """TPOT compared at one batch: that of the layout that takes the fewest sequences at once."""
    batch, most = min(each.work.batch for each in fit), fit[0]
    quick = min(fit, key=lambda each: tpot(ask, each, batch))
    few, many = (f" with {each:,} at once" if ask.batch is None else "" for each in (batch, most.work.batch))
    return f"lowest TPOT{few}: --mesh {quick.mesh}; most tokens/s{many}: --mesh {most.mesh}"


def lines(out: Console, *texts: Any) -> None:
    for text in texts:
        out.print(escape(str(text)), soft_wrap=True)
