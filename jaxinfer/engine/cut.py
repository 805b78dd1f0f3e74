"""Which layers each stage holds: as told, or the best cut by times that a profile measured."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

import xxhash

from jaxinfer.json_text import read_object
from jaxinfer.models.config import WHEN_TO_STOP
from jaxinfer.parallel.axes import LayoutError
from jaxinfer.parallel.stages import balance, fastest, parse_stage_layers

MEASURED = "measured:"
NOISE = 0.01  # of a step: a cut that is better by less than this is not; where it is the even one, no slot is empty


@dataclass(frozen=True)
class Cut:
    """Layers of each stage; `source` says what a measured one comes from, as JSON."""

    stage_layers: tuple[int, ...]
    source: dict[str, Any] | None = None

    def told(self) -> str:
        """A line for the user."""
        source = self.source or {}
        text = f"stage-layers: {_text(self.stage_layers)} by {source['file']}"
        if source["predicted_step_ms"] is None:
            return f"{text} (measured on another mesh or dtype: no time is predicted)"
        gain, step = source["predicted_gain_ms"], source["step_ms"]
        if list(self.stage_layers) == source["measured_with"]:
            return f"{text}: the cut that was measured, {step:.3f} ms per decode step"
        less = f"{gain:.3f} ms ({gain / step:.1%}) less than measured with {_text(source['measured_with'])}"
        return f"{text}: predicted {source['predicted_step_ms']:.3f} ms per decode step, {less}"


def choose_cut(text: str, model: Mapping[str, Any], sizes: Mapping[str, int], dtype: str) -> Cut:
    """Reads ``7,7,6,6``, or ``measured:FILE`` with the OUT.profile.json of a traced run. `model` is a manifest's.

    A stage takes the time of its layers and of its share of the ends, and a step as long as its slowest stage, plus
    what was measured beside. A slot that not all stages fill costs what the profile says. The even cut stays where no
    other gains 1 % of a step.

    Raises:
      LayoutError: no such layers, or a profile that has no times of layers, or of another model.
      ValueError: a file that is no profile; OSError: there is none.
    """
    layers = model["num_layers"]
    if not text.startswith(MEASURED):
        return Cut(parse_stage_layers(text, layers, sizes["stage"]))
    path = Path(text.removeprefix(MEASURED))
    profile = read_object(path)
    times, ends, uneven, old = _read(path, profile, model, layers)
    same_place = profile["mesh"] == dict(sizes) and profile.get("dtype") == dtype
    stages = sizes["stage"]
    ends = ends if len(ends) == stages else [sum(ends) / len(ends)] * stages

    def slowest(cut: Sequence[int]) -> float:
        starts = [sum(cut[:stage]) for stage in range(stages)]
        each = (sum(times[at : at + count]) + end for at, count, end in zip(starts, cut, ends, strict=True))
        return max(each) + uneven * (max(cut) - min(cut))

    even, best = balance(layers, stages), fastest(times, ends)
    step = profile["step_ms"]["decode"]
    chosen = best if slowest(even) - slowest(best) > NOISE * step else even
    gain = slowest(old) - slowest(chosen) if same_place else None
    return Cut(
        chosen,
        {
            "file": str(path),
            "xxh3_128": _digest(path),
            "measured_with": list(old),
            "stage_layers": list(chosen),
            "step_ms": step,
            "predicted_gain_ms": gain,
            "predicted_step_ms": None if gain is None else step - gain,
        },
    )


def identity(text: str | None) -> str | None:
    """What must be the same on all processes: of a file, what it holds, wherever it is.

    Raises:
      OSError: there is none.
    """
    if text is None or not text.startswith(MEASURED):
        return text
    return MEASURED + _digest(Path(text.removeprefix(MEASURED)))


def shape(model: Mapping[str, Any]) -> str:
    """A digest of what decides a model's times, of what a manifest says of it."""
    told = {name: value for name, value in model.items() if name not in WHEN_TO_STOP}
    return xxhash.xxh3_64_hexdigest(json.dumps(told, sort_keys=True).encode())


def _digest(path: Path) -> str:
    return xxhash.xxh3_128_hexdigest(path.read_bytes())


def _read(
    path: Path, profile: Mapping[str, Any], model: Mapping[str, Any], layers: int
) -> tuple[list[float], list[float], float, tuple[int, ...]]:
    """Times of the layers and of the stages' ends, what an uneven slot costs, and the cut they were measured with."""
    try:
        name, mesh, old = profile["model"], profile["mesh"], tuple(profile["stage_layers"])
        times, ends = profile["layers"]["decode"], profile["ends"]["decode"]
        uneven, step, why = profile["uneven_slot_ms"]["decode"], profile["step_ms"]["decode"], profile["layers_why"]
        stages, wanted = mesh["stage"], profile["shape"]
        if not all(isinstance(each, int) and 0 < each < 10**6 for each in old) or len(old) != stages:
            raise ValueError("stage_layers")
        if sum(old) == layers and times is not None:
            _check(times, layers, "layers")
            _check(ends, stages, "ends")
            _check([step], 1, "step_ms")
            _check([uneven or 0.0], 1, "uneven_slot_ms")
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        what = f"{error.args[0]!r} is missing or not as it is written"
        raise ValueError(f"stage-layers: {path}: {what}; legal: OUT.profile.json of a run with --profile") from None
    if sum(old) != layers:
        raise LayoutError(
            f"stage-layers: {path}: measured on {name!r}, of {sum(old)} layers, this model has {layers}; "
            "legal: a profile of the same model"
        )
    if wanted != shape(model):
        raise LayoutError(
            f"stage-layers: {path}: measured on {name!r}, which has as many layers but is another model; "
            "legal: a profile of the same model"
        )
    if times is None:
        raise LayoutError(f"stage-layers: {path}: it has no times of layers: {why!r}")
    return times, ends, uneven or 0.0, old


def _check(times: Any, count: int, name: str) -> None:
    """Raises ValueError with the name unless it is so many times."""
    if not isinstance(times, list) or len(times) != count:
        raise ValueError(name)
    if not all(isinstance(each, int | float) and isfinite(each) and each >= 0 for each in times):
        raise ValueError(name)


def _text(layers: Sequence[int]) -> str:
    return ",".join(map(str, layers))
