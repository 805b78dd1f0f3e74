"""Tiny Hugging Face model folders with random weights, made by transformers: what many tests start from."""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import (
    FalconConfig,
    FalconForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

FAMILIES = {
    "falcon": (FalconConfig, FalconForCausalLM),
    "gemma": (GemmaConfig, GemmaForCausalLM),
    "gemma2": (Gemma2Config, Gemma2ForCausalLM),
    "gpt2": (GPT2Config, GPT2LMHeadModel),
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "opt": (OPTConfig, OPTForCausalLM),
    "phi3": (Phi3Config, Phi3ForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}
# what a family calls LLaMA's fields, where transformers does not take LLaMA's names too
FIELDS = {
    "falcon": {"intermediate_size": "ffn_hidden_size", "num_key_value_heads": "num_kv_heads"},
    "gpt2": {"intermediate_size": "n_inner"},
    "opt": {"intermediate_size": "ffn_dim"},
}


def make_hf_folder(
    path: str | Path,
    family: str = "llama",
    dtype: str = "float32",
    *,
    max_shard_size: int | str = "5GB",
    format: str = "safetensors",
    seed: int = 0,
    **config_overrides: Any,
) -> torch.nn.Module:
    """Writes a folder with ``config.json`` and weights, without a tokenizer, and returns the torch model in eval mode.

    Every parameter is random, norms and biases too, so that a test sees each of them. `format` is ``safetensors`` or
    ``bin``; shards above `max_shard_size` bytes get an index. Overrides may be in LLaMA's names in all families.
    """
    config_class, model_class = FAMILIES[family]
    sizes: dict[str, Any] = {
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    renamed = FIELDS.get(family, {})
    config = config_class(**{renamed.get(name, name): value for name, value in {**sizes, **config_overrides}.items()})
    model = model_class(config).to(getattr(torch, dtype)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            scale = parameter.shape[-1] ** -0.5 if parameter.ndim == 2 else 0.2
            parameter.copy_(drawn * scale + (1.0 if "norm" in name or "ln_" in name else 0.0))
    model.save_pretrained(path, max_shard_size=max_shard_size)
    if format == "bin":
        _as_bin(Path(path))
    return model


def _as_bin(path: Path) -> None:
    from safetensors.torch import load_file

    for file in sorted(path.glob("*.safetensors")):
        name = file.name.replace("model", "pytorch_model", 1).replace(".safetensors", ".bin")
        torch.save(load_file(file), path / name)
        file.unlink()
    index = path / "model.safetensors.index.json"
    if index.exists():
        data = json.loads(index.read_text())
        names = data["weight_map"].items()
        data["weight_map"] = {
            key: file.replace("model", "pytorch_model", 1).replace(".safetensors", ".bin") for key, file in names
        }
        (path / "pytorch_model.bin.index.json").write_text(json.dumps(data))
        index.unlink()
