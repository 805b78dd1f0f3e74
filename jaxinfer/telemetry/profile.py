"""An XLA trace of some steps of a run, for TensorBoard's profile plugin, and what it says of each device."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxinfer.telemetry.breakdown import breakdown, left_out
from jaxinfer.telemetry.xplane import read


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

    def devices(self, mesh: Any) -> list[dict[str, Any]]:
        """What `breakdown.show` takes, of this process's devices on `mesh`; the first axis of a mesh is its stages."""
        import jax

        newest = max(self.folder.rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)
        trace = read(newest)
        stage_of = {device: stage for stage, row in enumerate(mesh.devices) for device in row.flat}
        found = []
        for device in jax.local_devices():
            # traces number CPU devices over all processes, GPUs as the node does
            own = trace.devices.get(device.id if device.platform == "cpu" else device.local_hardware_id)
            if own and device in stage_of:
                place = {"rank": self.rank, "device": device.local_hardware_id, "stage": stage_of[device]}
                programs = breakdown(own, len(mesh.devices), trace.steps)
                found.append(place | {"programs": programs, "left_out": left_out(own)})
        return found
