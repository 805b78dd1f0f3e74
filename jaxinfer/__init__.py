"""Large language model inference over many GPUs, in JAX: ``from jaxinfer import LLM, SamplingParams``."""

import importlib
from typing import Any

__version__ = "0.1.0"
__all__ = ["LLM", "SamplingParams"]

_HOMES = {"LLM": "jaxinfer.llm", "SamplingParams": "jaxinfer.engine.params"}


def __getattr__(name: str) -> Any:
    # importing jax here would fix its platform and device count before a command has chosen them
    if name not in _HOMES:
        raise AttributeError(f"module 'jaxinfer' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(_HOMES[name]), name)
