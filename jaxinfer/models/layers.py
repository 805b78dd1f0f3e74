"""The families' layers."""

from jaxinfer.models import falcon, gpt2, llama, opt
from jaxinfer.models.block import Block
from jaxinfer.models.config import ModelConfig
from jaxinfer.models.families import family_name

LAYERS: dict[str, type[Block]] = {"falcon": falcon.Layer, "gpt2": gpt2.Layer, "llama": llama.Layer, "opt": opt.Layer}


def layer_class(config: ModelConfig) -> type[Block]:
    return LAYERS[family_name(config)]
