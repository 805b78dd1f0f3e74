"""The model that is asked about: a preset, a checkpoint, a Hugging Face folder or its config.json."""

from pathlib import Path
from typing import Any

import attrs

from jaxinfer.checkpoint.manifest import NAME, Manifest, read_manifest
from jaxinfer.engine.config import DTYPES
from jaxinfer.json_text import read_object
from jaxinfer.models.config import ModelConfig
from jaxinfer.presets import bare_manifest, load_preset


@attrs.frozen
class Source:
    """`checkpoint`: the folder with the weights, where there is one."""

    name: str
    manifest: Manifest
    checkpoint: Path | None = None

    @property
    def model(self) -> ModelConfig:
        return ModelConfig.from_json(self.manifest.model)

    @property
    def dtype(self) -> str:
        return self.manifest.dtype

    @property
    def parameters(self) -> int:
        return self.manifest.parameters


def read_source(preset: str | None, folder: Path | None, config: Path | None) -> Source:
    """Exactly one is given.

    Raises:
      ValueError, OSError: it is not there, or cannot be read or run.
    """
    if preset is not None:
        return Source(preset, load_preset(preset).manifest)
    if folder is not None and ((folder / NAME).exists() or not (folder / "config.json").exists()):
        return Source(str(folder), read_manifest(folder), folder)
    path = config or folder / "config.json"
    fields = read_object(path)
    return Source(str(config or folder), bare_manifest(fields, _dtype(fields)))


def _dtype(fields: dict[str, Any]) -> str:
    """As the config has it, in both of its spellings; bfloat16 if it has none that can be."""
    found = fields.get("dtype") or fields.get("torch_dtype")
    return found if found in DTYPES else "bfloat16"
