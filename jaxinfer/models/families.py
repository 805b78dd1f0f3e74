"""The families that there are, and what depends on which one a model is of."""

from types import ModuleType
from typing import Any

from jaxinfer.models.config import ConfigError, ModelConfig
from jaxinfer.models.configs import falcon, gpt2, llama, opt
from jaxinfer.models.leaves import Table, end_leaves

FAMILIES = (llama, falcon, gpt2, opt)
EVO2 = "most layers of Evo2 are convolutions (StripedHyena 2), which jaxinfer cannot run yet"


def family(architecture: str) -> ModuleType:
    """The module of `jaxinfer.models.configs` that describes it.

    Raises:
      ConfigError: there is none; lists the architectures that there are.
    """
    for each in FAMILIES:
        if architecture in each.ARCHITECTURES:
            return each
    supported = ", ".join(name for each in FAMILIES for name in each.ARCHITECTURES)
    raise ConfigError(f"architectures: {architecture!r} is not supported; supported: {supported}")


def family_name(config: ModelConfig) -> str:
    """The name of the family's files."""
    return family(config.architecture).__name__.rpartition(".")[2]


def _architecture(hf: dict[str, Any]) -> str:
    names = hf.get("architectures") or ["(none)"]
    if not isinstance(names, list) or not isinstance(names[0], str):
        raise ConfigError(f"architectures: expected a list such as ['LlamaForCausalLM'], found {names!r}")
    return names[0]


def from_hf(hf: dict[str, Any], generation: dict[str, Any] | None = None) -> ModelConfig:
    """Reads a Hugging Face ``config.json`` (the transformers 4 and 5 spellings of rope) as transformers would.

    generation: ``generation_config.json``, whose end and start tokens, where given, are the ones that count.

    Raises:
      ConfigError: an architecture, activation or rope kind that is not supported, a missing field or an illegal value.
    """
    architecture = _architecture(hf)
    for name in (architecture, str(hf.get("model_type"))):
        if name.lower().replace("_", "").startswith(("evo2", "stripedhyena")):
            raise ConfigError(f"architectures: {name!r} is not supported: {EVO2}")
    if architecture == "RWForCausalLM":
        raise ConfigError(f"architectures: {falcon.OLD}")
    if overrides := hf.get("per_layer_config"):
        raise ConfigError(f"per_layer_config: {overrides!r} is not supported: all layers have the same fields")
    return family(architecture).read(hf, generation or {})


def leaves(config: ModelConfig) -> Table:
    """Leaf name to `Leaf`, for the whole model."""
    layer = family(config.architecture).layer_leaves(config)
    layers = {f"layers.{index}.{name}": leaf for index in range(config.num_layers) for name, leaf in layer.items()}
    return end_leaves(config) | layers
