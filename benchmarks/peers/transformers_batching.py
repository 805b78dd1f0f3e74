"""Throughput of Hugging Face transformers with its continuous batching: a paged cache, requests that come and go.

    python -m benchmarks.peers.transformers_batching --model llama-3.1-8b --requests 1024
    python -m benchmarks.peers.transformers_batching --model tiny --requests 16 --prompt-range 16:64 --new-tokens 16

The same prompts and counts as benchmarks.throughput, greedy. Its own settings: batch and cache are sized by the library
from what memory is left, and graphs are captured before the clock starts.
"""

import time
from typing import Any

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.generation.continuous_batching.utils import WorkloadHints

from benchmarks.common import count
from benchmarks.peers.model import finish, parser, random_model, synchronize
from benchmarks.report import Row
from benchmarks.shapes import random_prompts
from benchmarks.throughput import lengths, span

WARM_REQUESTS = 8
CPU_BLOCKS = 64
CPU_BATCH_TOKENS = 512


def main() -> None:
    made = parser("transformers_batching", __doc__)
    made.add_argument("--requests", type=count, default=1024, metavar="N", help="(default: 1024)")
    made.add_argument("--prompt-range", type=span, default=(128, 1024), metavar="LOW:HIGH", help="(default: 128:1024)")
    made.add_argument("--new-tokens", type=count, default=256, metavar="N", help="(default: 256)")
    args = made.parse_args()
    model = random_model(args.model)
    sizes = lengths(args.requests, args.prompt_range)
    seconds = measure(model, random_prompts(model.config.vocab_size, sizes), args.new_tokens)
    output = args.requests * args.new_tokens
    rows = [
        Row("output", "tokens/s", output / seconds),
        Row("prompts and output", "tokens/s", (sum(sizes) + output) / seconds),
        Row("requests", "requests/s", args.requests / seconds),
    ]
    finish(args, f"continuous batching, {model.config._attn_implementation} attention", rows)


@torch.no_grad()
def measure(model: Any, prompts: list[list[int]], new_tokens: int) -> float:
    """Seconds from the first request that goes in to the last that comes out."""
    config = GenerationConfig(max_new_tokens=new_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0)
    hints = WorkloadHints(max(map(len, prompts)), new_tokens, len(prompts))
    # on a CPU it would take nearly all of the host's memory, and fill it with zeros
    sizes = {"num_blocks": CPU_BLOCKS, "max_batch_tokens": CPU_BATCH_TOKENS} if model.device.type == "cpu" else {}
    own = ContinuousBatchingConfig(**sizes)
    with model.continuous_batching_context_manager(
        config, continuous_batching_config=own, workload_hints=hints
    ) as manager:
        finish_all(manager, prompts[:WARM_REQUESTS], new_tokens)
        synchronize()
        began = time.perf_counter()
        finish_all(manager, prompts, new_tokens)
        return time.perf_counter() - began


def finish_all(manager: Any, prompts: list[list[int]], new_tokens: int) -> None:
    manager.add_requests(inputs=prompts, max_new_tokens=new_tokens)
    left = len(prompts)
    while left:
        result = manager.get_result(timeout=1)
        if result is None:
            if not manager.is_running():
                raise RuntimeError("its generation thread ended before the requests did")
        elif result.is_finished():
            if result.error is not None or len(result.generated_tokens) != new_tokens:
                raise RuntimeError(f"a request ended early: {result.error or len(result.generated_tokens)}")
            left -= 1


if __name__ == "__main__":
    main()
