"""The mesh in words and sizes: its axes, from text and back. No JAX: presets and the converter read it."""

from collections.abc import Callable, Mapping, Sequence
from math import gcd

AXES = ("stage", "data", "tensor")
VOCAB_AXES = ("stage", "tensor")  # the axes over which everything vocabulary-wide is spread


class LayoutError(ValueError):
    """A mesh or a split that this model cannot have: the message gives the dimension, its value and what is legal."""


def parse_mesh(text: str) -> dict[str, int]:
    """Reads ``stage=2,tensor=4``; an axis that is left out is 1.

    Raises:
      LayoutError: an unknown or repeated axis, or a size that is not a positive integer.
    """
    sizes: dict[str, int] = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        name, _, value = item.partition("=")
        if name not in AXES:
            raise LayoutError(f"mesh: unknown axis {name!r} in {text!r}; the axes are {', '.join(AXES)}")
        if name in sizes:
            raise LayoutError(f"mesh: axis {name!r} is given twice in {text!r}")
        if not value.isdigit() or int(value) < 1:
            raise LayoutError(f"mesh: {name}={value!r} is not a positive whole number")
        sizes[name] = int(value)
    return {axis: sizes.get(axis, 1) for axis in AXES}


def choose_mesh(per_node: Sequence[int], fits: Callable[[int], bool], num_layers: int) -> dict[str, int]:
    """A mesh over all devices of nodes that have `per_node` of them: as much tensor parallelism as stays inside every
    node and `fits` allows, stages for the rest, data shards beyond one layer per stage."""
    inside, total = gcd(*per_node), sum(per_node)
    tensor = max(size for size in range(1, inside + 1) if inside % size == 0 and (size == 1 or fits(size)))
    rest = total // tensor
    stage = max(size for size in range(1, rest + 1) if rest % size == 0 and size <= num_layers)
    return {"stage": stage, "data": rest // stage, "tensor": tensor}


def mesh_text(sizes: Mapping[str, int]) -> str:
    return ",".join(f"{axis}={sizes[axis]}" for axis in AXES if sizes[axis] > 1)
