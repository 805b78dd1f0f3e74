"""Random weights made on the devices: to measure a model's speed without its weights."""

import zlib
from collections.abc import Callable
from functools import cache
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from jaxinfer.parallel.mesh import mesh_sizes
from jaxinfer.parallel.placement import MeshSizes, Parameter, Rules, global_shape, local_size, partition_spec, ways

# of which numbers are odd multiples up to 255: 8 significant bits are exact in bfloat16 too, and 0.03 is small enough
# that activations stay finite in float16 through any number of layers
UNIT = 2.0**-13


def random_params(
    parameters: Any,
    mesh: Mesh,
    rules: Rules,
    dtype: Any,
    seed: int = 0,
    loading: Callable[[int, int], None] = lambda done, total: None,
) -> Any:
    """The tree of `parameters` as arrays on the mesh: norms are ones, all else is uniform over 256 numbers around zero,
    with deviation 0.018.

    The same seed gives the same model on every mesh and under every cut into stages, in every dtype. No host array is
    made, and a device holds no more than its weights; there is one compile per distinct shape. `loading` is told (bytes
    made, bytes in all) of all devices.
    """
    declared, tree = jax.tree.flatten(parameters, is_leaf=lambda leaf: isinstance(leaf, Parameter))
    sizes, dtype = mesh_sizes(mesh), jnp.dtype(dtype)
    shapes = [global_shape(parameter, rules, sizes) for parameter in declared]
    total, done, arrays = sum(map(prod, shapes)) * dtype.itemsize, 0, []

    @cache
    def maker(
        shape: tuple[int, ...], sharding: NamedSharding, norm: bool, pieces: tuple[Piece, ...]
    ) -> Callable[[np.ndarray], jax.Array]:
        def make(numbers: jax.Array) -> jax.Array:
            if norm:
                return jnp.ones(shape, dtype)
            # a hash of each number's place, not jax.random: one fused loop, without float32 or bits beside the array
            stages = numbers.ndim
            row = _whole_row(jax.lax.broadcasted_iota(jnp.int32, shape, stages), pieces).astype(jnp.uint32)
            place = row
            if len(shape) > stages + 1:
                column = jax.lax.broadcasted_iota(jnp.uint32, shape, stages + 1)
                place = row * jnp.uint32(shape[stages + 1]) + column
            numbers = numbers.reshape(numbers.shape + (1,) * (len(shape) - stages))
            bits = _hashed(place ^ _hashed(numbers + _hashed(jnp.uint32(seed % 2**32))))
            odd = 2 * (bits >> 24).astype(jnp.int32) - 255
            return odd.astype(dtype) * jnp.asarray(UNIT, dtype)

        return jax.jit(make, out_shardings=sharding)

    loading(0, total)
    for parameter, shape in zip(declared, shapes):
        sharding = NamedSharding(mesh, partition_spec(parameter, rules))
        make = maker(shape, sharding, parameter.name.endswith("norm"), _pieces(parameter, rules, sizes))
        array = make(_numbers(parameter))
        arrays.append(jax.block_until_ready(array))
        done += array.nbytes
        loading(done, total)
    return jax.tree.unflatten(tree, arrays)


Piece = tuple[int, int, int]  # of a leaf: rows on one device, different pieces of them, devices along the rows


def _pieces(parameter: Parameter, rules: Rules, sizes: MeshSizes) -> tuple[Piece, ...]:
    pieces = []
    for _, leaf in parameter.leaves:
        split = len(leaf.shape) - parameter.in_dims
        axes = list(zip(leaf.axes, leaf.shape))[:split]
        devices = prod(ways(axis, rules, sizes) for axis, _ in axes)
        # KV heads may be fewer than devices, which then hold the same ones: as `local_slice` has it
        different = prod(min(ways(axis, rules, sizes), size if axis == "kv_heads" else 1 << 31) for axis, size in axes)
        pieces.append((prod(local_size(axis, size, rules, sizes) for axis, size in axes), different, devices))
    return tuple(pieces)


def _whole_row(row: jax.Array, pieces: tuple[Piece, ...]) -> jax.Array:
    """Row of the runtime array, in which each device's pieces of the leaves lie together, to that of the leaves joined
    whole."""
    own = sum(rows for rows, _, _ in pieces)
    device, within = row // own, row % own
    found, begin, whole = row, 0, 0
    for rows, different, devices in pieces:
        place = whole + device * different // devices * rows + within - begin
        found = jnp.where(within >= begin, place, found)
        begin, whole = begin + rows, whole + rows * different
    return found


def _numbers(parameter: Parameter) -> np.ndarray:
    """uint32, one per stage, or a single one for an array outside the layers: of the array's name and its layer."""
    name = zlib.crc32(parameter.name.encode())
    layers = [-1] if parameter.layers is None else [-1 if layer is None else layer for layer in parameter.layers]
    found = np.array([(name + (layer + 1) * 0x9E3779B1) % 2**32 for layer in layers], np.uint32)
    return found[0] if parameter.layers is None else found


def _hashed(x: jax.Array) -> jax.Array:
    """uint32 to uint32, each bit of one on about half of the other's (Appleby, MurmurHash3's finalizer)."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = (x ^ (x >> shift)) * jnp.uint32(factor)
    return x ^ (x >> 16)
