"""The study file (configs/studies/*.yaml): what it declares, checked as it is read."""

import re
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

import attrs
import yaml

from jaxinfer.checks import check as legal_is
from jaxinfer.parallel.axes import AXES, LayoutError, mesh_text, parse_mesh
from jaxinfer.study.errors import StudyError, shown, unknown
from jaxinfer.study.settings import check_settings

LARGEST = 1 << 20  # bytes of a study file
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
TRANSFORMERS, FIRST = "transformers", "first"
BESIDE = Path(__file__).parents[2]  # configs/ lies beside the package, installed too
FOLDER = BESIDE / "configs" / "studies"

# kind of experiment: the fields that it must have, and those that it may have beside COMMON
KINDS = {
    "correctness": (("meshes", "against"), ()),
    "strong": (("meshes",), ()),
    "weak": (("meshes", "requests_per_device"), ()),
    "batch": (("mesh", "batches"), ()),
    "optimization": (("mesh", "a", "b"), ("rounds",)),
    "grid": (("mesh", "over"), ()),
}
COMMON = ("kind", "models", "settings", "repeats", "profile", "prompts")


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and NAME.fullmatch(value) is not None


def _is_count(value: Any) -> bool:
    return type(value) is int and value > 0


def _field(legal: str, holds: Callable[[Any], bool], default: Any = attrs.NOTHING, help: str = "", **more: Any) -> Any:
    """One with a default may be null as well."""
    optional = default is not attrs.NOTHING
    validator = legal_is(legal, lambda value: (optional and value is default) or holds(value))
    return attrs.field(default=default, validator=validator, metadata={"help": help or legal}, **more)


def _text(default: Any = attrs.NOTHING, help: str = "") -> Any:
    return _field("a text", _is_text, default, help)


def _count(default: Any = attrs.NOTHING, help: str = "") -> Any:
    return _field("a whole number from 1", _is_count, default, help)


def _flag(default: bool | None, help: str = "") -> Any:
    return _field("true or false", lambda value: isinstance(value, bool), default, help)


def _names(default: Any = attrs.NOTHING) -> Any:
    what = "a list of names"
    return _field(what, lambda value: isinstance(value, list) and bool(value) and all(map(_is_name, value)), default)


def _is_counts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_is_count, value)) and len(set(value)) == len(value)


def read_mesh(value: Any) -> str:
    """A mesh in its one spelling: axes in order, those of size 1 left out.

    Raises:
      ValueError: no such mesh.
    """
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"found {shown(value)}, legal is a mesh: stage=2,tensor=4 say")
    return mesh_text(parse_mesh(value)) or "stage=1"


def _mesh(value: Any) -> Any:
    """A mesh, or {axis: stage}: the largest that the devices at hand make along it."""
    return _axis(value, "a mesh") if isinstance(value, dict) else value if value is None else read_mesh(value)


def _axis(value: dict[str, Any], what: str) -> dict[str, Any]:
    if list(value) != ["axis"] or value["axis"] not in AXES:
        raise ValueError(f"found {shown(value)}, legal is {what}, or {{axis: {' | '.join(AXES)}}}")
    return value


def _meshes(value: Any) -> Any:
    """A list of meshes, or {axis: stage}: powers of two along it, up to the devices at hand."""
    if value is None:
        return None
    if isinstance(value, dict):
        return _axis(value, "a list of meshes")
    if not isinstance(value, list) or not value:
        raise ValueError(f'found {shown(value)}, legal is a list of meshes: ["stage=1", "stage=2"] say')
    meshes = [read_mesh(each) for each in value]
    if twice := next((each for each in meshes if meshes.count(each) > 1), None):
        raise ValueError(f"{twice} is there twice")
    return meshes


def _against(value: Any) -> Any:
    return value if value in (None, TRANSFORMERS, FIRST) else read_mesh(value)


def _named(convert: Callable[[Any], Any]) -> Any:
    """A converter whose errors name the field."""

    def made(value: Any, field: attrs.Attribute) -> Any:
        try:
            return convert(value)
        except (ValueError, LayoutError) as error:
            raise ValueError(f"{field.name}: {error}") from None

    return attrs.Converter(made, takes_field=True)


@attrs.frozen(kw_only=True)
class Model:
    """A checkpoint, a preset with random weights, or a checkpoint that has to be a preset's model."""

    checkpoint: str | None = _text(None, "folder of python -m convert")
    preset: str | None = _text(None, "a model of configs/models")
    random_weights: bool = _flag(False, "weights made on the devices, none read")
    source: str | None = _text(None, "its Hugging Face folder, for against: transformers")

    def __attrs_post_init__(self) -> None:
        if self.checkpoint is None and not (self.preset and self.random_weights):
            raise ValueError("legal is checkpoint: FOLDER, or preset: NAME with random_weights: true")


@attrs.frozen(kw_only=True)
class RandomPrompts:
    count: int = _count(help="prompts")
    tokens: int = _count(help="token ids of each")
    seed: int = _field("a whole number from 0", lambda value: type(value) is int and value >= 0, 0)


@attrs.frozen(kw_only=True)
class Prompts:
    """A file of prompts as generate reads them, with its fields renamed; or token ids at random."""

    file: str | None = _text(None, "FILE.jsonl or FILE.txt")
    fields: dict[str, str] = _field(  # noqa: RUF009
        "NAME: FIELD pairs",
        lambda value: isinstance(value, dict) and all(_is_text(each) for pair in value.items() for each in pair),
        attrs.Factory(dict),
    )
    random: RandomPrompts | None = attrs.field(
        default=None,
        converter=_named(
            lambda value: value if isinstance(value, RandomPrompts | None) else build(RandomPrompts, value, "")
        ),
    )

    def __attrs_post_init__(self) -> None:
        if (self.file is None) == (self.random is None):
            raise ValueError("legal is file: FILE.jsonl, or random: {count: 64, tokens: 512}")


def _prompts(value: Any) -> Any:
    return value if isinstance(value, Prompts | None) else build(Prompts, value, "")


def _checked_settings(measured: bool = False) -> Callable[[Any], Any]:
    def convert(value: Any) -> Any:
        if value is not None:
            check_settings(value, measured)
        return value

    return convert


def _over(value: Any) -> Any:
    if value is None:
        return None
    if not isinstance(value, dict) or not value:
        raise ValueError(f"found {shown(value)}, legal are lines of SETTING: [VALUES]")
    for name, values in value.items():
        if not isinstance(values, list) or not values or any(values.count(each) > 1 for each in values):
            raise ValueError(f"{name}: found {shown(values)}, legal is a list of different values")
        for each in values:
            check_settings({name: each})
    return value


@attrs.frozen(kw_only=True)
class Experiment:
    """Which fields belong to which kind, `KINDS` says; settings, repeats, profile and prompts go over the study's."""

    kind: str = _field(" or ".join(KINDS), lambda value: value in KINDS)
    models: list[str] | None = _names(None)  # noqa: RUF009
    settings: dict[str, Any] | None = attrs.field(default=None, converter=_named(_checked_settings()))
    repeats: int | None = _count(None)
    profile: bool | None = _flag(None)
    prompts: Prompts | None = attrs.field(default=None, converter=_named(_prompts))
    mesh: Any = attrs.field(default=None, converter=_named(_mesh))
    meshes: Any = attrs.field(default=None, converter=_named(_meshes))
    against: str | None = attrs.field(default=None, converter=_named(_against))
    requests_per_device: int | None = _count(None)
    batches: list[int] | None = _field("a list of different whole numbers from 1", _is_counts, None)  # noqa: RUF009
    a: dict[str, Any] | None = attrs.field(default=None, converter=_named(_checked_settings()))
    b: dict[str, Any] | None = attrs.field(default=None, converter=_named(_checked_settings(measured=True)))
    rounds: int = _count(2)
    over: dict[str, list[Any]] | None = attrs.field(default=None, converter=_named(_over))


@attrs.frozen(kw_only=True)
class Study:
    """What a study file declares. Paths in it are relative to the working directory."""

    study: str = _field("letters, digits and '-'", lambda value: _is_name(value) and set(value).isdisjoint("._"))
    title: str = _text()
    question: str | None = _text(None)
    authors: list[str] = _field(  # noqa: RUF009
        "a list of texts", lambda value: isinstance(value, list) and all(map(_is_text, value)), attrs.Factory(list)
    )
    license: str | None = _text(None)
    models: dict[str, Model] = attrs.field(metadata={"help": "NAME: {checkpoint: FOLDER}"})
    prompts: Prompts = attrs.field(converter=_named(_prompts), metadata={"help": "{file: FILE.jsonl}"})
    cluster: str | None = _text(None, "a preset of configs/clusters, or a file")
    gpus_per_node: int | None = _count(None, "GPUs of each node to use (default: all)")
    cpu_devices: int | None = _count(None, "virtual CPU devices of this host")
    settings: dict[str, Any] = attrs.field(factory=dict, converter=_named(_checked_settings()))
    repeats: int = _count(3)
    profile: bool = _flag(True)
    experiments: dict[str, Experiment] = attrs.field(metadata={"help": "NAME: {kind: strong, meshes: [...]}"})


def build(kind: type, fields: Any, where: str) -> Any:
    """An attrs class of a file's fields; `where` they are, for messages: "experiments.strong." say.

    Raises:
      StudyError: an unknown or absent field, or an illegal value.
    """
    if not isinstance(fields, dict):
        raise StudyError(
            f"{where.rstrip('.') + ': ' if where else ''}found {shown(fields)}, legal are lines of FIELD: VALUE"
        )
    known = attrs.fields_dict(kind)
    for name in fields:
        if name not in known:
            raise StudyError(f"{where}{unknown('field', name, known)}")
    for name, field in known.items():
        if field.default is attrs.NOTHING and name not in fields:
            raise StudyError(f"{where}{name} is missing: {field.metadata['help']}")
    try:
        return kind(**fields)
    except ValueError as error:
        raise StudyError(f"{where}{error}") from None


def find_study(named: str) -> Path:
    """A study file by its path, or by its name in configs/studies.

    Raises:
      StudyError: neither.
    """
    path = beside(Path(named))
    if path.suffix or path.exists():
        return path
    known = sorted(each.stem for each in FOLDER.glob("*.yaml"))
    if named not in known:
        raise StudyError(f"{named}: no such file, and {unknown('study', named, known)}")
    return FOLDER / f"{named}.yaml"


def beside(path: Path) -> Path:
    """The path, from the working directory, or where nothing is there, from the folder that this package lies in."""
    return BESIDE / path if not path.exists() and (BESIDE / path).exists() else path


def with_prompts(study: Study, file: str) -> Study:
    """The study with these in place of every file of prompts; the names of `fields` stay, random ones too.

    Raises:
      StudyError: all its prompts are random.
    """
    mine = [study.prompts, *(each.prompts for each in study.experiments.values() if each.prompts)]
    if all(each.file is None for each in mine):
        raise StudyError("--prompts: the study's prompts are random token ids; legal with a file of prompts")

    def changed(prompts: Prompts | None) -> Prompts | None:
        return attrs.evolve(prompts, file=file) if prompts and prompts.file else prompts

    experiments = {name: attrs.evolve(it, prompts=changed(it.prompts)) for name, it in study.experiments.items()}
    return attrs.evolve(study, prompts=changed(study.prompts), experiments=experiments)


def read_study(path: Path) -> Study:
    """Raises StudyError, with the file's name."""
    try:
        with open(path, "rb") as file:
            data = file.read(LARGEST + 1)
    except OSError as error:
        raise StudyError(f"{path}: {error.strerror}") from None
    try:
        if len(data) > LARGEST:
            raise StudyError(f"longer than {LARGEST >> 20} MiB, which no study is")
        return _study(yaml.load(data.decode(), _Loader))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise StudyError(f"{path}: no YAML: {' '.join(str(error).split())}") from None
    except ValueError as error:
        raise StudyError(f"{path}: {error}") from None


def _study(fields: Any) -> Study:
    if not isinstance(fields, dict):
        raise StudyError(f"found {shown(fields)}, legal are lines of FIELD: VALUE")
    fields = dict(fields)
    for name, make in (("models", _model), ("experiments", _experiment)):
        if name not in fields:
            continue
        if not isinstance(fields[name], dict) or not fields[name]:
            raise StudyError(f"{name}: found {shown(fields[name])}, legal are lines of NAME: {{...}}")
        for each in fields[name]:
            if not _is_name(each):
                raise StudyError(f"{name}: found the name {shown(each)}, legal are letters, digits, '.', '_' and '-'")
        fields[name] = {each: make(each, value, f"{name}.{each}.") for each, value in fields[name].items()}
    study = build(Study, fields, "")
    for name, experiment in study.experiments.items():
        for model in experiment.models or ():
            if model not in study.models:
                raise StudyError(f"experiments.{name}.models: {unknown('model', model, study.models)}")
        if experiment.against == TRANSFORMERS:
            for model in experiment.models or study.models:
                if study.models[model].source is None:
                    what = "is missing: its Hugging Face folder, which against: transformers runs"
                    raise StudyError(f"models.{model}.source {what}")
    return study


def _model(name: str, fields: Any, where: str) -> Model:
    return build(Model, fields, where)


def _experiment(name: str, fields: Any, where: str) -> Experiment:
    if not isinstance(fields, dict):
        raise StudyError(f"{where.rstrip('.')}: found {shown(fields)}, legal are lines of FIELD: VALUE")
    fields = {"kind": name} | fields
    kind = fields["kind"]
    if not isinstance(kind, str) or kind not in KINDS:
        what = "the experiment's name, since kind is missing" if kind == name else "kind"
        raise StudyError(f"{where}kind: {unknown(f'kind of experiment ({what})', kind, KINDS)}")
    needed, optional = KINDS[kind]
    for field in fields:
        if field not in (*needed, *optional, *COMMON):
            legal = (*needed, *optional, *COMMON)
            raise StudyError(f"{where}{unknown(f'field of {kind}', field, legal)}")
    for field in needed:
        if fields.get(field) is None:
            raise StudyError(f"{where}{field} is missing, which {kind} needs")
    return build(Experiment, fields, where)


class _Loader(yaml.SafeLoader):
    """Refuses a name that is there twice: YAML would take the last one, and an experiment would be lost."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
        for name in names:
            if names.count(name) > 1:
                raise StudyError(f"line {node.start_mark.line + 1}: {name!r} is there twice")
        return super().construct_mapping(node, deep)
