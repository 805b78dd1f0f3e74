"""A checkpoint without weights, for ``load_format="dummy"``: the shape of a model is all that its speed needs."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from convert.plan import DTYPES
from convert.tensor import ConvertError
from jaxinfer.checkpoint.manifest import Manifest, write_manifest
from jaxinfer.presets import bare_manifest


def write_dummy(hf_config: Mapping[str, Any], folder: str | Path, dtype: str = "bfloat16") -> Manifest:
    """Writes a folder with a manifest alone, made if absent; `hf_config` is what a Hugging Face ``config.json`` holds.

    Raises:
      ConfigError: a config that cannot be run; ConvertError: a dtype that a checkpoint cannot have.
    """
    if dtype not in DTYPES:
        raise ConvertError(f"dtype: {dtype!r} is not supported; supported: {', '.join(DTYPES)}")
    manifest = bare_manifest(hf_config, dtype)
    Path(folder).mkdir(parents=True, exist_ok=True)
    write_manifest(folder, manifest)
    return manifest
