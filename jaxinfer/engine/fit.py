"""What a model becomes on a layout of devices, known before anything is allocated; and what would fit instead."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp

from jaxinfer.engine.config import EngineConfig
from jaxinfer.engine.device import Card, check_dtype, choose_kernels
from jaxinfer.engine.forward import Decoder
from jaxinfer.engine.memory import DoesNotFit, MemoryPlan, choose_batch, choose_chunk, plan_memory
from jaxinfer.models.config import ModelConfig
from jaxinfer.ops.cuda import Gpu
from jaxinfer.parallel.axes import LayoutError, mesh_text
from jaxinfer.parallel.placement import MeshSizes, Rules, check_model
from jaxinfer.parallel.stages import balance, check_stage_layers

MOST_DEVICES, MOST_TENSOR = 256, 8  # that advice looks at


@dataclass(frozen=True)
class Fitted:
    """The decoder, the settings with nothing left open, and the memory of each device."""

    decoder: Decoder
    config: EngineConfig
    memory: MemoryPlan


def fit(
    model: ModelConfig,
    config: EngineConfig,
    sizes: MeshSizes,
    dtype: Any,
    device: Card,
    max_context: int,
    limit: int,
    gpu: Gpu | None = None,
) -> Fitted:
    """`limit`: bytes of each device, of which `config.memory_fraction` may be filled.

    Raises:
      LayoutError: a dtype that the device has not, or a mesh or stages that the model cannot have.
      DoesNotFit: the memory is too small for one context.
    """
    dtype, rules = jnp.dtype(dtype), Rules()
    check_dtype(dtype, device)
    check_model(model, sizes)
    stage_layers = config.stage_layers or balance(model.num_layers, sizes["stage"])
    check_stage_layers(stage_layers, model.num_layers, sizes["stage"])
    decoder = Decoder(model, stage_layers, choose_kernels(config.kernels, dtype, device), gpu)
    where = rules, sizes, dtype, max_context, limit
    config = replace(config, kernels="off" if decoder.kernels == "off" else "on")
    config = replace(config, max_batch=choose_batch(decoder, config, *where))
    config = replace(config, prefill_chunk=choose_chunk(decoder, config, *where))
    return Fitted(decoder, config, plan_memory(decoder, config, *where))


def fit_or_advise(model: ModelConfig, config: EngineConfig, sizes: MeshSizes, dtype: Any, *rest: Any) -> Fitted:
    """The same, and where memory is too small the message ends with what would fit."""
    try:
        return fit(model, config, sizes, dtype, *rest)
    except DoesNotFit as error:
        found = advice(model, config, sizes, dtype, *rest)
        raise DoesNotFit(f"{error}. {'Fits: ' + '; '.join(found) if found else NOTHING}", error.plan) from error


NOTHING = f"Nothing fits: no smaller setting, and no mesh of up to {MOST_DEVICES} such devices"


def advice(model: ModelConfig, config: EngineConfig, sizes: MeshSizes, dtype: Any, *rest: Any) -> list[str]:
    """What would fit, each by itself; the arguments are those of `fit`."""
    found = smaller(model, config, sizes, dtype, *rest)
    for more in more_devices(model, sizes):
        if _fits(model, replace(config, stage_layers=None), more, dtype, *rest):
            found.append(f"{more['stage'] * more['data'] * more['tensor']} devices (--mesh {mesh_text(more)})")
            break
    return found


def smaller(
    model: ModelConfig,
    config: EngineConfig,
    sizes: MeshSizes,
    dtype: Any,
    device: Card,
    max_context: int,
    limit: int,
    gpu: Gpu | None = None,
) -> list[str]:
    """The settings of generate that would fit on the same devices: fewer pages, a smaller batch, a shorter context, a
    smaller dtype."""

    def fits(config: EngineConfig, context: int = max_context, dtype: Any = dtype) -> bool:
        return _fits(model, config, sizes, dtype, device, context, limit, gpu)

    if config.pages is not None and fits(replace(config, pages=None)):
        room = fit(model, replace(config, pages=None), sizes, dtype, device, max_context, limit, gpu).memory
        return [f"--pages {(room.cache + room.headroom) // room.page}"]
    found = []
    least = replace(config, max_batch=1, prefill_chunk=min(128, config.prefill_chunk or 128), pages=None)
    tried = (replace(least, max_batch=batch) for batch in (32, 16, 8, 4, 2, 1) if batch < (config.max_batch or 64))
    batch = next((each.max_batch for each in tried if fits(each)), None)
    if batch is not None:
        found.append(f"--max-batch {batch} --prefill-chunk {least.prefill_chunk}")
    else:
        context = longest(lambda pages: fits(least, pages * config.page_size), max_context // config.page_size)
        if context:
            context *= config.page_size
            found.append(f"--max-context {context} --max-batch 1 --prefill-chunk {least.prefill_chunk}")
    if jnp.dtype(dtype).itemsize > 2:
        small = next((name for name in ("bfloat16", "float16") if fits(config, dtype=name)), None)
        found += [f"--dtype {small}"] if small else []
    return found


def _fits(model: ModelConfig, config: EngineConfig, *rest: Any) -> bool:
    try:
        fit(model, config, *rest)
    except LayoutError:
        return False
    return True


def longest(holds: Callable[[int], bool], most: int) -> int:
    """The largest number up to `most` that `holds`, which also holds for all below it; 0 if none does."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if holds(middle) else (low, middle - 1)
    return low


def more_devices(model: ModelConfig, sizes: MeshSizes) -> Iterator[dict[str, int]]:
    """Legal meshes of more devices per data shard, the fewest first; of as many, the most tensor parallelism."""
    began = sizes["stage"] * sizes["tensor"]
    for count in range(began + 1, MOST_DEVICES // sizes["data"] + 1):
        for tensor in (each for each in range(MOST_TENSOR, 0, -1) if count % each == 0):
            mesh = {"stage": count // tensor, "data": sizes["data"], "tensor": tensor}
            try:
                check_model(model, mesh)
                balance(model.num_layers, mesh["stage"])
            except LayoutError:
                continue
            yield mesh
