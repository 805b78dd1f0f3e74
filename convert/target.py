"""Which leaves of the checkpoint a tensor becomes, and how its numbers lie in it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from jaxinfer.models.leaves import Leaf

HEAD = "lm_head.weight"  # in every family, without a prefix

Pick = Callable[[np.ndarray], np.ndarray]


def everything(tensor: np.ndarray) -> np.ndarray:
    return tensor


@dataclass(frozen=True)
class Target:
    """A leaf that a tensor becomes, as a whole or in part: `pick` takes from the tensor, of shape `source_shape`, the
    leaf's numbers in the leaf's order."""

    leaf: str
    spec: Leaf
    source_shape: tuple[int, ...]
    pick: Pick = everything

    def take(self, tensor: np.ndarray) -> np.ndarray:
        """The leaf, from the whole tensor; a view where their orders are the same."""
        return self.pick(tensor).reshape(self.spec.shape)


# tensor name to its targets: several where a tensor is several leaves in one
Targets = dict[str, tuple[Target, ...]]


@dataclass(frozen=True)
class Names:
    """A family's tensor names.

    Attributes:
      prefix: of all names but the head's; files of the bare model leave it out.
      ends: leaf to name, outside the layers; without the prefix, like all that follow.
      layer: the layers' part of a name, ``{}`` for the number.
      leaves: of a layer, leaf to name, for tensors that are the leaf as it is.
      parts: of a layer, name to leaf to its `Pick`, with the tensor's shape: for all others.
      ignored: ends of names that follow from the config; older files have them.
    """

    prefix: str
    ends: Mapping[str, str]
    layer: str
    leaves: Mapping[str, str]
    parts: Mapping[str, tuple[tuple[int, ...], Mapping[str, Pick]]] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()

    def targets(self, table: Mapping[str, Leaf]) -> Targets:
        """For the leaves of a model, `families.leaves`."""
        parts = {leaf: (name, shape, pick) for name, (shape, of) in self.parts.items() for leaf, pick in of.items()}
        found: dict[str, list[Target]] = {}
        for leaf, spec in table.items():
            layer, _, short = leaf.rpartition(".")
            if leaf == "head":
                name, shape, pick = HEAD, merged(spec), everything
            elif layer and short in parts:
                name, shape, pick = parts[short]
            else:
                name, shape, pick = (self.leaves if layer else self.ends)[short], merged(spec), everything
            if layer:
                name = self.layer.format(layer.removeprefix("layers.")) + name
            name = name if leaf == "head" else self.prefix + name
            found.setdefault(name, []).append(Target(leaf, spec, shape, pick))
        return {name: tuple(each) for name, each in found.items()}


def merged(spec: Leaf) -> tuple[int, ...]:
    """The leaf's shape at Hugging Face, which does not tell heads from their width."""
    shape: list[int] = []
    for axis, size in zip(spec.axes, spec.shape):
        if axis == "head_dim" and shape:
            shape[-1] *= size
        else:
            shape.append(size)
    return tuple(shape)


def rows(*sizes: int) -> tuple[Pick, ...]:
    """Picks that cut a tensor along its first dimension into parts of these sizes."""
    ends = [sum(sizes[: index + 1]) for index in range(len(sizes))]
    return tuple(lambda tensor, end=end, size=size: tensor[end - size : end] for end, size in zip(ends, sizes))


def columns(*sizes: int) -> tuple[Pick, ...]:
    """Picks that cut a tensor of [in, out] along its last dimension into parts of these sizes, and turn each to
    [out, in]; a bias, of one dimension, stays as it is."""
    return tuple(lambda tensor, pick=pick: pick(tensor.T) for pick in rows(*sizes))
