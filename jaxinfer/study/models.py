"""The models of a study: what is known of each before any cell runs."""

from functools import cached_property
from pathlib import Path
from typing import Any

import attrs
import xxhash

from jaxinfer.checkpoint.manifest import NAME, Manifest, read_manifest
from jaxinfer.checkpoint.verify import identity
from jaxinfer.models.config import ModelConfig
from jaxinfer.presets import load_preset
from jaxinfer.study.errors import StudyError
from jaxinfer.study.file import Model
from jaxinfer.tokenizer import load_tokenizer


@attrs.define(eq=False)
class Known:
    """`missing`: the checkpoint is not there yet, and all is known by its preset."""

    name: str
    declared: Model
    manifest: Manifest
    missing: bool
    lengths: dict[str, int] = attrs.field(factory=dict)  # of prompts that were tokenized once

    @cached_property
    def config(self) -> ModelConfig:
        return ModelConfig.from_json(self.manifest.model)

    @cached_property
    def identity(self) -> str:
        folder = None if self.missing or self.declared.checkpoint is None else self.declared.checkpoint
        return xxhash.xxh3_64_hexdigest(identity(self.manifest, folder))

    @cached_property
    def tokenizer(self) -> Any:
        return None if self.missing or not self.declared.checkpoint else load_tokenizer(self.declared.checkpoint)


def know(name: str, declared: Model, needed: bool) -> Known:
    """`needed`: the checkpoint has to be there.

    Raises:
      StudyError: no such checkpoint or preset, or a checkpoint that is not the preset's model.
    """
    try:
        preset = None if declared.preset is None else load_preset(declared.preset)
        if declared.checkpoint is None:
            return Known(name, declared, preset.manifest, False)
        if preset is not None and not needed and not (Path(declared.checkpoint) / NAME).exists():
            return Known(name, declared, preset.manifest, True)
        manifest = read_manifest(declared.checkpoint)
        if preset is not None:
            preset.check_manifest(declared.checkpoint, manifest)
        return Known(name, declared, manifest, False)
    except (ValueError, OSError) as error:
        hint = ""
        if declared.checkpoint is not None and not Path(declared.checkpoint).is_dir():
            source = declared.source or "HUGGING_FACE_FOLDER"
            hint = f"; python -m convert --source {source} --output {declared.checkpoint} makes it"
        raise StudyError(f"models.{name}: {error}{hint}") from None
