"""Models by their shapes: the presets of configs/models, or a ``config.json``."""

from pathlib import Path
from typing import Any

import numpy as np

from jaxinfer.json_text import read_object
from jaxinfer.models.config import ModelConfig
from jaxinfer.models.families import from_hf
from jaxinfer.presets import load_preset, names

NAMES = names()
FIRST_ORDINARY = 3  # below are the start and end tokens of most vocabularies


def hf_config(name: str) -> dict[str, Any]:
    """Of a preset, or of the ``config.json`` with that path.

    Raises:
      ValueError: neither, or not a JSON object.
    """
    if name in NAMES:
        return load_preset(name).config
    try:
        return read_object(Path(name))
    except OSError as error:
        raise ValueError(f"model: {name!r}: {error.strerror}; legal: {', '.join(NAMES)}, or a config.json") from error
    except ValueError as error:
        raise ValueError(f"model: {error}") from error


def model_config(name: str) -> ModelConfig:
    return from_hf(hf_config(name))


def dtype_of(name: str) -> str:
    """The preset's, or what the ``config.json`` gives (both of its spellings); bfloat16 if nothing."""
    if name in NAMES:
        return load_preset(name).dtype
    config = hf_config(name)
    return config.get("dtype") or config.get("torch_dtype") or "bfloat16"


def random_prompts(vocab_size: int, lengths: list[int], seed: int = 0) -> list[list[int]]:
    """A prompt of random tokens for each length; the same for the same seed."""
    draws = np.random.default_rng(seed)
    return [draws.integers(FIRST_ORDINARY, vocab_size, length).tolist() for length in lengths]
