"""Throughput of an offline run: many requests of mixed lengths, all there from the start.

    python -m benchmarks.throughput --model llama-3.1-8b --json build/bench/throughput.json
    python -m benchmarks.throughput --model llama-3.1-8b --peer        # transformers in the same job, beside it
    python -m benchmarks.throughput --model llama-2-70b --mesh stage=8 --max-batch 512 --requests 2048
    python -m benchmarks.throughput --model tiny --cpu-devices 1 --requests 32 --prompt-range 16:64 --new-tokens 16

Prompt lengths are drawn evenly from the range, always the same ones. A first run, not counted, compiles the
programs. The floor is prefill at the matmul rate, then decode in full batches at copy bandwidth.
"""

import argparse
from dataclasses import asdict
from statistics import median

import numpy as np

from benchmarks import floor
from benchmarks.common import add_peer_option, benchmark, count, parser, peer_first, run
from benchmarks.report import Row
from benchmarks.shapes import random_prompts

PEER = "transformers batching"


def span(text: str) -> tuple[int, int]:
    low, _, high = text.partition(":")
    if not (low.isdigit() and high.isdigit() and 1 <= int(low) <= int(high)):
        raise argparse.ArgumentTypeError(f"found {text!r}, legal is LOW:HIGH, 128:1024 say")
    return int(low), int(high)


def lengths(requests: int, limits: tuple[int, int]) -> list[int]:
    """Tokens of each prompt, drawn evenly from the range, both ends included."""
    return np.random.default_rng(0).integers(*limits, requests, endpoint=True).tolist()


def main() -> None:
    made = parser("throughput", __doc__)
    made.add_argument("--requests", type=count, default=1024, metavar="N", help="(default: 1024)")
    what = "prompt tokens (default: 128:1024)"
    made.add_argument("--prompt-range", type=span, default=(128, 1024), metavar="LOW:HIGH", help=what)
    made.add_argument("--new-tokens", type=count, default=256, metavar="N", help="of each request (default: 256)")
    what = "requests that are in work at once, per data shard, at most (default: the engine's)"
    made.add_argument("--max-batch", type=count, metavar="N", help=what)
    add_peer_option(made, PEER)
    args = made.parse_args()
    peer: dict[str, float] = {}
    notes: dict[str, str] = {}
    if args.peer:
        options = {"requests": args.requests, "prompt-range": "{}:{}".format(*args.prompt_range)}
        options["new-tokens"] = args.new_tokens
        peer, notes = peer_first("throughput", args, "transformers_batching", options)
    with benchmark("throughput", args) as bench:
        sizes = lengths(args.requests, args.prompt_range)
        prompts = random_prompts(bench.model.vocab_size, sizes)
        llm = bench.llm(max_batch=args.max_batch, max_context=args.prompt_range[1] + args.new_tokens)
        run(llm, prompts, args.new_tokens)  # so that every program is there
        before = asdict(llm.engine.stats)
        done = run(llm, prompts, args.new_tokens)
        stats = {name: value - before[name] for name, value in asdict(llm.engine.stats).items()}
        best = floor.offline_seconds(
            bench.model, sizes, args.new_tokens, llm.engine.config.max_batch, bench.item, bench.limits, bench.sizes
        )

        def row(name: str, unit: str, work: float) -> Row:
            return Row(name, unit, work / done.work, work / best, peers={PEER: peer[name]} if name in peer else {})

        rows = [
            row("output", "tokens/s", done.tokens),
            row("prompts and output", "tokens/s", sum(sizes) + done.tokens),
            row("requests", "requests/s", args.requests),
        ]
        details = {"seconds": done.work, "ttft_p50_s": median(done.ttft), "engine": stats}
        details["tpot_p50_s"] = median(done.tpot) if done.tpot else None
        if bench.sizes["stage"] > 1 and stats["steady_stage_ticks"]:
            bubble = stats["steady_idle_stage_ticks"] / stats["steady_stage_ticks"]
            rows.append(Row("bubble in steady decode", "%", bubble * 100))
        if stats["compiled_programs"]:
            notes["compiled inside the measured run"] = f"{stats['compile_seconds']:.1f} s"
        bench.finish(rows, details, notes)


if __name__ == "__main__":
    main()
