"""Into JAX, with the other processes where there are any, and out of it again."""

import os
from typing import Any

import attrs

from jaxinfer.cluster import distributed
from jaxinfer.cluster.cpu import use_virtual_devices
from jaxinfer.cluster.visible import visible_devices
from jaxinfer.options import limits
from jaxinfer.process.run import Run


def join(run: Run) -> None:
    """Starts JAX; nothing has used it before.

    Raises:
      ClusterError: JAX could not start; ThreadPoolError, ValueError: the virtual devices cannot be.
    """
    from jaxinfer.engine.device import claim_memory

    claim_memory()
    if run.args.cpu_devices is not None:
        use_virtual_devices(run.args.cpu_devices)
    if run.launch is not None:
        bounds = limits(run.args)
        run.life.beat("start", waits=True)
        distributed.initialize(run.launch, run.coordinator, int(sum(attrs.astuple(bounds))))
        import jax

        run.life.describe(_describe(jax.local_devices()))


def leave(run: Run) -> None:
    """Waits for the others and ends JAX's part."""
    run.life.beat("end")
    run.life.beat("end", waits=True)
    distributed.wait_for_all(f"{run.program} ends")
    distributed.leave()


def _describe(devices: list[Any]) -> str:
    """GPUs by their numbers on the node, where CUDA_VISIBLE_DEVICES gives them others in this process."""
    kind = "CPU" if devices[0].platform == "cpu" else "GPU"
    visible = (kind == "GPU" and visible_devices(os.environ)) or []
    here = [device.local_hardware_id for device in devices]
    numbers = [visible[each] if each < len(visible) else str(each) for each in here]
    return f"{kind} {','.join(numbers)}: {devices[0].device_kind}"
