"""The mesh for a model on the devices that there are."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from jaxinfer.models.config import ModelConfig
from jaxinfer.parallel.axes import LayoutError, choose_mesh
from jaxinfer.parallel.placement import check_model


def auto_mesh(model: Mapping[str, Any], hosts: Sequence[str]) -> tuple[dict[str, int], str]:
    """Axis sizes over all devices of the processes on `hosts`, and in words why; `model` as in the manifest."""
    config = ModelConfig.from_json(model)
    per_node = list(Counter(hosts[device.process_index] for device in jax.devices()).values())

    def fits(tensor: int) -> bool:
        try:
            check_model(config, {"stage": 1, "data": 1, "tensor": tensor})
        except LayoutError:
            return False
        return True

    nodes = f"{len(per_node)} node{'s' if len(per_node) > 1 else ''} with {'+'.join(map(str, sorted(set(per_node))))}"
    kind = jax.devices()[0].device_kind
    return choose_mesh(per_node, fits, config.num_layers), f"{nodes} x {kind}: tensor inside a node, then stages"
