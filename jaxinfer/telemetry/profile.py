"""An XLA trace of some steps of a run, for TensorBoard's profile plugin, and its summary in a few lines."""

import re
from pathlib import Path
from typing import Any

COMMUNICATION = re.compile(
    r"all-?reduce|all-?gather|reduce-?scatter|collective|permute|all-?to-?all|nccl|send|recv", re.I
)
# where the profiler puts what the devices did: a line per stream of a GPU, a line per thread of the CPU client
LINES = ("Stream", "tf_XLAPjRt", "tf_XLATfrt")


class Profile:
    """Traces steps `first` to `last` of this process into ``folder/rank-N``; call `before` ahead of each step.

    Raises:
      OSError: the folder cannot be made.
    """

    def __init__(self, folder: Path, first: int, last: int, rank: int):
        self.folder = folder / f"rank-{rank}"
        self.folder.mkdir(parents=True, exist_ok=True)
        self._first, self._last = first, last
        self._running = self.traced = False

    def before(self, step: int) -> None:
        """`step` counts from 0."""
        import jax

        if step == self._first:
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # it would slow the host down, and fill the trace
            jax.profiler.start_trace(self.folder, profiler_options=options)
            self._running = True
        elif step > self._last:
            self.close()

    def close(self) -> None:
        """Ends the trace, if one runs."""
        if self._running:
            import jax

            jax.profiler.stop_trace()
            self._running, self.traced = False, True


def summary(folder: Path) -> list[str]:
    """Per device of the newest trace below `folder`: how long it computed, communicated and did nothing, in a line."""
    from jax.profiler import ProfileData

    files = sorted(folder.rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)
    if not files:
        return []
    lines = []
    for plane in ProfileData.from_file(str(files[-1])).planes:
        events = [event for line in plane.lines if line.name.startswith(LINES) for event in line.events]
        spans = [
            (event.start_ns, event.start_ns + event.duration_ns, event.name) for event in events if event.duration_ns
        ]
        if spans:
            lines.append(f"{plane.name}: {_shares(spans)}")
    return lines


def _shares(spans: list[tuple[float, float, str]]) -> str:
    window = max(end for _, end, _ in spans) - min(start for start, _, _ in spans)
    busy = _covered(spans)
    computing = _covered([span for span in spans if not COMMUNICATION.search(span[2])])
    return (
        f"{window / 1e6:.1f} ms, computing {computing / window:.1%}, communication beside it "
        f"{(busy - computing) / window:.1%}, idle or between launches {1 - busy / window:.1%}; {len(spans):,} kernels"
    )


def _covered(spans: list[tuple[float, float, Any]]) -> float:
    """Length of the union of intervals."""
    total, reached = 0.0, float("-inf")
    for start, end, _ in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total
