"""Latency of a batch that is there at once: TPOT and TTFT by batch size.

    python -m benchmarks.latency --model llama-3.1-8b --batch 1,64 --json build/bench/latency.json
    python -m benchmarks.latency --model llama-3.1-8b --peer          # transformers in the same job, beside it
    python -m benchmarks.latency --model llama-2-70b --mesh tensor=8
    python -m benchmarks.latency --model tiny --cpu-devices 1 --batch 1,4 --prompt-tokens 64 --new-tokens 32

TPOT: from when every request of the batch has its first token to the end, over the new tokens but one: decode alone,
without the prompts of the others in between; the median over the repeats. What the requests themselves see is among the
details in the JSON file.
TTFT: until every request of the batch has its first token, the median over the repeats.
Greedy, end tokens ignored, prompts of random tokens. A first run, not counted, compiles the programs.
"""

from statistics import median
from typing import Any

from benchmarks import floor
from benchmarks.common import (
    Bench,
    Run,
    add_peer_option,
    benchmark,
    count,
    free_devices,
    middle,
    numbers,
    parser,
    peer_first,
    run,
)
from benchmarks.report import Row
from benchmarks.shapes import random_prompts

PEER = "transformers static"


def main() -> None:
    made = parser("latency", __doc__)
    made.add_argument("--batch", type=numbers, default=[1, 64], metavar="N,N,...", help="batch sizes (default: 1,64)")
    made.add_argument("--prompt-tokens", type=count, default=512, metavar="N", help="of each prompt (default: 512)")
    made.add_argument("--new-tokens", type=count, default=256, metavar="N", help="of each request (default: 256)")
    made.add_argument("--repeats", type=count, default=3, metavar="N", help="runs that count (default: 3)")
    add_peer_option(made, PEER)
    args = made.parse_args()
    if args.new_tokens < 2:
        made.error("--new-tokens: found 1, legal is at least 2 (TPOT leaves the first token out)")
    peer: dict[str, float] = {}
    notes: dict[str, str] = {}
    if args.peer:  # first, while this process holds nothing of the GPU
        options = {"batch": ",".join(map(str, args.batch)), "prompt-tokens": args.prompt_tokens}
        options |= {"new-tokens": args.new_tokens, "repeats": args.repeats}
        peer, notes = peer_first("latency", args, "transformers_static", options)
    with benchmark("latency", args) as bench:
        rows: list[Row] = []
        details: dict[str, Any] = {}
        for batch in args.batch:
            runs = measure(bench, batch)
            rows += figures(bench, batch, runs, peer)
            seen = {name: [each for run in runs for each in getattr(run, name)] for name in ("ttft", "tpot")}
            details[f"B={batch}"] = {f"{name}_p50_s": median(values) for name, values in seen.items()}
        bench.finish(rows, details, notes)


def measure(bench: Bench, batch: int) -> list[Run]:
    args = bench.args
    llm = bench.llm(max_batch=batch, max_context=args.prompt_tokens + args.new_tokens)
    sets = [
        random_prompts(bench.model.vocab_size, [args.prompt_tokens] * batch, seed) for seed in range(args.repeats + 1)
    ]
    runs = [run(llm, prompts, args.new_tokens) for prompts in sets]
    del llm
    free_devices()
    return runs[1:]


def figures(bench: Bench, batch: int, runs: list[Run], peer: dict[str, float]) -> list[Row]:
    args, place = bench.args, (bench.limits, bench.sizes)
    step = floor.step_seconds(bench.model, batch, args.prompt_tokens + args.new_tokens / 2, bench.item, *place)
    first = floor.prefill_seconds(bench.model, [args.prompt_tokens] * batch, *place)
    tpot = middle(runs, lambda run: (run.latency - run.last_ttft) / (args.new_tokens - 1))
    rate = middle(runs, lambda run: run.tokens / run.work)
    best = batch * args.new_tokens / (first + (args.new_tokens - 1) * step)

    def row(name: str, unit: str, value: float, least: float) -> Row:
        name = f"{name}, B={batch}"
        return Row(name, unit, value, least, peers={PEER: peer[name]} if name in peer else {})

    return [
        row("TPOT", "ms", tpot * 1e3, step * 1e3),
        row("TTFT", "ms", middle(runs, lambda run: run.last_ttft) * 1e3, first * 1e3),
        row("output", "tokens/s", rate, best),
    ]


if __name__ == "__main__":
    main()
