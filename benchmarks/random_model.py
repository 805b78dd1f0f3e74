"""A Hugging Face folder of true size with random weights, and prompts of random tokens: speed without a download.

    python benchmarks/random_model.py --shape openllama-3b --output HF_DIR --prompts 64 --prompt-tokens 512

Needs torch and transformers; makes the weights on the GPU where there is one.
"""

import argparse
import json
import random
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

SHAPES = {
    "openllama-3b": {
        "vocab_size": 32000,
        "hidden_size": 3200,
        "intermediate_size": 8640,
        "num_hidden_layers": 26,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
    },
    "llama-3.1-8b": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 8192,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, required=True)
    parser.add_argument("--output", type=Path, required=True, metavar="HF_DIR")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    config = LlamaConfig(**SHAPES[args.shape], bos_token_id=1, eos_token_id=2)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = LlamaForCausalLM(config)
    model.save_pretrained(args.output, max_shard_size="3GB")
    rng = random.Random(args.seed)
    with open(args.output / "prompts.jsonl", "w", encoding="utf-8") as file:
        for _ in range(args.prompts):
            tokens = [rng.randrange(3, config.vocab_size) for _ in range(args.prompt_tokens)]
            file.write(json.dumps({"prompt_token_ids": tokens}) + "\n")


if __name__ == "__main__":
    main()
