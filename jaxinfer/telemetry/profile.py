"""XLA traces of some steps of a run, for TensorBoard's profile plugin: first as they run, for times; then without
command buffers, for structure: a GPU runs a CUDA graph as one piece, in which a trace names no layer."""

from pathlib import Path
from typing import NamedTuple, Protocol


class Window(NamedTuple):
    """Steps `first` to `last`, `traced` of them; `folder` is of this process. `name`: ``as-run``, or ``structure`` for
    programs without command buffers."""

    name: str
    folder: Path
    first: int
    last: int
    traced: int
    command_buffers: bool


def clamped(first: int, last: int, steps: int, windows: int) -> tuple[int, int]:
    """The steps to trace of a run that has `steps` at most: `first` to `last` where so many `windows` fit, with a step
    between two; else earlier, and fewer unless that leaves a quarter of the run before, when programs compile."""
    count = last - first + 1
    if first + taken(count, windows) <= steps:
        return first, last
    room = steps - steps // 4
    count = max(1, min(count, (room - windows + 1) // windows))
    first = max(0, min(first, steps - taken(count, windows)))
    return first, first + count - 1


def taken(count: int, windows: int) -> int:
    """Steps that windows of `count` steps take."""
    return windows * count + windows - 1


class Engine(Protocol):
    def wait(self) -> None:
        """Until the devices have done what was enqueued."""

    def watch_programs(self) -> None:
        """Notes from here on which programs run."""

    def drop_command_buffers(self) -> bool:
        """Compiles the programs noted without command buffers, and runs them so; False if the devices have none."""

    def take_command_buffers(self) -> None:
        """Back to the programs as they were."""


class Profile:
    """Traces steps `first` to `last` of this process into ``folder/rank-N/as-run``, and where programs have command
    buffers as many without into ``folder/rank-N/structure``, from the next step but one: the first with new programs
    brings them to the device. Call `before` ahead of each step, and `finish` after the last.

    Raises:
      OSError: the folder cannot be made.
    """

    def __init__(self, folder: Path, first: int, last: int, rank: int):
        self.folder, self.rank = folder / f"rank-{rank}", rank
        self.folder.mkdir(parents=True, exist_ok=True)
        self.first, self.last = first, last
        self._begun: tuple[str, int] | None = None  # the window that is open, and its first step
        self._apart = False  # the programs are others than usual
        self._step = -1  # that was last begun
        self.windows: list[Window] = []
        self.why = ""  # there is no window without command buffers

    def before(self, step: int, engine: Engine) -> None:
        """`step` counts from 0. Waits for the devices where a window begins or ends, so that it has whole steps."""
        count = self.last - self.first + 1
        if step == self.first:
            engine.wait()
            engine.watch_programs()
            self._begin("as-run", step)
        elif step == self.last + 1 and self._begun:
            engine.wait()
            self.close()
            self._apart = self._compiled(engine)
        elif step == self.last + 2 and self._apart:
            engine.wait()
            self._begin("structure", step)
        elif step == self.last + 2 + count:
            self.finish(engine)
        self._step = step

    def _compiled(self, engine: Engine) -> bool:
        import jax

        try:
            return engine.drop_command_buffers()
        except jax.errors.JaxRuntimeError as error:  # XLA's: the run can do without this
            self.why = str(error).splitlines()[0]
            return False

    def finish(self, engine: Engine) -> None:
        if self._begun:
            engine.wait()
            self.close()
        if self._apart:
            engine.take_command_buffers()
            self._apart = False

    def _begin(self, name: str, step: int) -> None:
        import jax

        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # it would slow the host down, and fill the trace
        jax.profiler.start_trace(self.folder / name, profiler_options=options)
        self._begun = name, step

    def close(self) -> None:
        """Ends the trace, if one runs, whatever the devices do."""
        if self._begun:
            import jax

            jax.profiler.stop_trace()
            name, first = self._begun
            self._begun = None
            steps = self._step - first + 1
            self.windows.append(Window(name, self.folder / name, first, self._step, steps, name != "structure"))
