"""Prefill alone: until every prompt has its first token, and the rate of arithmetic that this is.

    python -m benchmarks.prefill --model llama-3.1-8b --prompts 64 --prompt-tokens 512 --json build/bench/prefill.json
    python -m benchmarks.prefill --model llama-3.1-8b --engine prefill_chunk=2048
    python -m benchmarks.prefill --model tiny --cpu-devices 1 --prompts 8 --prompt-tokens 64

The floor counts the layers for every prompt token, causal attention, and the head for the last token of each prompt, at
the matmul rate measured beside it. A first run, not counted, compiles the programs.
"""

from benchmarks import floor
from benchmarks.common import add_peer_option, benchmark, count, middle, parser, peer_first, run
from benchmarks.report import Row
from benchmarks.shapes import random_prompts

PEER = "transformers static"


def main() -> None:
    made = parser("prefill", __doc__)
    made.add_argument("--prompts", type=count, default=64, metavar="N", help="(default: 64)")
    made.add_argument("--prompt-tokens", type=count, default=512, metavar="N", help="of each prompt (default: 512)")
    made.add_argument("--repeats", type=count, default=3, metavar="N", help="runs that count (default: 3)")
    add_peer_option(made, PEER)
    args = made.parse_args()
    peer: dict[str, float] = {}
    notes: dict[str, str] = {}
    if args.peer:
        options = {"batch": args.prompts, "prompt-tokens": args.prompt_tokens, "new-tokens": 2, "repeats": args.repeats}
        found, notes = peer_first("prefill", args, "transformers_static", options)
        peer = {PEER: found[f"TTFT, B={args.prompts}"] / 1e3} if found else {}
    with benchmark("prefill", args) as bench:
        sizes = [args.prompt_tokens] * args.prompts
        llm = bench.llm(max_batch=args.prompts, max_context=args.prompt_tokens + 1)
        sets = [random_prompts(bench.model.vocab_size, sizes, seed) for seed in range(args.repeats + 1)]
        runs = [run(llm, prompts, 1) for prompts in sets][1:]
        seconds = middle(runs, lambda run: run.last_ttft)
        least = floor.prefill_seconds(bench.model, sizes, bench.limits, bench.sizes)
        flops = floor.prefill_flops(bench.model, sizes)
        name = f"{args.prompts} prompts of {args.prompt_tokens}"
        rows = [
            Row(f"{name}, all first tokens", "s", seconds, least, peers=peer),
            Row(f"{name}, arithmetic", "TFLOP/s", flops / seconds / 1e12, flops / least / 1e12),
            Row(f"{name}, prompts", "tokens/s", sum(sizes) / seconds, sum(sizes) / least),
        ]
        bench.finish(rows, {"flops": flops}, notes)


if __name__ == "__main__":
    main()
