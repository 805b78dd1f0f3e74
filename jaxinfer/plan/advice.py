"""What would do, where the layout that was asked for cannot be or does not fit."""

from jaxinfer.engine.fit import MOST_DEVICES, MOST_TENSOR, smaller
from jaxinfer.plan.hardware import GPUS, Gpus
from jaxinfer.plan.layouts import Ask, Layout, consider, largest_batch, largest_context, meshes, rank

LARGER = ("T4", "V100-32", "A100-40", "A100-64", "A100-80", "H200")  # types by their memory


def advise(ask: Ask, gpus: Gpus, layouts: list[Layout]) -> list[str]:
    """Each by itself: another mesh of these GPUs, another number of them, a smaller batch, a shorter context, a smaller
    dtype, a larger GPU. `layouts` are those that were looked at, ranked; none of them fits."""
    found = []
    others = rank([consider(ask, gpus, sizes) for sizes in meshes(gpus.count)])
    if others[0].fits:
        found.append(f"--mesh {others[0].mesh} on these {gpus.count}: {others[0].speed}")
    least = _least(ask, gpus)
    if least is not None:
        found.append(f"{least.gpus}, --mesh {least.mesh}: {least.speed}")
    nearest = next((each for each in [*layouts, *others] if each.memory is not None), None)
    if nearest is not None and not others[0].fits:
        found += _less(ask, nearest)
    if gpus.count == 1:
        found += _larger(ask, gpus)
    return found


def _least(ask: Ask, gpus: Gpus) -> Layout | None:
    """The fewest GPUs of the type that do, without data parallelism: 1, 2, 4, ... of a node, or whole nodes."""
    node = max(gpus.type.per_node, gpus.per_node if gpus.nodes > 1 else 1)
    inside = [2**power for power in range(node.bit_length()) if 2**power <= node]
    for count in [*inside, *range(2 * node, MOST_DEVICES + 1, node)]:
        if count == gpus.count:
            continue
        tried = [sizes for sizes in meshes(count) if sizes["data"] == 1 and sizes["tensor"] <= MOST_TENSOR]
        best = rank([consider(ask, gpus.of(count), sizes) for sizes in tried])[0]
        if best.fits:
            return best
    return None


def _less(ask: Ask, layout: Layout) -> list[str]:
    """Of the workload, on this layout."""
    found = []
    if layout.fitted is not None:  # it runs, but does not hold all sequences at once
        batch = largest_batch(ask, layout)
        context = largest_context(ask, layout)
        found += [f"--batch {batch}"] if batch else []
        found += [f"--context {context}"] if context > ask.new_tokens else []
        return [f"{each} with --mesh {layout.mesh}" for each in found]
    rest = layout.gpus.type, ask.context, layout.gpus.type.memory
    options = smaller(ask.model, ask.config(layout.sizes), layout.sizes, ask.dtype, *rest)
    return [f"generate with {each} --mesh {layout.mesh}" for each in options]


def _larger(ask: Ask, gpus: Gpus) -> list[str]:
    for name in LARGER:
        if GPUS[name].memory > gpus.type.memory:
            one = consider(ask, Gpus(GPUS[name], 1, 1), {"stage": 1, "data": 1, "tensor": 1})
            if one.fits:
                return [f"one {name}: {one.speed}"]
    return []
