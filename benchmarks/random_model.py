"""A Hugging Face folder of true size with random weights, and prompts of random tokens: speed without a download.

    python -m benchmarks.random_model --shape openllama-3b --output HF_DIR --prompts 64 --prompt-tokens 512

Needs torch and transformers; makes the weights on the GPU where there is one.
"""

import argparse
import json
from pathlib import Path

from benchmarks.peers.model import random_model
from benchmarks.shapes import NAMES, random_prompts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=NAMES, required=True)
    parser.add_argument("--output", type=Path, required=True, metavar="HF_DIR")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    model = random_model(args.shape, args.seed)
    model.save_pretrained(args.output, max_shard_size="3GB")
    prompts = random_prompts(model.config.vocab_size, [args.prompt_tokens] * args.prompts, args.seed)
    lines = [json.dumps({"prompt_token_ids": prompt}) + "\n" for prompt in prompts]
    (args.output / "prompts.jsonl").write_text("".join(lines))


if __name__ == "__main__":
    main()
