"""From a checkpoint onto a mesh: each process reads the slices that its own devices hold, one parameter at a time."""

from collections.abc import Callable, Iterator, Mapping
from math import prod
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from jaxinfer.parallel.mesh import AXES, mesh_sizes
from jaxinfer.parallel.placement import (
    MeshSizes,
    Parameter,
    Rules,
    global_shape,
    local_shape,
    local_slice,
    partition_spec,
)

Read = Callable[[str, tuple[slice, ...], np.ndarray], Any]  # leaf, slices, the array to fill


def _coordinates(mesh: Mesh) -> Iterator[tuple[jax.Device, dict[str, int]]]:
    for where, device in np.ndenumerate(mesh.devices):
        if device.process_index == jax.process_index():
            yield device, dict(zip(AXES, where))


def local_array(
    read: Read, parameter: Parameter, rules: Rules, sizes: MeshSizes, coords: MeshSizes, dtype: Any
) -> np.ndarray:
    """One device's piece, without the stage dimension; zeros where a slot is empty or the vocabulary is padded.

    Each leaf is read into its columns of the piece, which is held once."""
    whole = np.zeros(local_shape(parameter, rules, sizes), dtype)
    layer = None if parameter.layers is None else parameter.layers[coords["stage"]]
    if parameter.layers is not None and layer is None:
        return whole
    column = 0
    for name, leaf in parameter.leaves:
        index = tuple(local_slice(axis, size, rules, sizes, coords) for axis, size in zip(leaf.axes, leaf.shape))
        shape = tuple(each.stop - each.start for each in index)
        rows, columns = prod(shape[: parameter.in_dims]), prod(shape[parameter.in_dims :])
        view = whole[..., column : column + columns]
        view = view[:rows] if parameter.in_dims else view
        read(name.format(layer), index, view.reshape(shape, copy=False))
        column += columns
    return whole


def load(
    read: Read,
    parameters: Any,
    mesh: Mesh,
    rules: Rules,
    dtype: Any,
    loaded: Callable[[int], None] = lambda size: None,
) -> Any:
    """The tree of `parameters` as arrays on the mesh.

    Devices of this process that hold the same piece (data replicas) share one read. `loaded` is told the bytes that
    each piece takes on its devices. The host holds one piece of one parameter at a time.
    """
    sizes = mesh_sizes(mesh)

    def place(parameter: Parameter) -> jax.Array:
        sharding = NamedSharding(mesh, partition_spec(parameter, rules))
        shape = global_shape(parameter, rules, sizes)
        placed: Mapping[Any, list[jax.Device]] = {}
        where = sharding.addressable_devices_indices_map(shape)
        coords_of = dict(_coordinates(mesh))
        for device, index in where.items():
            placed.setdefault(str(index), []).append(device)
        arrays = []
        for devices in placed.values():
            local = local_array(read, parameter, rules, sizes, coords_of[devices[0]], dtype)
            local = local[None] if parameter.layers is not None else local
            arrays += [jax.device_put(local, device) for device in devices]
            loaded(local.nbytes * len(devices))
        array = jax.make_array_from_single_device_arrays(shape, sharding, arrays)
        # the transfer must be over before the host piece is dropped, or pieces would pile up
        return array.block_until_ready()

    return jax.tree.map(place, parameters, is_leaf=lambda leaf: isinstance(leaf, Parameter))
