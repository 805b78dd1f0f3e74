"""Model presets: published models by name, as data (configs/models/*.yaml)."""

import difflib
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import attrs
import yaml

from jaxinfer.checkpoint.manifest import Manifest
from jaxinfer.checks import check
from jaxinfer.engine.config import DTYPES
from jaxinfer.engine.costs import count_parameters
from jaxinfer.models.config import WHEN_TO_STOP, ConfigError, ModelConfig
from jaxinfer.models.families import from_hf
from jaxinfer.parallel.axes import parse_mesh

FOLDER = Path(__file__).parents[1] / "configs" / "models"


class PresetError(ValueError):
    """No such preset, a preset file that cannot be used, or a model that is not the preset's: says what is legal."""


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


COUNT = check("a whole number from 1", lambda value: type(value) is int and value > 0)
TEXT = check("a text", _is_text)
MAPPING = check("NAME: VALUE pairs", lambda value: isinstance(value, dict) and all(map(_is_text, value)))


@attrs.frozen
class Layout:
    """A mesh that holds the model with room for a cache, on so many GPUs."""

    gpus: int = attrs.field(validator=COUNT)
    mesh: str = attrs.field(validator=TEXT)

    def __attrs_post_init__(self) -> None:
        if prod(parse_mesh(self.mesh).values()) != self.gpus:
            raise ValueError(f"mesh: found {self.mesh!r}, legal is a mesh of {self.gpus} devices, as gpus says")


def _layouts(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    made = {}
    for gpu, fields in value.items():
        try:
            made[gpu] = _build(Layout, fields)
        except ValueError as error:
            raise ValueError(f"layouts: {gpu}: {error}") from None
    return made


@attrs.frozen(kw_only=True)
class Preset:
    """A published model.

    Attributes:
      repository: where its weights are at Hugging Face; None for a model that has none.
      parameters: how many numbers its weights hold, a tied head counted once.
      dtype: what it is usually run in, and what random weights are made in.
      layouts: GPU type to a mesh that holds it with a context of 4,096 tokens, or its longest, and not many times that;
        on T4 and V100, which have no bfloat16, in float16.
      config: the fields of its ``config.json`` that say what it is.
    """

    name: str
    repository: str | None = attrs.field(validator=check("a text or null", lambda it: it is None or _is_text(it)))
    licence: str = attrs.field(validator=TEXT)
    parameters: int = attrs.field(validator=COUNT)
    dtype: str = attrs.field(validator=check(" or ".join(DTYPES), lambda value: value in DTYPES))
    layouts: dict[str, Layout] = attrs.field(converter=_layouts, validator=MAPPING)
    config: dict[str, Any] = attrs.field(validator=MAPPING)

    @property
    def model(self) -> ModelConfig:
        """Raises ConfigError where this version cannot run its architecture."""
        try:
            return from_hf(self.config)
        except ConfigError as error:
            raise ConfigError(f"preset {self.name}: {error}") from error

    @property
    def manifest(self) -> Manifest:
        return bare_manifest(self.config, self.dtype)

    def check(self, what: str, model: ModelConfig, parameters: int) -> None:
        """Refuses a model that is not this one; `what` is where it came from, for the message.

        Raises:
          PresetError: lists every field that differs, with what was found and what is expected.
        """
        expected = self.model.to_json() | {"parameters": self.parameters}
        found = model.to_json() | {"parameters": parameters}
        differ = [name for name in expected if name not in WHEN_TO_STOP and found[name] != expected[name]]
        if differ:
            text = "; ".join(f"{name}: found {found[name]}, expected {expected[name]}" for name in differ)
            raise PresetError(f"{what}: not what preset {self.name} expects: {text}")

    def check_manifest(self, folder: str | Path, manifest: Manifest) -> None:
        """`check` of a converted checkpoint, by what its leaves hold."""
        counted = sum(prod(leaf["shape"]) for leaf in manifest.leaves.values())
        self.check(str(folder), ModelConfig.from_json(manifest.model), counted or manifest.parameters)


def names() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load_preset(name: str) -> Preset:
    """Reads ``configs/models/NAME.yaml``.

    Raises:
      PresetError: no preset of that name (with those that are near), or a file with an unknown or absent field or an
        illegal value (with file and field).
    """
    known = names()
    if name not in known:
        if name.lower().startswith(("evo2", "evo-2")):
            what = "is no transformer (StripedHyena 2: 8 attention layers, 42 convolution layers)"
            raise PresetError(f"preset: {name} {what}: jaxinfer cannot run it yet; legal: {', '.join(known)}")
        near = difflib.get_close_matches(name.lower(), known, 3)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise PresetError(f"preset: unknown {name!r}; {hint}legal: {', '.join(known)}")
    path = FOLDER / f"{name}.yaml"
    try:
        return _build(Preset, yaml.safe_load(path.read_text("utf-8")), name=name)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise PresetError(f"{path}: no YAML: {' '.join(str(error).split())}") from None
    except ValueError as error:
        raise PresetError(f"{path}: {error}") from None


def _build(kind: type, fields: Any, **more: Any) -> Any:
    if not isinstance(fields, dict):
        raise ValueError(f"found {fields!r}, legal are lines of FIELD: VALUE")
    known = [field for field in attrs.fields_dict(kind) if field not in more]
    for name in fields:
        if name not in known:
            raise ValueError(f"unknown field {name!r}; legal: {', '.join(known)}")
    for name in known:
        if name not in fields:
            raise ValueError(f"{name} is missing")
    return kind(**fields, **more)


def bare_manifest(hf_config: Mapping[str, Any], dtype: str) -> Manifest:
    """Of a checkpoint without weights: all that random ones need. `hf_config` is what a ``config.json`` holds.

    Raises:
      ConfigError: a config that cannot be run.
    """
    model = from_hf(dict(hf_config))
    return Manifest(
        model=model.to_json(),
        dtype=dtype,
        quantization=None,
        leaves={},
        files={},
        tokenizer=[],
        sources={},
        converter="",
        parameters=count_parameters(model),
    )
