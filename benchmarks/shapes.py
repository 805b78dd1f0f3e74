"""Models by their shapes: Hugging Face configs in configs/models, and a checkpoint folder of one without weights."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from jaxinfer.models.config import ModelConfig, from_hf

FOLDER = Path(__file__).parents[1] / "configs" / "models"
NAMES = sorted(path.stem for path in FOLDER.glob("*.json"))
FIRST_ORDINARY = 3  # below are the start and end tokens of most vocabularies


def hf_config(name: str) -> dict[str, Any]:
    """A name in configs/models, or the path of a ``config.json``.

    Raises:
      ValueError: neither, or not JSON.
    """
    path = FOLDER / f"{name}.json" if name in NAMES else Path(name)
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise ValueError(f"model: {name!r}: {error.strerror}; legal: {', '.join(NAMES)}, or a config.json") from error
    except ValueError as error:
        raise ValueError(f"model: {path} is not JSON: {error}") from error


def model_config(name: str) -> ModelConfig:
    return from_hf(hf_config(name))


def dtype_of(name: str) -> str:
    """The dtype that the config gives (both of its spellings); bfloat16 if none."""
    config = hf_config(name)
    return config.get("dtype") or config.get("torch_dtype") or "bfloat16"


def random_prompts(vocab_size: int, lengths: list[int], seed: int = 0) -> list[list[int]]:
    """A prompt of random tokens for each length; the same for the same seed."""
    draws = np.random.default_rng(seed)
    return [draws.integers(FIRST_ORDINARY, vocab_size, length).tolist() for length in lengths]
