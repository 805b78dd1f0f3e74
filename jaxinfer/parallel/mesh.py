"""The device mesh, and where each process stands on it."""

import jax
import numpy as np
from jax.sharding import Mesh

from jaxinfer.parallel.axes import AXES, LayoutError


def make_mesh(sizes: dict[str, int]) -> Mesh:
    """A mesh over the first devices of all processes, ``tensor`` fastest: neighbours on a node share a tensor group.

    Raises:
      LayoutError: more devices asked for than there are, or some process would hold none.
    """
    shape = tuple(sizes[axis] for axis in AXES)
    wanted, devices = int(np.prod(shape)), jax.devices()
    text = ",".join(f"{axis}={sizes[axis]}" for axis in AXES)
    if wanted > len(devices):
        raise LayoutError(f"mesh {text} needs {wanted} devices, found {len(devices)} ({devices[0].device_kind})")
    used = devices[:wanted]
    idle = set(range(jax.process_count())) - {device.process_index for device in used}
    if idle:
        raise LayoutError(
            f"mesh {text} uses {wanted} of {len(devices)} devices and leaves process {min(idle)} without one"
        )
    return Mesh(np.array(used).reshape(shape), AXES)


def mesh_sizes(mesh: Mesh) -> dict[str, int]:
    return {axis: mesh.shape[axis] for axis in AXES}
