"""The families' layers."""

from jaxinfer.models import llama
from jaxinfer.models.block import Block
from jaxinfer.models.config import ModelConfig
from jaxinfer.models.families import family_name

LAYERS: dict[str, type[Block]] = {"llama": llama.Layer}


def layer_class(config: ModelConfig) -> type[Block]:
    return LAYERS[family_name(config)]
