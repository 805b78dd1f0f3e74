"""From a parameter's logical axes to the bytes that each device holds.

A parameter is declared once, as the checkpoint's leaves that it is made of (shape and logical axes). What a device
holds follows from that and from one table, `Rules`: the slice of every leaf, the local array, the sharding."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from math import ceil, prod
from typing import TYPE_CHECKING, Protocol

from jaxinfer.parallel.axes import LayoutError

if TYPE_CHECKING:
    from jax.sharding import PartitionSpec

MeshSizes = Mapping[str, int]
SHOWN = 256  # ways; an MLP's width divides by many more


class Heads(Protocol):
    num_heads: int
    num_kv_heads: int
    mlp_width: int


class Leaf(Protocol):
    shape: tuple[int, ...]
    axes: tuple[str | None, ...]


@dataclass(frozen=True)
class Rules:
    """Logical axis to mesh axes. Layers go to ``stage`` by slot, so no logical axis but the vocabulary names it."""

    vocab: tuple[str, ...] = ("stage", "tensor")
    embed: tuple[str, ...] = ()
    heads: tuple[str, ...] = ("tensor",)
    kv_heads: tuple[str, ...] = ("tensor",)
    head_dim: tuple[str, ...] = ()
    mlp: tuple[str, ...] = ("tensor",)

    def mesh_axes(self, axis: str | None) -> tuple[str, ...]:
        return getattr(self, axis) if axis else ()


@dataclass(frozen=True)
class Parameter:
    """One runtime array: `leaves` flattened to [out, in] (the last `in_dims` dimensions are in) and joined along out.

    `layers` is None for an array outside the layers, else per stage the layer number or None for an empty slot; such
    an array has a leading stage dimension. Leaf names then hold ``{}`` for the layer number."""

    name: str
    leaves: tuple[tuple[str, Leaf], ...]
    in_dims: int
    layers: tuple[int | None, ...] | None = None


def ways(axis: str | None, rules: Rules, sizes: MeshSizes) -> int:
    return prod(sizes[mesh_axis] for mesh_axis in rules.mesh_axes(axis))


def rank_along(axis: str | None, rules: Rules, sizes: MeshSizes, coords: MeshSizes) -> int:
    rank = 0
    for mesh_axis in rules.mesh_axes(axis):
        rank = rank * sizes[mesh_axis] + coords[mesh_axis]
    return rank


def local_size(axis: str | None, size: int, rules: Rules, sizes: MeshSizes) -> int:
    """Length of one device's piece: KV heads are at least one (replicated), the vocabulary is padded up."""
    return ceil(size / ways(axis, rules, sizes))


def local_slice(axis: str | None, size: int, rules: Rules, sizes: MeshSizes, coords: MeshSizes) -> slice:
    """What one device holds of a dimension; shorter than `local_size`, or empty, where the vocabulary's padding is."""
    count, rank = ways(axis, rules, sizes), rank_along(axis, rules, sizes, coords)
    length = local_size(axis, size, rules, sizes)
    if axis == "kv_heads" and count > size:
        rank = rank * size // count
    return slice(min(rank * length, size), min((rank + 1) * length, size))


def local_shape(parameter: Parameter, rules: Rules, sizes: MeshSizes) -> tuple[int, ...]:
    """Shape on one device, without the stage dimension: (rows, columns), or (rows,) where in_dims is 0."""
    rows, columns = 0, 1
    for _, leaf in parameter.leaves:
        local = [local_size(axis, size, rules, sizes) for axis, size in zip(leaf.axes, leaf.shape)]
        split = len(local) - parameter.in_dims
        rows, columns = rows + prod(local[:split]), prod(local[split:])
    return (rows, columns) if parameter.in_dims else (rows,)


def partition_spec(parameter: Parameter, rules: Rules) -> "PartitionSpec":
    from jax.sharding import PartitionSpec  # whether a mesh is legal is asked where JAX must not start

    _, leaf = parameter.leaves[0]
    cut = [rules.mesh_axes(axis) for axis in leaf.axes]
    split = len(cut) - parameter.in_dims
    rows, columns = sum(cut[:split], ()), sum(cut[split:], ())
    dims = (rows, columns) if parameter.in_dims else (rows,)
    stage = ("stage",) if parameter.layers is not None else ()
    used = [mesh_axis for dim in (stage, *dims) for mesh_axis in dim]
    if len(used) != len(set(used)):
        raise LayoutError(f"{parameter.name}: the rules use a mesh axis twice: {used}")
    spec = [dim or None for dim in dims]
    return PartitionSpec("stage", *spec) if stage else PartitionSpec(*spec)


def global_shape(parameter: Parameter, rules: Rules, sizes: MeshSizes) -> tuple[int, ...]:
    local, spec = local_shape(parameter, rules, sizes), partition_spec(parameter, rules)
    if parameter.layers is not None:
        local = (1, *local)
    cut = [prod(sizes[axis] for axis in ([dim] if isinstance(dim, str) else dim or ())) for dim in spec]
    return tuple(size * n for size, n in zip(local, cut, strict=True))


def check_layout(dimensions: Mapping[str, int], rules: Rules, sizes: MeshSizes) -> None:
    """Refuses a mesh that cannot cut the model. `dimensions`: logical axis to its size (heads, kv_heads, mlp).

    Raises:
      LayoutError: names every dimension that does not divide, its size and the legal sizes of the mesh axis.
    """
    known = {field.name for field in fields(rules)}
    wrong = []
    for axis, size in dimensions.items():
        assert axis in known, axis
        count = ways(axis, rules, sizes)
        names = "*".join(rules.mesh_axes(axis))
        legal = [n for n in range(1, min(size, SHOWN) + 1) if size % n == 0]
        if axis == "kv_heads" and count > size and count % size == 0:
            continue  # more ranks than KV heads: each head is held by several
        if size % count:
            more = f" or a multiple of {size}" if axis == "kv_heads" else ""
            wrong.append(
                f"{axis}={size} cannot be cut {count} ways ({names}); legal: {', '.join(map(str, legal))}{more}"
            )
    if wrong:
        raise LayoutError("; ".join(wrong))


def check_model(model: Heads, sizes: MeshSizes) -> None:
    """Raises:
    LayoutError: a mesh that cannot cut the model, with every dimension that does not divide.
    """
    check_layout({"heads": model.num_heads, "kv_heads": model.num_kv_heads, "mlp": model.mlp_width}, Rules(), sizes)
