"""Where a process's time goes: its main thread is in one phase at each moment, so that the phases sum to its life."""

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

PHASES = ("start", "load", "preprocess", "compile", "prefill", "decode", "write", "other")


class Phases:
    """A clock for each of `PHASES`, of which one runs; made while the process starts. Only the main thread moves it;
    what other threads do meanwhile is told by `beside`.

    `began` is on the clock of `time.perf_counter`: when the process started (`process_began`), or now.
    """

    def __init__(self, began: float | None = None):
        now = time.perf_counter()
        self.began = now if began is None else began
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._beside: dict[str, float] = {}
        self._stack, self._since = ["start"], self.began
        self._lock = threading.Lock()

    @contextmanager
    def within(self, phase: str) -> Iterator[None]:
        """In here it is `phase`'s clock that runs. Inside of another `within`, that one's stands meanwhile."""
        depth = len(self._stack)
        try:
            self._turn()
            self._stack.append(phase)
            yield
        finally:
            self._turn()
            del self._stack[depth:]  # an interrupt may have left more

    def was(self, phase: str) -> None:
        """Outside of another one in it, the innermost `within` turns out to be of `phase`: what runs since the clock
        last came to it."""
        self._stack[-1] = phase

    def started(self) -> None:
        """The devices are ready: from here on, what is in no phase of its own is ``other``."""
        self._turn()
        self._stack[0] = "other"

    def beside(self, phase: str, seconds: float) -> None:
        """Another thread worked so long; threads at once count each."""
        with self._lock:
            self._beside[phase] = self._beside.get(phase, 0.0) + seconds

    def seconds(self) -> dict[str, float]:
        """Of each phase, so far."""
        self._turn()
        return dict(self._seconds)

    def to_json(self) -> dict[str, object]:
        """``wall_s`` since the process began, the phases that sum to it, ``overlapped``: other threads' work."""
        seconds = self.seconds()
        with self._lock:
            return {"wall_s": self._since - self.began, **seconds, "overlapped": dict(self._beside)}

    def _turn(self) -> None:
        now = time.perf_counter()
        self._seconds[self._stack[-1]] += now - self._since
        self._since = now


def process_began() -> float:
    """When this process started, on the clock of `time.perf_counter`, to 10 ms: what the kernel says (proc(5),
    /proc/PID/stat, field 22). Where it says nothing that can be, now."""
    now = time.perf_counter()
    try:
        with open("/proc/self/stat") as file:
            ticks = int(file.read().rpartition(")")[2].split()[19])
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, AttributeError):
        return now
    return now - age if age > 0 else now
