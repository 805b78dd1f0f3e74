"""Runs a batch of requests to its end, or to a stop signal: results go to the output as they finish."""

import json
import signal
import socket
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from jaxinfer.cluster import distributed
from jaxinfer.cluster.pulse import Alone, Pulse
from jaxinfer.engine.request import Output, Request, Update
from jaxinfer.llm import LLM
from jaxinfer.outputs import Writer, beside, output_line
from jaxinfer.process.monitor import Watch, end_watch
from jaxinfer.process.run import Run
from jaxinfer.telemetry.metrics import RunMetrics
from jaxinfer.telemetry.profile import Profile
from jaxinfer.telemetry.progress import Progress
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
    counts: dict[str, int],
    profile: Profile | None = None,
    watch: Watch | None = None,
) -> dict[str, Any]:
    """Runs `requests`, which `llm` has, and returns the figures; only the first process shows, and has the
    `writer`. A sample whose logits are NaN or infinite ends with an error record, and the others go on.

    After a stop signal it lets nothing new begin, finishes what it can in time and puts the rest back: nothing of a
    request that has not finished stays in the output, so that the same command does it again. `profile` traces some of
    the steps; `watch` ends with the work.

    Raises:
      OutputError: the disk does not take a result; what was written before is whole.
    """
    metrics, phases = RunMetrics(), run.phases
    if writer is not None:
        note_unfinished(writer, len(requests), fresh=True)
        if not writer.stream:
            merged_path(writer.path).unlink(missing_ok=True)  # the samples of an earlier run
    bar = Progress("generate", "requests", len(requests), shown=run.first)
    left = Counter({name: request.params.n for name, request in requests.items()})

    def take(update: Update) -> None:
        metrics.add(update)
        done = update.output
        if done is not None:
            left[update.request_id] -= 1
            if writer is not None:
                with phases.within("write"):
                    writer.write(output_line(done))
            if shows:
                bar.write(_readable(done, requests[update.request_id], llm.engine.tokenizer))
        bar.update(int(done is not None and not left[update.request_id]), len(update.token_ids))

    try:
        _steps(llm, run.life, take, profile)
    finally:
        bar.close()
        if profile is not None:
            profile.close()
    if writer is not None:
        with phases.within("write"):
            writer.sync()
    number = run.life.stop_signal()
    unfinished = sum(each > 0 for each in left.values())
    stopped_by = signal.Signals(number).name if number else None
    import jax

    summary = counts | {"unfinished": unfinished, "stopped_by": stopped_by, "decode_sum": llm.engine.decode_sum}
    summary |= metrics.summary(asdict(llm.engine.stats), jax.devices()[0].device_kind)
    summary |= end_watch(run, watch, metrics.window, metrics.output_tokens)
    summary["phases"] = _phases(run, llm)
    if writer is not None:
        writer.note("metrics", summary)
    return summary


def _phases(run: Run, llm: LLM) -> list[dict[str, Any]]:
    """Of each process."""
    own = {"rank": run.rank, "host": socket.gethostname(), **run.phases.to_json()}
    own["load_bytes"] = llm.engine.stats.load_bytes
    run.life.beat("end", waits=True)
    return distributed.everyone(own)


def _steps(llm: LLM, life: Life, take: Callable[[Update], None], profile: Profile | None) -> None:
    engine, drains = llm.engine, False
    while engine.has_unfinished():
        if profile is not None:
            profile.before(engine.steps, engine)
        order = life.poll(engine.steps)
        if order == "quit":
            break
        if order == "drain" and not drains:
            drains = True
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
