"""What would do, where the layout that was asked for cannot be or does not fit. Each has itself been planned."""

from collections.abc import Iterable, Iterator

import attrs
import jax.numpy as jnp

from jaxinfer.engine.config import EngineConfig
from jaxinfer.engine.fit import MOST_DEVICES, MOST_TENSOR
from jaxinfer.plan.hardware import GPUS, Gpus
from jaxinfer.plan.layouts import Ask, Layout, consider, largest_batch, largest_context, meshes, rank

LARGER = ("T4", "V100-32", "A100-40", "A100-64", "A100-80", "H200")  # types by their memory
LEAST_CHUNK = 128
OPTIONS = "dtype", "batch", "context", "new_tokens", "prefill_chunk"


def advise(ask: Ask, gpus: Gpus, layouts: list[Layout]) -> list[str]:
    """Each by itself: another mesh of these GPUs, another number of them, a smaller batch, a shorter context, a smaller
    dtype, a larger GPU; where none of these would do, several together. `layouts`: those that were looked at, ranked;
    none of them fits."""
    if ask.dtype not in gpus.type.matmul:
        return _another_dtype(ask, gpus, layouts)
    found = []
    others = rank([consider(ask, gpus, sizes) for sizes in meshes(gpus.count)])
    if others[0].fits:
        found.append(f"--mesh {others[0].mesh} on these {gpus.count}: {others[0].speed}")
    least = _least(ask, gpus, but=gpus.count)
    if least is not None:
        found.append(f"{least.gpus}, --mesh {least.mesh}: {least.speed}")
    nearest = next((each for each in [*layouts, *others] if each.memory is not None), None)
    if nearest is not None and not others[0].fits:
        found += _less(ask, nearest)
    if not found:
        found += _together(ask, gpus)
    if gpus.count == 1:
        found += _larger(ask, gpus)
    return found


def _another_dtype(ask: Ask, gpus: Gpus, layouts: list[Layout]) -> list[str]:
    """In place of one that the GPU has not; and what would do besides."""
    now = attrs.evolve(ask, dtype=_small(gpus))
    layouts = _planned(now, layouts)
    if layouts[0].fits:
        return [f"{_changes(ask, now)} with --mesh {layouts[0].mesh}: {layouts[0].speed}"]
    return [f"{_changes(ask, now)} and {each}" for each in advise(now, gpus, layouts)]


def _least(ask: Ask, gpus: Gpus, but: int = 0) -> Layout | None:
    """The fewest GPUs of the type that do, without data parallelism: 1, 2, 4, ... of a node, or whole nodes."""
    node = gpus.node
    inside = {2**power for power in range(node.bit_length())}
    for count in sorted(inside | set(range(node, MOST_DEVICES + 1, node))):
        if count == but:
            continue
        tried = [sizes for sizes in meshes(count) if sizes["data"] == 1 and sizes["tensor"] <= MOST_TENSOR]
        best = rank([consider(ask, gpus.of(count), sizes) for sizes in tried])[0]
        if best.fits:
            return best
    return None


def _less(ask: Ask, layout: Layout) -> list[str]:
    """Of the workload, on this layout."""
    tried = [*_batches(ask, layout), *_contexts(ask, layout)]
    if jnp.dtype(ask.dtype).itemsize > 2:
        tried.append(attrs.evolve(ask, dtype=_small(layout.gpus)))
    planned = [(now, consider(now, layout.gpus, layout.sizes)) for now in tried]
    return [f"{_changes(ask, now)} with --mesh {each.mesh}: {each.speed}" for now, each in planned if each.fits]


def _batches(ask: Ask, layout: Layout) -> Iterator[Ask]:
    """The largest that fits; with small prefill ticks if it must be."""
    for now in (ask, _small_ticks(ask)):
        batch = largest_batch(now, layout)
        if batch:
            yield attrs.evolve(now, batch=batch)
            return


def _contexts(ask: Ask, layout: Layout) -> Iterator[Ask]:
    """The longest that fits with the batch, or where none was asked for or none would leave room for a prompt, the
    longest of one sequence."""
    one = attrs.evolve(_small_ticks(ask), batch=1)
    for now in (ask, _small_ticks(ask), one) if ask.batch else (one,):
        context = largest_context(now, layout)
        if ask.new_tokens < context < ask.context or (now is one and 0 < context < ask.context):
            yield _shorter(now, context)
            return


def _together(ask: Ask, gpus: Gpus) -> list[str]:
    """The longest context, halved and halved again, that some number of these GPUs holds with the least of all else;
    then as much of all else as they hold."""
    dtype = _small(gpus) if jnp.dtype(ask.dtype).itemsize > 2 else ask.dtype
    now, best = attrs.evolve(_small_ticks(ask), batch=1, dtype=dtype), None
    while best is None and now.context >= EngineConfig.page_size:
        best = _least(now, gpus)
        now = now if best else _shorter(now, now.context // 2)
    if best is None:
        return []
    for name in ("dtype", "batch", "prefill_chunk"):
        before = attrs.evolve(now, **{name: getattr(ask, name)})
        now = before if _planned(before, [best])[0].fits else now
    if ask.batch and now.batch != ask.batch:
        now = attrs.evolve(now, batch=largest_batch(now, best))
    best = _planned(now, [best])[0]
    return [f"{_changes(ask, now)} on {best.gpus}, --mesh {best.mesh}: {best.speed}"] if best.fits else []


def _larger(ask: Ask, gpus: Gpus) -> list[str]:
    for name in LARGER:
        if GPUS[name].memory > gpus.type.memory:
            one = consider(ask, Gpus(GPUS[name], 1, 1), {"stage": 1, "data": 1, "tensor": 1})
            if one.fits:
                return [f"one {name}: {one.speed}"]
    return []


def _planned(ask: Ask, layouts: Iterable[Layout]) -> list[Layout]:
    return rank([consider(ask, each.gpus, each.sizes) for each in layouts])


def _small(gpus: Gpus) -> str:
    return "bfloat16" if gpus.type.bfloat16 else "float16"


def _small_ticks(ask: Ask) -> Ask:
    return attrs.evolve(ask, prefill_chunk=min(LEAST_CHUNK, ask.prefill_chunk or LEAST_CHUNK))


def _shorter(ask: Ask, context: int) -> Ask:
    return attrs.evolve(ask, context=context, new_tokens=min(ask.new_tokens, context - 1))


def _changes(ask: Ask, now: Ask) -> str:
    """As options."""
    names = [name for name in OPTIONS if getattr(now, name) != getattr(ask, name)]
    return " ".join(f"--{name.replace('_', '-')} {getattr(now, name)}" for name in names)
