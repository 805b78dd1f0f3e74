"""Which layers each pipeline stage holds."""

from collections.abc import Sequence
from itertools import accumulate
from math import inf

from jaxinfer.parallel.axes import LayoutError


def balance(layers: int, stages: int) -> tuple[int, ...]:
    """Layers per stage, as even as can be, the longer stages first.

    Embedding and head are cut over the stages as well as over ``tensor`` (see ``VOCAB_AXES``), so each stage holds
    the same bytes of them and does the same share of their work in every tick: counting layers counts the bytes.

    Raises:
      LayoutError: more stages than layers.
    """
    if stages > layers:
        raise LayoutError(f"stage={stages}: the model has {layers} layers; legal: 1 to {layers}")
    return tuple(layers // stages + (stage < layers % stages) for stage in range(stages))


def parse_stage_layers(text: str, layers: int, stages: int) -> tuple[int, ...]:
    """Reads ``7,7,6,6``.

    Raises:
      LayoutError: not a list of positive numbers, or one that `check_stage_layers` refuses.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() and int(part) > 0 for part in parts):
        raise LayoutError(f"stage-layers: {text!r} is not a list of positive whole numbers such as 7,7,6,6")
    counts = tuple(map(int, parts))
    check_stage_layers(counts, layers, stages)
    return counts


def check_stage_layers(counts: tuple[int, ...], layers: int, stages: int) -> None:
    """Raises:
    LayoutError: not one positive number per stage, or numbers that do not add up to the model's layers.
    """
    if min(counts) < 1:
        raise LayoutError(f"stage-layers: {counts} leaves a stage without a layer; legal: at least 1 each")
    if len(counts) != stages:
        raise LayoutError(f"stage-layers: {counts} gives {len(counts)} stages, the mesh has stage={stages}")
    if sum(counts) != layers:
        raise LayoutError(f"stage-layers: {counts} adds up to {sum(counts)} layers, the model has {layers}")


def fastest(times: Sequence[float], ends: Sequence[float]) -> tuple[int, ...]:
    """The cut whose slowest stage is fastest: `times` of the layers in their order, `ends` what each stage does beside
    layers. By dynamic programming over (stages so far, layers so far), S L^2 steps.

    Raises:
      LayoutError: more stages than layers.
    """
    layers, stages = len(times), len(ends)
    balance(layers, stages)
    before = [0.0, *accumulate(times)]
    worst = [0.0] + [inf] * layers  # of the stages so far, by how many layers they hold
    cuts: list[list[int]] = []
    for stage, end in enumerate(ends):
        chosen, lowest = [0] * (layers + 1), [inf] * (layers + 1)
        for held in range(stage + 1, layers - (stages - stage - 1) + 1):
            for start in range(stage, held):
                slowest = max(worst[start], before[held] - before[start] + end)
                if slowest < lowest[held]:
                    chosen[held], lowest[held] = start, slowest
        worst = lowest
        cuts.append(chosen)
    found, held = [], layers
    for chosen in reversed(cuts):
        found.append(held - chosen[held])
        held = chosen[held]
    return tuple(reversed(found))


def slots(stage_layers: tuple[int, ...]) -> list[tuple[int | None, ...]]:
    """Per layer slot, the layer that each stage holds there, None where the stage has fewer layers."""
    first = [sum(stage_layers[:stage]) for stage in range(len(stage_layers))]
    return [
        tuple(start + slot if slot < count else None for start, count in zip(first, stage_layers))
        for slot in range(max(stage_layers))
    ]
