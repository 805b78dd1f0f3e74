"""A study to its cells: one per model and point of each experiment, in the order of the file."""

import re
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from itertools import product
from math import ceil, prod
from typing import Any

import attrs

from jaxinfer.engine.params import SamplingParams
from jaxinfer.parallel.axes import LayoutError, parse_mesh
from jaxinfer.parallel.placement import check_model
from jaxinfer.parallel.stages import balance, parse_stage_layers
from jaxinfer.study.errors import StudyError
from jaxinfer.study.file import FIRST, TRANSFORMERS, Experiment, Prompts, Study
from jaxinfer.study.identity import code, hash_of, reference_code
from jaxinfer.study.models import Known
from jaxinfer.study.place import Place, Seats
from jaxinfer.study.prompts import (
    Line,
    as_many,
    encoded,
    hashed,
    params_of,
    random_lines,
    read_lines,
    token_counts,
)
from jaxinfer.study.settings import MEASURED, RANDOM, check_settings

LOGPROBS = 5  # of correctness: a divergence's token that is the baseline's third is still known


@attrs.frozen(kw_only=True, eq=False)
class Cell:
    """One command and what it measures.

    Attributes:
      name: without its hash; role: baseline, point, a or b; x: where it stands in its experiment.
      settings: options of generate, all that it runs with.
      lines, counts: its prompts, and the tokens of each (None where no tokenizer is at hand).
      repeats, warm_up, profile: how it is measured; reference: by transformers on this host's CPU, not by generate.
      seats: its devices; None where they cannot be had.
      after: the cell whose profile stage_layers is measured by.
      why: the reason that it cannot run, "" if it can; refused: the reason is what the study asks, not where it runs.
    """

    experiment: str
    kind: str
    name: str
    role: str
    x: dict[str, Any]
    model: Known
    mesh: str
    settings: dict[str, Any]
    lines: list[Line]
    counts: list[int] | None
    repeats: int
    warm_up: bool
    profile: bool
    reference: bool = False
    seats: Seats | None = None
    after: "Cell | None" = None
    why: str = ""
    refused: bool = False
    device_kind: str
    identity: dict[str, Any]
    hash: str

    @property
    def folder(self) -> str:
        """Inside the study's folder."""
        return f"cells/{self.experiment}/{self.name}-{self.hash}"

    @property
    def label(self) -> str:
        return f"{self.experiment}/{self.name}"

    @property
    def prompts(self) -> str:
        return f"prompts/{hashed(encoded(self.lines))}.jsonl"

    @property
    def devices(self) -> int:
        return self.x["devices"]

    @property
    def data_shards(self) -> int:
        return parse_mesh(self.mesh)["data"]


def expand(study: Study, place: Place, models: Mapping[str, Known]) -> list[Cell]:
    """All cells. Those that cannot be say why.

    Raises:
      StudyError: prompts, settings or meshes that no model could have.
    """
    cells: list[Cell] = []
    files: dict[str, list[Line]] = {}
    for name, experiment in study.experiments.items():
        for model in experiment.models or study.models:
            try:
                cells += _Expansion(study, place, models[model], name, experiment, files).cells()
            except StudyError as error:
                raise StudyError(f"experiments.{name}: {error}") from None
    folders = [cell.folder for cell in cells]
    if twice := next((each for each in folders if folders.count(each) > 1), None):
        raise StudyError(f"{twice}: two cells are the same; leave one of them out")
    return cells


@attrs.frozen
class _Expansion:
    """Of one experiment and model."""

    study: Study
    place: Place
    model: Known
    name: str
    experiment: Experiment
    files: dict[str, list[Line]]  # what was read or drawn

    def cells(self) -> Iterator[Cell]:
        return getattr(self, f"_{self.experiment.kind}")()

    def _meshes(self) -> list[str]:
        meshes = self.experiment.meshes
        return meshes if isinstance(meshes, list) else self._along(meshes["axis"])

    def _mesh(self) -> str:
        mesh = self.experiment.mesh
        return mesh if isinstance(mesh, str) else self._along(mesh["axis"])[-1]

    @property
    def _followed(self) -> bool:
        """Whether the meshes are as many as there are devices: then nobody asked for one that the model cannot have."""
        return isinstance(self.experiment.meshes or self.experiment.mesh, Mapping)

    def _along(self, axis: str) -> list[str]:
        if self.place.here is None:
            raise StudyError("{axis: ...} counts the devices of one host; on a cluster say the meshes")
        sizes = [2**power for power in range(self.place.here.bit_length())]
        return ["stage=1" if size == 1 else f"{axis}={size}" for size in sizes]

    def _correctness(self) -> Iterator[Cell]:
        meshes, against = self._meshes(), self.experiment.against
        settings = {name: value for name, value in self._settings().items() if name not in (*RANDOM, "ignore_eos")}
        settings |= {"logprobs": LOGPROBS}
        lines = [{name: value for name, value in line.items() if name not in RANDOM} for line in self._lines()]
        how = {"lines": lines, "repeats": 1, "warm_up": False, "profile": False}
        if against == TRANSFORMERS:
            yield self._cell("transformers", "stage=1", settings, role="baseline", reference=True, **how)
        else:
            against = meshes[0] if against == FIRST else against
            yield self._cell(f"baseline-{_slug(against)}", against, settings, role="baseline", **how)
        for mesh in meshes:
            if mesh != against:
                yield self._cell(_slug(mesh), mesh, settings, **how)

    def _strong(self) -> Iterator[Cell]:
        for mesh in self._meshes():
            yield self._cell(_slug(mesh), mesh, self._settings())

    def _weak(self) -> Iterator[Cell]:
        for mesh in self._meshes():
            count = self.experiment.requests_per_device * prod(parse_mesh(mesh).values())
            yield self._cell(_slug(mesh), mesh, self._settings(), lines=self._lines(count))

    def _batch(self) -> Iterator[Cell]:
        mesh = self._mesh()
        for batch in self.experiment.batches:
            settings = self._settings() | {"max_batch": ceil(batch / parse_mesh(mesh)["data"])}  # of each data shard
            yield self._cell(f"b{batch}", mesh, settings, x={"batch": batch}, lines=self._lines(batch))

    def _optimization(self) -> Iterator[Cell]:
        mesh, first = self._mesh(), None
        for number in range(1, self.experiment.rounds + 1):
            x = {"round": number}
            a = self._cell(f"a-{number}", mesh, self._settings() | self.experiment.a, role="a", x=x)
            first = first or a
            yield a
            settings = self._settings() | self.experiment.b
            after = first if settings.get("stage_layers") == MEASURED else None
            if after and not first.profile:
                raise StudyError("b: stage_layers: measured needs the profile of a: leave profile: false out")
            yield self._cell(f"b-{number}", mesh, settings, role="b", x=x, after=after)

    def _grid(self) -> Iterator[Cell]:
        over = self.experiment.over
        for values in product(*over.values()):
            point = dict(zip(over, values))
            name = "-".join(f"{key}{_slug(value)}" for key, value in point.items())
            yield self._cell(name, self._mesh(), self._settings() | point, x=point)

    def _settings(self) -> dict[str, Any]:
        own = {} if self.experiment.kind == "correctness" else {"ignore_eos": True}
        return {**self.study.settings, **own, **(self.experiment.settings or {})}

    def _lines(self, count: int | None = None) -> list[Line]:
        prompts: Prompts = self.experiment.prompts or self.study.prompts
        if prompts.random is not None:
            count, vocabulary = count or prompts.random.count, self.model.config.vocab_size
            key = f"{vocabulary} {attrs.evolve(prompts.random, count=1)}"
            if len(self.files.get(key, ())) < count:
                self.files[key] = random_lines(prompts.random, count, vocabulary)
            return self.files[key][:count]
        key = repr(prompts)
        if key not in self.files:
            self.files[key] = read_lines(prompts)
        lines = self.files[key]
        return lines if count is None else as_many(lines, count)

    def _cell(
        self,
        point: str,
        mesh: str,
        settings: dict[str, Any],
        role: str = "point",
        x: Mapping[str, Any] = {},
        lines: list[Line] | None = None,
        repeats: int | None = None,
        warm_up: bool = True,
        profile: bool | None = None,
        reference: bool = False,
        after: Cell | None = None,
    ) -> Cell:
        experiment, study = self.experiment, self.study
        settings = {name: value for name, value in settings.items() if value is not None}
        check_settings(settings, measured=after is not None)
        lines = self._lines() if lines is None else lines
        if profile is None:
            wanted = study.profile if experiment.profile is None else experiment.profile
            profile = (wanted and experiment.kind != "grid") or experiment.profile is True
        repeats = repeats or experiment.repeats or study.repeats
        sizes = parse_mesh(mesh)
        devices = prod(sizes.values())
        seats, why, refused = None, "", False
        try:
            seats = Seats(1, 1) if reference else self.place.seats(devices)
            self._check_mesh(sizes, settings)
        except StudyError as error:
            why = str(error)
        except LayoutError as error:
            why, refused = str(error), not self._followed
        counts = self._counts(lines)
        if beyond := self._beyond_context(lines, counts, settings):
            why, refused = beyond, True
        identity = {
            "checkpoint": self.model.identity,
            "weights": "random" if self.model.declared.random_weights else "checkpoint",
            "prompts": hashed(encoded(lines)),
            "settings": settings,
            "mesh": mesh,
            "nodes": seats.nodes if seats else None,
            "device_kind": "cpu" if reference else self.place.device_kind,
            "code": reference_code() if reference else code(),
            "measured": {"repeats": repeats, "warm_up": warm_up, "profile": profile},
        }
        if reference:
            identity["against"] = f"transformers {version('transformers')}"
        if after is not None:
            identity["stage_layers of"] = after.hash
        whole_x = {"mesh": mesh, "devices": devices, "nodes": seats.nodes if seats else None}
        whole_x |= {"batch": None, "requests": len(lines), "round": None, **x}
        return Cell(
            experiment=self.name, kind=experiment.kind, name=f"{self.model.name}-{point}", role=role, x=whole_x,
            model=self.model, mesh=mesh, settings=settings, lines=lines, counts=counts, repeats=repeats,
            warm_up=warm_up, profile=profile, reference=reference, seats=seats, after=after, why=why, refused=refused,
            device_kind=identity["device_kind"], identity=identity, hash=hash_of(identity),
        )  # fmt: skip

    def _check_mesh(self, sizes: dict[str, int], settings: dict[str, Any]) -> None:
        """Raises LayoutError, as the engine would."""
        model, stages = self.model.config, sizes["stage"]
        check_model(model, sizes)
        layers = settings.get("stage_layers")
        if layers is None or str(layers).startswith(MEASURED):
            balance(model.num_layers, stages)
        else:
            text = ",".join(map(str, layers)) if isinstance(layers, list) else str(layers)
            parse_stage_layers(text, model.num_layers, stages)

    def _counts(self, lines: list[Line]) -> list[int] | None:
        if self.model.missing and not all("prompt_token_ids" in line for line in lines):
            return None
        return token_counts(lines, self.model.tokenizer, self.model.lengths)

    def _beyond_context(self, lines: list[Line], counts: list[int] | None, settings: dict[str, Any]) -> str:
        """The first prompt whose output the context would cut short, or ""."""
        sampling = {name: value for name, value in settings.items() if name in attrs.fields_dict(SamplingParams)}
        try:
            defaults = SamplingParams.from_dict(sampling)
            params = [params_of(line, defaults) for line in lines]
        except ValueError as error:
            raise StudyError(str(error)) from None
        longest = self.model.config.max_context
        context = min(settings.get("max_context") or longest, longest)
        for line, asked, tokens in zip(lines, params, counts or [0] * len(lines)):
            if (whole := tokens + asked.max_new_tokens) > context:
                whose = "max_context" if context < longest else "the model's context"
                return (
                    f"prompt {line['id']!r}: {tokens} tokens + {asked.max_new_tokens} new ones are {whole}, {whose} is "
                    f"{context}; legal: max_new_tokens up to {max(0, context - tokens)}"
                )
        return ""


def _slug(value: Any) -> str:
    """``stage=2,tensor=4`` as stage2-tensor4; any value as a piece of a file's name."""
    return re.sub(r"[^A-Za-z0-9._]+", "-", str(value).replace("=", "")).strip("-")
