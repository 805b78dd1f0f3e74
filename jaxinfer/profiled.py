"""The end of a traced run: what the traces say, on the screen and in OUT.profile.json."""

from pathlib import Path
from typing import Any

from jaxinfer.cluster import distributed
from jaxinfer.engine.cut import shape
from jaxinfer.outputs import Writer
from jaxinfer.process.run import Run
from jaxinfer.telemetry.breakdown import show
from jaxinfer.telemetry.devices import own_devices
from jaxinfer.telemetry.profile import Profile, clamped, taken
from jaxinfer.telemetry.profile_file import report, show_balance


def begin(run: Run, engine: Any) -> Profile:
    """What will trace the steps that were asked for, or those that the requests in `engine` have.

    Raises:
      OSError: the folder cannot be made.
    """
    first, last = asked = run.args.profile_steps
    windows = 2 if engine.command_buffers else 1
    most = engine.most_steps(first + taken(last - first + 1, windows))
    first, last = clamped(*asked, most, windows)
    profile = Profile(Path(run.args.profile), first, last, run.rank)
    if (first, last) != asked:
        run.say(
            f"--profile-steps {asked[0]}:{asked[1]}: these requests take at most {most} steps; "
            f"traced are {first}:{last}{' and as many without command buffers' if windows == 2 else ''}"
        )
    if windows == 1:
        run.say("--profile: CPU devices have no command buffers, so one window of steps shows all there is")
    return profile


def conclude(run: Run, profile: Profile, engine: Any, writer: Writer | None) -> dict[str, Any]:
    """Reads the traces of all processes, which all call this; the first shows and writes. What a summary takes: the
    share of decode's time without work and the imbalance of the stages, None where nothing was traced.

    Raises:
      OutputError: the file cannot be written.
    """
    if not profile.windows:
        run.say(f"WARNING: nothing was traced: the run had {engine.steps} steps, and tracing begins at {profile.first}")
        return {}
    if len(profile.windows) == 1 and engine.command_buffers:
        why = profile.why or "the run ended before it"
        run.say(f"WARNING: there is no window without command buffers, so the trace names no layers: {why}")
    beats = 0

    def everyone(value: Any) -> list[Any]:
        nonlocal beats
        beats += 1
        run.life.beat("profile", beats, waits=True)
        return distributed.everyone(value)

    hosts, stats = distributed.hosts(), engine.stats
    empty = stats.idle_stage_ticks / stats.stage_ticks if stats.stage_ticks else None
    traced = [each._asdict() | {"folder": str(each.folder)} for each in profile.windows]
    described = head(engine, run.args.preset or Path(run.args.model).resolve().name) | {"windows": traced}
    windows: dict[str, Any] = {}
    for window in profile.windows:
        run.life.beat("profile", beats)
        own = own_devices(window.folder, engine.mesh, run.rank, everyone)
        windows[window.name] = [each | {"host": hosts[each["rank"]]} for devices in everyone(own) for each in devices]
        found = report(described, windows, empty)
        if found["layers"]["decode"] is not None:
            break  # the others are for who looks at them
    if run.first:
        first = profile.windows[0]
        show(windows[first.name], f"profile of steps {first.first} to {first.last}, {first.name}")
        show_balance(found)
        if writer is not None:
            writer.note("profile", found)
    run.say(f"traces: tensorboard --logdir {run.args.profile}")
    return {"bubble_time": found["bubble"]["time"], "imbalance": found["imbalance"]["decode"]}


def head(engine: Any, name: str) -> dict[str, Any]:
    """What ran, for `report`; `name` is the model's for readers, who know it by its shape."""
    return {
        "model": name,
        "shape": shape(engine.manifest.model),
        "mesh": dict(engine.mesh.shape),
        "stage_layers": list(engine.stage_layers),
        "dtype": engine.dtype.name,
    }
