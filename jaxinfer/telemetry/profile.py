"""An XLA trace of some steps of a run, for TensorBoard's profile plugin."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple


class Window(NamedTuple):
    """Steps `first` to `last`, of which `traced` came; `folder` is of this process. `name`: ``as-run``, or
    ``structure`` for a program without command buffers."""

    name: str
    folder: Path
    first: int
    last: int
    traced: int
    command_buffers: bool


class Profile:
    """Traces steps `first` to `last` of this process into ``folder/rank-N``; call `before` ahead of each step, and
    `finish` after the last. Both take what waits for the devices: only whole steps can be counted.

    Raises:
      OSError: the folder cannot be made.
    """

    def __init__(self, folder: Path, first: int, last: int, rank: int):
        self.folder, self.rank = folder / f"rank-{rank}", rank
        self.folder.mkdir(parents=True, exist_ok=True)
        self._first, self._last = first, last
        self._running = self.traced = False

    def before(self, step: int, wait: Callable[[], object]) -> None:
        """`step` counts from 0."""
        import jax

        if step == self._first:
            wait()
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # it would slow the host down, and fill the trace
            jax.profiler.start_trace(self.folder, profiler_options=options)
            self._running = True
        elif step > self._last:
            self.finish(wait)

    def finish(self, wait: Callable[[], object]) -> None:
        if self._running:
            wait()
            self.close()

    def close(self) -> None:
        """Ends the trace, if one runs, whatever the devices do."""
        if self._running:
            import jax

            jax.profiler.stop_trace()
            self._running, self.traced = False, True

    @property
    def windows(self) -> list[Window]:
        """What was traced."""
        if not self.traced:
            return []
        return [Window("as-run", self.folder, self._first, self._last, self._last - self._first + 1, True)]
