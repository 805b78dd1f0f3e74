"""From a checkpoint onto a mesh: each process reads the slices that its own devices hold."""

import gc
import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from jaxinfer.checkpoint.files import MEND, CheckpointError, DamagedError
from jaxinfer.checkpoint.fill import Piece, fill
from jaxinfer.checkpoint.manifest import NAME
from jaxinfer.checkpoint.reader import Reader
from jaxinfer.parallel.axes import AXES
from jaxinfer.parallel.mesh import mesh_sizes
from jaxinfer.parallel.placement import (
    MeshSizes,
    Parameter,
    Rules,
    global_shape,
    local_shape,
    local_slice,
    partition_spec,
)


def default_threads() -> int:
    """The cores that this process may use, at most 8."""
    return min(8, len(os.sched_getaffinity(0)))


def local_piece(
    parameter: Parameter, rules: Rules, sizes: MeshSizes, coords: MeshSizes, dtype: Any, owner: Any = None
) -> Piece:
    """What one device holds, without the stage dimension; of no leaf where its slot is empty."""
    layer = None if parameter.layers is None else parameter.layers[coords["stage"]]
    leaves = parameter.leaves if parameter.layers is None or layer is not None else ()
    cut = tuple(
        (name.format(layer), tuple(local_slice(*axis, rules, sizes, coords) for axis in zip(leaf.axes, leaf.shape)))
        for name, leaf in leaves
    )
    return Piece(local_shape(parameter, rules, sizes), np.dtype(dtype), parameter.in_dims, cut, owner)


def local_pieces(parameters: Any, mesh: Mesh, rules: Rules, dtype: Any) -> list[Piece]:
    """What this process's devices hold of each parameter; the owner is (number of the parameter, devices)."""
    sizes = mesh_sizes(mesh)
    coords_of = {device: dict(zip(AXES, where)) for where, device in np.ndenumerate(mesh.devices)}
    pieces = []
    for number, parameter in enumerate(_flat(parameters)[0]):
        sharding, shape = NamedSharding(mesh, partition_spec(parameter, rules)), global_shape(parameter, rules, sizes)
        holders: dict[str, list[jax.Device]] = {}
        for device, index in sharding.addressable_devices_indices_map(shape).items():
            holders.setdefault(str(index), []).append(device)
        for devices in holders.values():
            coords = coords_of[devices[0]]
            pieces.append(local_piece(parameter, rules, sizes, coords, dtype, (number, devices)))
    return pieces


def load(
    reader: Reader,
    parameters: Any,
    mesh: Mesh,
    rules: Rules,
    dtype: Any,
    threads: int = 1,
    loading: Callable[[int, int], None] = lambda done, total: None,
) -> Any:
    """The tree of `parameters` as arrays on the mesh, read by `threads` (of this process: others have their own).

    Devices of this process that hold the same piece (data replicas) share it, and no chunk file is read twice. The
    bound on host memory, what `loading` is told and the errors are those of `fill`; beyond the bound, the CPU backend
    keeps the host's arrays as its own, without a copy.

    Raises:
      CheckpointError: beside those of `fill`, a checkpoint that was made without weights, or whose leaves are not those
        of its model.
    """
    if not reader.manifest.leaves:
        raise CheckpointError(f"{reader.folder}: holds no weights; legal: --random-weights (load_format dummy)")
    sizes = mesh_sizes(mesh)
    declared, tree = _flat(parameters)
    _check_leaves(reader, declared)
    placed: list[list[jax.Array]] = [[] for _ in declared]

    def place(piece: Piece, array: np.ndarray) -> None:
        number, devices = piece.owner
        array = array if declared[number].layers is None else array[None]
        arrays = [jax.device_put(array, device) for device in devices]
        # the transfer must be over before the host array is dropped, or arrays would pile up
        placed[number] += jax.block_until_ready(arrays)
        gc.collect(0)  # JAX drops host arrays that it has copied at its next call or here

    fill(reader, local_pieces(parameters, mesh, rules, dtype), place, threads, loading)
    shapes = [global_shape(parameter, rules, sizes) for parameter in declared]
    shardings = [NamedSharding(mesh, partition_spec(parameter, rules)) for parameter in declared]
    arrays = map(jax.make_array_from_single_device_arrays, shapes, shardings, placed)
    return jax.tree.unflatten(tree, arrays)


def _check_leaves(reader: Reader, declared: list[Parameter]) -> None:
    """The manifest's leaves are those of the model in it."""
    known = reader.manifest.leaves
    for parameter in declared:
        for layer in [None] if parameter.layers is None else sorted(set(parameter.layers) - {None}):
            for name, leaf in parameter.leaves:
                found = known.get(name.format(layer), {}).get("shape", ())
                if tuple(found) != leaf.shape:
                    what = f"leaf {name.format(layer)}: found {found or 'none'}, the model has {list(leaf.shape)}"
                    raise DamagedError(f"{reader.folder / NAME}: damaged, {what}; {MEND}")


def _flat(parameters: Any) -> tuple[list[Parameter], Any]:
    return jax.tree.flatten(parameters, is_leaf=lambda leaf: isinstance(leaf, Parameter))
