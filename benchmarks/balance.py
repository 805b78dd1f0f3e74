"""Whether a cut by measured layers gains what is predicted: a poor cut is traced, the measured one runs beside it.

    python -m benchmarks.balance --model llama-3.1-8b --mesh stage=2 --cut 20,12 --json build/bench/balance.json
    for i in 0 1; do taskset -c $i python -m benchmarks.balance --model tests/data/balance.json --mesh stage=2 \\
      --cut 5,1 --batch 8 --prompt-tokens 16 --new-tokens 40 --engine dtype=float32 --cpu-devices 1 \\
      --coordinator localhost:9876 --num-processes 2 --process-id $i & done; wait

Both cuts hold their weights at the same time and run in turn, so that what changes on the machine meanwhile meets both.
A step: seconds of decode over decode steps, the median over the rounds; the gain is the median of the rounds'
differences. Virtual CPU devices of one process share its cores, and one that waits lends its core to the others, so
that no cut is better than another: there, a stage is a process on a core of its own, as in the second command.
Batches of more than 4 rows per stage, since one launch does all layers of fewer (then no layer has a time).
"""

from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.common import Bench, benchmark, count, parser
from benchmarks.report import Row
from benchmarks.shapes import random_prompts

TRACED = 8  # dispatches


def main() -> None:
    made = parser("balance", __doc__)
    made.add_argument("--cut", required=True, metavar="N,N,...", help="layers per stage to begin with, 20,12 say")
    made.add_argument("--batch", type=count, default=64, metavar="N", help="requests at once (default: 64)")
    made.add_argument("--prompt-tokens", type=count, default=512, metavar="N", help="of each prompt (default: 512)")
    made.add_argument("--new-tokens", type=count, default=256, metavar="N", help="of each request (default: 256)")
    made.add_argument("--rounds", type=count, default=5, metavar="N", help="of both cuts (default: 5)")
    what = "keep the trace and what it says (profile.json) there"
    made.add_argument("--profile", type=Path, metavar="DIR", help=what)
    args = made.parse_args()
    with benchmark("balance", args) as bench:
        found = compare(bench)
        steps, gains = found["steps_ms"], found["gains_ms"]
        cuts = {name: ",".join(map(str, found[name])) for name in ("given", "measured")}
        rows = [Row(f"step, {cuts[name]}", "ms", median(steps[name])) for name in ("given", "measured")]
        rows.append(Row("gain, predicted", "ms", found["predicted_gain_ms"]))
        rows.append(Row("gain, measured", "ms", median(gains)))
        apart = abs(found["predicted_gain_ms"] - median(gains)) / median(steps["given"])
        rows.append(Row("predicted and measured apart, of a step", "%", apart * 100))
        imbalance = {"imbalance, traced": f"{found['profile']['imbalance']['decode']:.1%}"}
        bench.finish(rows, found, {"gains of the rounds": ", ".join(f"{each:.3f}" for each in gains)} | imbalance)


def compare(bench: Bench) -> dict[str, Any]:
    """Step times of both cuts by round, the gain of each round and the predicted one, in ms, and the profile.

    Raises:
      ValueError: a cut that cannot be, or a trace without times of layers.
    """
    from jaxinfer.checkpoint.files import write_json
    from jaxinfer.engine.cut import choose_cut

    llm = model(bench, bench.args.cut)
    dispatches = decode(bench, llm, 0)[1]  # compiles
    profile = trace(bench, llm, dispatches)
    path = folder(bench) / "profile.json"
    write_json(path, profile)
    cut = choose_cut(f"measured:{path}", llm.engine.manifest.model, bench.sizes, llm.engine.dtype.name)
    assert cut.source is not None
    llms = {"given": llm, "measured": model(bench, ",".join(map(str, cut.stage_layers)))}
    decode(bench, llms["measured"], 0)
    steps: dict[str, list[float]] = {name: [] for name in llms}
    for seed in range(bench.args.rounds):
        for name, each in llms.items():
            steps[name].append(decode(bench, each, 1 + seed)[0])
    return {
        "given": llm.engine.stage_layers,
        "measured": cut.stage_layers,
        "steps_ms": steps,
        "gains_ms": [before - after for before, after in zip(steps["given"], steps["measured"], strict=True)],
        "predicted_gain_ms": cut.source["predicted_gain_ms"],
        "profile": profile,
    }


def folder(bench: Bench) -> Path:
    return bench.args.profile or bench.folder


def model(bench: Bench, cut: str) -> Any:
    """With a cache for these requests alone: two models share the devices."""
    args, page = bench.args, 16
    longest = args.prompt_tokens + args.new_tokens
    pages = 2 + args.batch * -(-longest // page)
    return bench.llm(stage_layers=cut, max_batch=args.batch, max_context=longest, page_size=page, pages=pages)


def decode(bench: Bench, llm: Any, seed: int, before: Callable[[int], object] | None = None) -> tuple[float, int]:
    """Runs the requests; milliseconds per decode step, and how many dispatches there were. `before` is told the number
    of each dispatch ahead of it."""
    from jaxinfer.engine.params import SamplingParams
    from jaxinfer.engine.request import Request

    args, engine = bench.args, llm.engine
    params = SamplingParams(max_new_tokens=args.new_tokens, ignore_eos=True)
    for name, prompt in enumerate(random_prompts(bench.model.vocab_size, [args.prompt_tokens] * args.batch, seed)):
        engine.add(Request(str(name), prompt, params))
    seconds, blocks, began = engine.stats.decode_seconds, engine.stats.decode_dispatches, engine.steps
    while engine.has_unfinished():
        if before is not None:
            before(engine.steps - began)
        engine.step()
    steps = (engine.stats.decode_dispatches - blocks) * engine.config.decode_steps
    return (engine.stats.decode_seconds - seconds) * 1e3 / steps, engine.steps - began


def trace(bench: Bench, llm: Any, dispatches: int) -> dict[str, Any]:
    """The profile of some of the last dispatches but a few, which are all decode."""
    import jax

    from jaxinfer.cluster import distributed
    from jaxinfer.profiled import head
    from jaxinfer.telemetry.devices import own_devices
    from jaxinfer.telemetry.profile import Profile
    from jaxinfer.telemetry.profile_file import report

    engine, rank = llm.engine, jax.process_index()
    first = max(0, dispatches - TRACED - 4)
    last = first + TRACED - 1
    profile = Profile(folder(bench), first, last, rank)
    # the steps as they run are enough: no second window
    decode(bench, llm, 0, lambda step: profile.before(step, engine) if step <= last else profile.finish(engine))
    own = own_devices(profile.windows[0].folder, engine.mesh, rank, distributed.everyone)
    devices = [each | {"host": ""} for devices in distributed.everyone(own) for each in devices]
    return report(head(engine, bench.args.model) | {"windows": []}, {"as-run": devices}, None)


if __name__ == "__main__":
    main()
