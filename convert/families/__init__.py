"""The families' tensor names at Hugging Face, a file for each."""

from convert.families import falcon, gpt2, llama, opt
from convert.target import Names, Targets
from jaxinfer.models import families
from jaxinfer.models.config import ModelConfig

_NAMES = {"falcon": falcon.names, "gpt2": gpt2.names, "llama": llama.names, "opt": opt.names}


def names(config: ModelConfig) -> Names:
    return _NAMES[families.family_name(config)](config)


def targets(config: ModelConfig) -> Targets:
    """Hugging Face tensor name to the leaves that it becomes, for every leaf of the model."""
    return names(config).targets(families.leaves(config))
