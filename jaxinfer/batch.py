"""Runs a batch of requests to its end, or to a stop signal: results go to the output as they finish."""

import json
import signal
import socket
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import attrs
import xxhash

from jaxinfer.cluster import distributed
from jaxinfer.cluster.pulse import Alone, Pulse
from jaxinfer.engine.engine import Engine
from jaxinfer.engine.request import Output, Request, Update
from jaxinfer.llm import LLM
from jaxinfer.outputs import Writer, beside, output_line
from jaxinfer.process.monitor import Watch, end_watch
from jaxinfer.process.run import Run
from jaxinfer.telemetry.memory import memory_peaks
from jaxinfer.telemetry.metrics import RunMetrics, since
from jaxinfer.telemetry.profile import Profile
from jaxinfer.telemetry.progress import Progress
from jaxinfer.telemetry.repeats import flat, over, with_medians
from jaxinfer.telemetry.samples import merged_path

Life = Pulse | Alone


def note_unfinished(writer: Writer, left: int, fresh: bool) -> None:
    """Says in the metrics file how many requests are left, for whoever finds it after a kill; `fresh`: nothing else of
    an earlier run stays in it."""
    path = beside(writer.path, "metrics")
    old: dict[str, Any] = {}
    if not fresh and path.exists():
        old = json.loads(path.read_bytes())
    writer.note("metrics", old | {"unfinished": left, "stopped_by": None})


def run_batch(
    llm: LLM,
    requests: dict[str, Request],
    run: Run,
    writer: Writer | None,
    shows: bool,
    counts: dict[str, Any],
    profile: Profile | None = None,
    watch: Watch | None = None,
) -> dict[str, Any]:
    """Runs `requests`, which `llm` has, and returns the figures; only the first process shows, and has the
    `writer`. A sample whose logits are NaN or infinite ends with an error record, and the others go on.

    After a stop signal it lets nothing new begin, finishes what it can in time and puts the rest back: nothing of a
    request that has not finished stays in the output, so that the same command does it again. `profile` traces some of
    the steps; `watch` ends with the work.

    With ``--warm-up`` every program is there before the first request begins. With ``--repeats`` they all run again,
    each time in an engine that has forgotten the time before, without output; the figures are the medians. `profile` is
    then of a pass of its own, the last and in no figure.

    Raises:
      OutputError: the disk does not take a result; what was written before is whole.
    """
    repeats, phases, engine = run.args.repeats, run.phases, llm.engine
    if writer is not None:
        note_unfinished(writer, len(requests), fresh=True)
        if not writer.stream:
            merged_path(writer.path).unlink(missing_ok=True)  # the samples of an earlier run
    samples: dict[tuple[str, int], str] = {}

    def take(done: Output, bar: Progress) -> None:
        if repeats is not None:
            samples[done.id, done.index] = _digest(done)
        if writer is not None:
            with phases.within("write"):
                writer.write(output_line(done))
        if shows:
            bar.write(_readable(done, requests[done.id], engine.tokenizer))

    warm_up = engine.warm_up() if run.args.warm_up else None
    engine.arrive()
    once = _pass(llm, requests, run, "generate", take, None if repeats else profile)
    passes = [once]
    if writer is not None:
        with phases.within("write"):
            writer.sync()
    summary = counts | {"unfinished": once.unfinished, "decode_sum": engine.decode_sum} | once.figures
    summary |= {"warm_up": warm_up, "repeats": None}
    if repeats is not None:
        again, same = _repeat(llm, requests, run, samples, profile) if not once.unfinished else ([], True)
        passes += again
        runs = [flat(each.figures) for each in passes if not each.unfinished]
        figures = over(runs)
        summary = with_medians(summary, figures)
        told = {"count": len(runs), "asked": repeats, "same_tokens": same, "figures": figures, "runs": runs}
        summary["repeats"] = told
    number = run.life.stop_signal()
    summary["stopped_by"] = signal.Signals(number).name if number else None
    work = passes[0].window[0], passes[-1].window[1]
    summary |= end_watch(run, watch, work, sum(each.figures["output_tokens"] for each in passes))
    summary |= of_processes(run, engine, watch)
    if writer is not None:
        writer.note("metrics", summary)
    return summary


@attrs.frozen
class Pass:
    """All requests, once: `unfinished` are what a stop signal left; `window` is of `RunMetrics`."""

    figures: dict[str, Any]
    unfinished: int
    window: tuple[float, float]


def _pass(
    llm: LLM,
    requests: dict[str, Request],
    run: Run,
    name: str,
    take: Callable[[Output, Progress], None],
    profile: Profile | None,
    drains: bool = True,
) -> Pass:
    """`drains`: a stop signal lets finish what has begun."""
    import jax

    before, metrics = asdict(llm.engine.stats), RunMetrics()
    bar = Progress(name, "requests", len(requests), shown=run.first)
    left = Counter({name: request.params.n for name, request in requests.items()})

    def look(update: Update) -> None:
        metrics.add(update)
        done = update.output
        if done is not None:
            left[update.request_id] -= 1
            take(done, bar)
        bar.update(int(done is not None and not left[update.request_id]), len(update.token_ids))

    try:
        _steps(llm, run.life, look, profile, drains)
    finally:
        bar.close()
        if profile is not None:
            profile.close()
    counted = since(before, asdict(llm.engine.stats))
    figures = metrics.summary(counted, jax.devices()[0].device_kind)
    return Pass(figures, sum(each > 0 for each in left.values()), metrics.window)


def _repeat(
    llm: LLM, requests: dict[str, Request], run: Run, samples: dict[tuple[str, int], str], profile: Profile | None
) -> tuple[list[Pass], bool]:
    """Further passes until there are as many as asked for, then one that is traced; a stop signal ends them. The passes
    but that one, and whether their samples were as those of the first, which `samples` has."""
    engine, same, passes = llm.engine, True, []

    def take(done: Output, bar: Progress) -> None:
        nonlocal same
        same = same and samples[done.id, done.index] == _digest(done)

    names = [f"repeat {number} of {run.args.repeats}" for number in range(2, run.args.repeats + 1)]
    for name in names if profile is None else [*names, "profile"]:
        if run.life.poll(engine.steps) != "run":
            break
        engine.forget()
        with run.phases.within("preprocess"):
            for request in requests.values():
                engine.add(request)
        engine.arrive()
        if name == "profile":
            _pass(llm, requests, run, name, lambda done, bar: None, profile, drains=False)
        else:
            passes.append(_pass(llm, requests, run, name, take, None, drains=False))
    return passes, same


def _digest(done: Output) -> str:
    return xxhash.xxh3_64_hexdigest(repr((done.token_ids, done.finish_reason)).encode())


def of_processes(run: Run, engine: Engine, watch: Watch | None) -> dict[str, Any]:
    """What each process tells, all of them: where its time went so far, and its memory."""
    own = {"rank": run.rank, "host": socket.gethostname()}
    told = {
        "phases": own | run.phases.to_json() | {"load_bytes": engine.stats.load_bytes},
        "memory": own | memory_peaks({} if watch is None else watch.peaks()),
    }
    run.life.beat("end", waits=True)
    every = distributed.everyone(told)
    return {name: [each[name] for each in every] for name in told}


def _steps(llm: LLM, life: Life, take: Callable[[Update], None], profile: Profile | None, drains: bool) -> None:
    engine, began, draining = llm.engine, llm.engine.steps, False
    while engine.has_unfinished():
        if profile is not None:
            profile.before(engine.steps - began, engine)
        order = life.poll(engine.steps)
        if order == "quit" or (order == "drain" and not drains):
            break
        if order == "drain" and not draining:
            draining = True
            engine.put_back()
        for update in engine.step():
            take(update)
    if profile is not None:
        profile.finish(engine)
    llm.drop()


def _readable(output: Output, request: Request, tokenizer: Any) -> str:
    title = output.id if request.params.n == 1 else f"{output.id} [{output.index}]"
    if tokenizer is None:
        text = f"{request.prompt_token_ids} {output.token_ids}"
    else:
        text = tokenizer.decode(request.prompt_token_ids, skip_special_tokens=True) + output.text
    return f"=== {title}\n{text}\n" + (f"error: {output.error}\n" if output.error else "")
