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
    """What the model is by architectures, or where that is absent by model_type, which transformers goes by."""
    names, model_type = hf.get("architectures") or [], hf.get("model_type")
    if not isinstance(names, list) or not isinstance((names or [""])[0], str):
        raise ConfigError(f"architectures: expected a list such as ['LlamaForCausalLM'], found {names!r}")
    if not isinstance(model_type, str | None):
        raise ConfigError(f"model_type: expected a name such as 'llama', found {model_type!r}")
    for name in (*names[:1], str(model_type)):
        if name.lower().replace("_", "").startswith(("evo2", "stripedhyena")):
            raise ConfigError(f"architectures: {name!r} is not supported: {EVO2}")
    if names[:1] == ["RWForCausalLM"]:
        raise ConfigError(f"architectures: {falcon.OLD}")
    if not names:
        by_type = {kind: name for each in FAMILIES for name, kinds in each.ARCHITECTURES.items() for kind in kinds}
        if model_type is not None and model_type not in by_type:
            raise ConfigError(f"model_type: {model_type!r} is not supported; supported: {', '.join(by_type)}")
        names = [by_type.get(model_type, "(none)")]
    kinds = family(names[0]).ARCHITECTURES[names[0]]
    if model_type is not None and model_type not in kinds:
        raise ConfigError(
            f"model_type: {model_type!r} is not that of architectures {names[0]!r}, which is {' or '.join(kinds)}: "
            "correct the one that is wrong (transformers goes by model_type)"
        )
    return names[0]


def from_hf(hf: dict[str, Any], generation: dict[str, Any] | None = None) -> ModelConfig:
    """Reads a Hugging Face ``config.json`` (the transformers 4 and 5 spellings of rope) as transformers would.

    generation: ``generation_config.json``, whose end and start tokens, where given, are the ones that count.

    Raises:
      ConfigError: an architecture, activation or rope kind that is not supported, a missing field or an illegal value,
        a model_type that contradicts the architecture.
    """
    architecture = _architecture(hf)
    if overrides := hf.get("per_layer_config"):
        raise ConfigError(f"per_layer_config: {overrides!r} is not supported: all layers have the same fields")
    return family(architecture).read(hf | {"architectures": [architecture]}, generation or {})


def leaves(config: ModelConfig) -> Table:
    """Leaf name to `Leaf`, for the whole model."""
    layer = family(config.architecture).layer_leaves(config)
    layers = {f"layers.{index}.{name}": leaf for index in range(config.num_layers) for name, leaf in layer.items()}
    return end_leaves(config) | layers
