"""Random weights made on the devices: to measure a model's speed without its weights."""

from collections.abc import Callable
from functools import cache
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from jaxinfer.parallel.mesh import mesh_sizes
from jaxinfer.parallel.placement import Parameter, Rules, global_shape, partition_spec

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

    The same mesh and seed give the same numbers, in every dtype. No host array is made, and a device holds no more than
    its weights; there is one compile per distinct shape. `loading` is told (bytes made, bytes in all) of all devices.
    """
    declared, tree = jax.tree.flatten(parameters, is_leaf=lambda leaf: isinstance(leaf, Parameter))
    sizes, dtype = mesh_sizes(mesh), jnp.dtype(dtype)
    shapes = [global_shape(parameter, rules, sizes) for parameter in declared]
    total, done, arrays = sum(map(prod, shapes)) * dtype.itemsize, 0, []

    @cache
    def maker(shape: tuple[int, ...], sharding: NamedSharding, norm: bool) -> Callable[[int], jax.Array]:
        def make(number: int) -> jax.Array:
            if norm:
                return jnp.ones(shape, dtype)
            # a hash of each number's place, not jax.random: one fused loop, without float32 or bits beside the array
            place = sum(
                jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * jnp.uint32(prod(shape[axis + 1 :]) % 2**32)
                for axis in range(len(shape))
            )
            bits = _hashed(place ^ _hashed(jnp.uint32(number) + _hashed(jnp.uint32(seed % 2**32))))
            odd = 2 * (bits >> 24).astype(jnp.int32) - 255
            return odd.astype(dtype) * jnp.asarray(UNIT, dtype)

        return jax.jit(make, out_shardings=sharding)

    loading(0, total)
    for number, (parameter, shape) in enumerate(zip(declared, shapes)):
        sharding = NamedSharding(mesh, partition_spec(parameter, rules))
        array = maker(shape, sharding, parameter.name.endswith("norm"))(number)
        arrays.append(jax.block_until_ready(array))
        done += array.nbytes
        loading(done, total)
    return jax.tree.unflatten(tree, arrays)


def _hashed(x: jax.Array) -> jax.Array:
    """uint32 to uint32, each bit of one on about half of the other's (Appleby, MurmurHash3's finalizer)."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = (x ^ (x >> shift)) * jnp.uint32(factor)
    return x ^ (x >> 16)
