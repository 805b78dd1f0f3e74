"""Every layout of a model on GPUs: legal or why not, what it takes of each GPU, what it holds, how fast it will be."""

from collections.abc import Iterator
from math import ceil

import attrs

from jaxinfer.engine.config import EngineConfig
from jaxinfer.engine.device import FRAGMENTS, POOL_SHARE
from jaxinfer.engine.fit import Fitted, fit, longest
from jaxinfer.engine.memory import DoesNotFit, MemoryPlan
from jaxinfer.models.config import ModelConfig
from jaxinfer.parallel.axes import LayoutError, mesh_text
from jaxinfer.plan.hardware import Gpus
from jaxinfer.plan.predict import Place, Prediction, Workload, predict

MOST_BATCH = 4096


@attrs.frozen
class Ask:
    """What is to run. `batch`: sequences in flight at once, None for as many as the engine would take."""

    model: ModelConfig
    dtype: str
    context: int
    new_tokens: int
    batch: int | None = None
    memory_fraction: float = EngineConfig.memory_fraction
    prefill_chunk: int | None = None

    def config(self, sizes: dict[str, int]) -> EngineConfig:
        """What generate would be told, or tell itself."""
        return EngineConfig(
            mesh=sizes,
            max_batch=None if self.batch is None else ceil(self.batch / sizes["data"]),
            max_context=self.context,
            memory_fraction=min(self.memory_fraction, POOL_SHARE * (1 - FRAGMENTS)),
            prefill_chunk=self.prefill_chunk,
        )


@attrs.frozen
class Layout:
    """A mesh on GPUs (None: devices of no known type). `reason`: why it cannot be, "" where it can; `memory` is there
    unless the mesh is illegal.

    `holds`: whole contexts that the cache holds at once, over all data shards.
    """

    sizes: dict[str, int]
    gpus: Gpus | None
    reason: str = ""
    memory: MemoryPlan | None = None
    fitted: Fitted | None = None
    holds: int = 0
    work: Workload | None = None
    prediction: Prediction | None = None

    @property
    def mesh(self) -> str:
        return mesh_text(self.sizes) or "tensor=1"

    @property
    def fits(self) -> bool:
        return not self.reason

    @property
    def refusal(self) -> str:
        verb = "CANNOT BE" if self.memory is None else "DOES NOT FIT"
        return f"{verb}: --mesh {self.mesh}: {self.reason}"

    @property
    def speed(self) -> str:
        """In words; of a layout with a prediction."""
        tpot, rate = self.prediction.tpot_s * 1e3, self.prediction.tokens_per_s
        rounded = f"{rate:,.0f}" if rate >= 1 else f"{rate:.1g}"
        return f"TPOT {tpot:.3g} ms, {rounded} tokens/s with {self.work.batch:,} at once"


def meshes(count: int) -> Iterator[dict[str, int]]:
    for tensor in range(1, count + 1):
        for data in range(1, count // tensor + 1):
            if count % (tensor * data) == 0:
                yield {"stage": count // (tensor * data), "data": data, "tensor": tensor}


def fitted(ask: Ask, gpus: Gpus, sizes: dict[str, int]) -> Fitted:
    """Raises LayoutError, as the engine would."""
    return fit(ask.model, ask.config(sizes), sizes, ask.dtype, gpus.type, ask.context, gpus.type.memory)


def consider(ask: Ask, gpus: Gpus, sizes: dict[str, int]) -> Layout:
    try:
        found = fitted(ask, gpus, sizes)
    except DoesNotFit as error:
        return Layout(sizes, gpus, str(error), error.plan)
    except LayoutError as error:
        return Layout(sizes, gpus, str(error))
    holds = _holds(found, ask.context) * sizes["data"]
    reason = ""
    if ask.batch is not None and holds < ask.batch:
        reason = f"batch: the cache holds {holds} of {ask.batch} sequences of {ask.context} tokens at once"
    batch = ask.batch or min(holds, found.config.max_batch * sizes["data"])
    work = Workload(batch, ask.context, ask.new_tokens)
    prediction = predict(Place(ask.model, found, sizes, gpus, ask.dtype), work)
    return Layout(sizes, gpus, reason, found.memory, found, holds, work, prediction)


def tpot(ask: Ask, layout: Layout, batch: int) -> float:
    """Of a layout that fits, with another number of sequences at once."""
    place = Place(ask.model, layout.fitted, layout.sizes, layout.gpus, ask.dtype)
    return predict(place, attrs.evolve(layout.work, batch=batch)).tpot_s


def rank(layouts: list[Layout]) -> list[Layout]:
    """Those that fit, most tokens per second first, then by TPOT; after them the others, nearest to fitting first."""
    able = sorted((each for each in layouts if each.fits), key=lambda each: _speed(each.prediction))
    tight = [each for each in layouts if not each.fits and each.memory is not None]
    illegal = [each for each in layouts if not each.fits and each.memory is None]
    return [*able, *sorted(tight, key=lambda each: (-each.holds, -each.memory.headroom)), *illegal]


def _speed(prediction: Prediction) -> tuple[float, float]:
    return -prediction.tokens_per_s, prediction.tpot_s


def _holds(found: Fitted, context: int) -> int:
    return (found.memory.pages - 1) // ceil(context / found.config.page_size)


def _can(ask: Ask, gpus: Gpus, sizes: dict[str, int]) -> bool:
    try:
        found = fitted(ask, gpus, sizes)
    except LayoutError:
        return False
    return _holds(found, ask.context) * sizes["data"] >= (ask.batch or 1)


def largest_batch(ask: Ask, layout: Layout) -> int:
    """Sequences of the whole context that fit at once; counted up to MOST_BATCH per data shard."""
    shards = layout.sizes["data"]
    per_shard = longest(
        lambda batch: _can(attrs.evolve(ask, batch=batch * shards), layout.gpus, layout.sizes), MOST_BATCH
    )
    return per_shard * shards


def largest_context(ask: Ask, layout: Layout) -> int:
    """Tokens of each of the sequences at once, up to the model's longest context; in whole pages below that."""
    page = EngineConfig.page_size
    most = ask.model.max_context

    def can(pages: int) -> bool:
        return _can(attrs.evolve(ask, context=min(most, pages * page)), layout.gpus, layout.sizes)

    return min(most, longest(can, ceil(most / page)) * page)
