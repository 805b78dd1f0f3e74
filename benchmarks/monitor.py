"""What the monitor of GPUs costs a decode step: TPOT of one sequence without and with it, in turn.

    python -m benchmarks.monitor --model llama-3.1-8b --json build/bench/monitor.json
    python -m benchmarks.monitor --model openllama-3b --rounds 10

One process, one set of programs; each round is a run without and a run with the monitor, and every second round begins
with the other one. The cost is the mean over the rounds of with / without - 1, and beside it the interval in which that
mean lies with a probability of 95 % (Student's t). A look is one sample of one GPU: how long it takes, most of it in
the driver and without Python's lock, and its processor time.
"""

import math
import tempfile
import time
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

from benchmarks.common import Bench, benchmark, count, parser, run
from benchmarks.report import Row
from benchmarks.shapes import random_prompts
from jaxinfer.process.monitor import gpus_on
from jaxinfer.telemetry.gpus import nvml_runs
from jaxinfer.telemetry.monitor import Monitor
from jaxinfer.telemetry.nvml import Gpu
from jaxinfer.telemetry.rapl import Rapl
from jaxinfer.telemetry.samples import MEASURED

LOOKS = 50


def main() -> None:
    made = parser("monitor", __doc__)
    made.add_argument("--prompt-tokens", type=count, default=128, metavar="N", help="of the prompt (default: 128)")
    made.add_argument("--new-tokens", type=count, default=1024, metavar="N", help="of each run (default: 1024)")
    made.add_argument("--rounds", type=count, default=6, metavar="N", help="of two runs, at least 2 (default: 6)")
    args = made.parse_args()
    if args.rounds < 2 or args.new_tokens < 2:
        made.error("--rounds and --new-tokens: legal is at least 2")
    if not nvml_runs():
        made.error("found no NVML here: the monitor needs an NVIDIA GPU")
    with benchmark("monitor", args) as bench:
        gpus = [gpu for gpu in gpus_on(bench.sizes) if gpu is not None]
        if not gpus:
            raise ValueError("found no GPU of NVML's on the mesh: the monitor needs one")
        without, watched, told = measure(bench, gpus)
        ratios = [more / less - 1 for less, more in zip(without, watched)]
        half = student(len(ratios)) * stdev(ratios) / math.sqrt(len(ratios))
        rows = [
            Row("TPOT, B=1, without", "ms", median(without) * 1e3),
            Row("TPOT, B=1, with the monitor", "ms", median(watched) * 1e3),
            Row("cost", "%", mean(ratios) * 100),
            Row("a look", "ms", told["look_s"] * 1e3),
            Row("a look, processor time", "ms", told["processor_s"] * 1e3),
        ]
        interval = f"{(mean(ratios) - half) * 100:+.2f} % to {(mean(ratios) + half) * 100:+.2f} %"
        details = told | {"without_s": without, "with_s": watched, "cost": ratios}
        notes = {"cost, 95 % interval": interval, "what the card does not tell": ", ".join(told["lacks"]) or "nothing"}
        bench.finish(rows, details, notes)


def measure(bench: Bench, gpus: list[Gpu]) -> tuple[list[float], list[float], dict[str, Any]]:
    """Seconds per token of each round, without and with the monitor, and what a look takes."""
    args = bench.args
    llm = bench.llm(max_batch=1, max_context=args.prompt_tokens + args.new_tokens)
    prompts = random_prompts(bench.model.vocab_size, [args.prompt_tokens], 0)

    def tpot(watches: bool) -> float:
        with tempfile.TemporaryDirectory() as folder:
            monitor = None
            if watches:
                monitor = Monitor(gpus, Path(folder) / "part.csv", 0, "here", time.perf_counter(), Rapl())
            (found,) = run(llm, prompts, args.new_tokens).tpot
            if monitor is not None:
                monitor.stop()
                if monitor.failed is not None:
                    raise ValueError(f"the monitor failed: {monitor.failed}")
            return found

    tpot(True)  # compiles the programs
    found: dict[bool, list[float]] = {False: [], True: []}
    for place in range(args.rounds):
        for watches in (False, True) if place % 2 == 0 else (True, False):
            found[watches].append(tpot(watches))
    return found[False], found[True], look_seconds(gpus[0])


def look_seconds(gpu: Gpu) -> dict[str, Any]:
    """Wall and processor time of one look, with nothing else to do, and the cells that stay empty."""
    told: set[str] = set()
    began, worked = time.perf_counter(), time.thread_time()
    for _ in range(LOOKS):
        told |= {name for name, value in gpu.look(time.perf_counter()).items() if value is not None}
    seconds = {"look_s": (time.perf_counter() - began) / LOOKS, "processor_s": (time.thread_time() - worked) / LOOKS}
    return seconds | {"lacks": [name for name in MEASURED if name not in told]}


def student(count: int) -> float:
    """The 97.5 % point of Student's t for so many values."""
    table = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20, 2.18, 2.16, 2.14, 2.13)
    return table[count - 2] if count - 2 < len(table) else 2.1


if __name__ == "__main__":
    main()
