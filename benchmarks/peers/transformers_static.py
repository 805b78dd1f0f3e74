"""Latency of Hugging Face transformers: static key-value cache, decode compiled by torch (on a GPU into CUDA graphs).

    python -m benchmarks.peers.transformers_static --model llama-3.1-8b --batch 1,64
    python -m benchmarks.peers.transformers_static --model tiny --batch 1,4 --prompt-tokens 64 --new-tokens 32

The same prompts, counts and definitions as benchmarks.latency, and greedy too. The loop is as short as it can be: the
model's forward, the likeliest token, nothing else. Prefill runs uncompiled, for all prompts in one call.
"""

import time
from statistics import median
from typing import Any

import torch
from transformers import StaticCache

from benchmarks.common import count, numbers
from benchmarks.peers.model import finish, parser, random_model, synchronize
from benchmarks.report import Row
from benchmarks.shapes import random_prompts


def main() -> None:
    made = parser("transformers_static", __doc__)
    made.add_argument("--batch", type=numbers, default=[1, 64], metavar="N,N,...", help="batch sizes (default: 1,64)")
    made.add_argument("--prompt-tokens", type=count, default=512, metavar="N", help="(default: 512)")
    made.add_argument("--new-tokens", type=count, default=256, metavar="N", help="(default: 256)")
    made.add_argument("--repeats", type=count, default=3, metavar="N", help="runs that count (default: 3)")
    args = made.parse_args()
    model = random_model(args.model)
    compiled = model.device.type == "cuda"  # on a CPU torch would need a C++ compiler and a minute
    rows: list[Row] = []
    for batch in args.batch:
        runs = measure(model, batch, args.prompt_tokens, args.new_tokens, args.repeats, compiled)
        first, rest = (median(each) for each in zip(*runs))
        rows += [
            Row(f"TPOT, B={batch}", "ms", rest / (args.new_tokens - 1) * 1e3),
            Row(f"TTFT, B={batch}", "ms", first * 1e3),
            Row(f"output, B={batch}", "tokens/s", batch * args.new_tokens / (first + rest)),
        ]
    how = "static cache, decode by torch.compile with CUDA graphs" if compiled else "static cache, not compiled"
    finish(args, how, rows)


@torch.no_grad()
def measure(
    model: Any, batch: int, prompt_tokens: int, new_tokens: int, repeats: int, compiled: bool
) -> list[tuple[float, float]]:
    """Seconds to the first tokens and from there to the last, of each repeat."""
    cache = StaticCache(config=model.config, max_cache_len=prompt_tokens + new_tokens)

    def forward(tokens: torch.Tensor) -> torch.Tensor:
        out = model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1].argmax(-1, keepdim=True)

    torch._dynamo.reset()  # the graphs of another batch size hold its cache
    step = torch.compile(forward, mode="reduce-overhead", dynamic=False) if compiled else forward
    runs = []
    for seed in range(repeats + 1):
        prompts = random_prompts(model.config.vocab_size, [prompt_tokens] * batch, seed)
        tokens = torch.tensor(prompts, device=model.device)
        if seed:
            cache.reset()
        synchronize()
        began = time.perf_counter()
        token = forward(tokens)
        token.tolist()
        first = time.perf_counter()
        output = [token]
        for _ in range(new_tokens - 1):
            token = step(token).clone()  # the graph's own output is overwritten by its next run
            output.append(token)
        torch.cat(output, 1).tolist()
        runs.append((first - began, time.perf_counter() - first))
    return runs[1:]


if __name__ == "__main__":
    main()
