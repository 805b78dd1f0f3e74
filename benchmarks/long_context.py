"""Decode with long contexts in the cache: the bytes that a step reads, over the time that it takes.

    python -m benchmarks.long_context --model llama-3.1-8b --batch 16 --context 32768 --json build/bench/long.json
    python -m benchmarks.long_context --model tiny --cpu-devices 1 --batch 2 --context 512 --new-tokens 32

All prompts are prefilled before the first decode step (prefill_ticks), and the clock starts when every sequence has an
eighth of its new tokens, with all programs compiled. Bytes are those of floor.py: weights and cached keys and values.
"""

import time
from statistics import median
from typing import Any

from benchmarks import floor
from benchmarks.common import benchmark, count, parser
from benchmarks.report import Row
from benchmarks.shapes import random_prompts

ALL_AT_ONCE = 2**30


def main() -> None:
    made = parser("long_context", __doc__)
    made.add_argument("--batch", type=count, default=16, metavar="N", help="sequences (default: 16)")
    made.add_argument(
        "--context", type=count, default=32768, metavar="N", help="prompt tokens of each (default: 32768)"
    )
    made.add_argument("--new-tokens", type=count, default=128, metavar="N", help="of each (default: 128)")
    args = made.parse_args()
    if args.new_tokens < 32:
        made.error(f"--new-tokens: found {args.new_tokens}, legal is at least 32: the first ones do not count")
    with benchmark("long_context", args) as bench:
        llm = bench.llm(max_batch=args.batch, max_context=args.context + args.new_tokens, prefill_ticks=ALL_AT_ONCE)
        prompts = random_prompts(bench.model.vocab_size, [args.context] * args.batch)
        began = time.perf_counter()
        points, prefilled = decode(llm, prompts, args.new_tokens)
        seconds, tokens = slope(points, args.new_tokens // 8)
        cached = args.context + tokens
        least = floor.step_seconds(bench.model, args.batch, cached, bench.item, bench.limits, bench.sizes)
        size = floor.step_bytes(bench.model, args.batch, cached, bench.item) / 1e9
        name = f"B={args.batch}, S={args.context}"
        rows = [
            Row(f"{name}, decode", "GB/s", size / seconds, size / least),
            Row(f"{name}, TPOT", "ms", seconds * 1e3, least * 1e3),
        ]
        bench.finish(rows, {"bytes_per_step": size * 1e9, "prefill_s": prefilled - began}, {})


def decode(llm: Any, prompts: list[list[int]], new_tokens: int) -> tuple[list[list[tuple[float, int]]], float]:
    """Per sequence, when it had how many tokens, while all were decoding; and when the last one began."""
    points: list[list[tuple[float, int]]] = [[] for _ in prompts]
    had, began, ended = [0] * len(prompts), 0.0, False
    for update in llm.stream(prompts, {"max_new_tokens": new_tokens, "ignore_eos": True}):
        now, place = time.perf_counter(), int(update.request_id)
        had[place] += len(update.token_ids)
        began = began or (now if min(had) > 0 else 0.0)
        if update.output is not None and update.output.error:
            raise ValueError(update.output.error)
        ended = ended or update.output is not None
        if began and not ended:
            points[place].append((now, had[place]))
    return points, began


def slope(points: list[list[tuple[float, int]]], skipped: int) -> tuple[float, float]:
    """Seconds per token, the median over the sequences, and the mean number of new tokens in that time.

    Raises:
      ValueError: a sequence with less than two points after `skipped` tokens.
    """
    rates, tokens = [], []
    for each in points:
        inside = [(now, had) for now, had in each if had > skipped]
        if len(inside) < 2:
            raise ValueError("new-tokens: too few for two points of every sequence; legal: more, or fewer decode_steps")
        (first, low), (last, high) = inside[0], inside[-1]
        rates.append((last - first) / (high - low))
        tokens.append((low + high) / 2)
    return median(rates), sum(tokens) / len(tokens)


if __name__ == "__main__":
    main()
