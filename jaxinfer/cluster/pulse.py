"""Signs of life: where a worker is, in memory that it shares with its monitor, and what the monitor asks of it.

A beat is a few stores into memory, about a microsecond: cheap enough for every step.
"""

import ctypes
import mmap
import signal
import time
from types import FrameType

import attrs

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
DRAIN, QUIT = 1, 2
# a monitor that wakes so much too late was itself suspended (scontrol suspend): the silence was its own
PAUSE_SECONDS = 3.0
# a process may be two dispatches ahead of another: it has enqueued one that it has not read and works on the next
MARGIN = 4


@attrs.frozen
class Limits:
    """Bounds in seconds.

    Attributes:
      dead: without a word from a rank's monitor.
      stuck: without a beat, in phases without a bound of their own.
      load, compile: without a beat while loading weights or compiling one program.
      start: until all ranks are there.
      grace: to finish what runs after a stop signal.
    """

    dead: float = 10.0
    stuck: float = 60.0
    load: float = 300.0
    compile: float = 600.0
    start: float = 120.0
    grace: float = 20.0

    def of(self, phase: str) -> float:
        return {"load": self.load, "compile": self.compile}.get(phase, self.stuck)


class _Shared(ctypes.Structure):
    _fields_ = (
        ("at", ctypes.c_double),
        ("step", ctypes.c_int64),
        ("waits", ctypes.c_int32),
        ("phase", ctypes.c_char * 12),
        ("stop_signal", ctypes.c_int32),
        ("asked", ctypes.c_int32),
        ("asked_at", ctypes.c_int64),
        ("drain_at", ctypes.c_int64),
        ("quit_at", ctypes.c_int64),
        ("device", ctypes.c_char * 120),
        ("failure", ctypes.c_char * 3000),
    )


class Pulse:
    """Made before the fork; the worker beats, polls and fails, its monitor reads and answers.

    `leads`: this worker's process decides for all when to stop (process 0).
    """

    def __init__(self, leads: bool, grace_s: float):
        self._leads, self._grace = leads, grace_s
        self.shared = _Shared.from_buffer(mmap.mmap(-1, ctypes.sizeof(_Shared)))
        self.shared.drain_at = self.shared.quit_at = -1
        self._drains_until = 0.0
        self.beat("start")

    def beat(self, phase: str, step: int = 0, waits: bool = False) -> None:
        """This process is alive and at `step` of `phase`; `waits`: for JAX, which may wait for other processes."""
        shared = self.shared
        shared.phase, shared.step, shared.waits = phase.encode(), step, waits
        shared.at = time.monotonic()

    def describe(self, device: str) -> None:
        self.shared.device = device.encode()[:120]

    def fail(self, text: str) -> None:
        """Why this worker is about to end."""
        self.shared.failure = text.encode(errors="backslashreplace")[:3000]  # a path may be no UTF-8

    def stop_signal(self) -> int:
        """The signal that asked this run to stop; 0 if none has."""
        return self.shared.stop_signal

    def poll(self, step: int) -> str:
        """Before `step`: go on (``run``), let nothing new in (``drain``) or leave off (``quit``); the same answer for
        the same step in every process.

        Processes stop together, or the last one would wait for the others' collectives: process 0 holds here until
        every process knows the step, some way ahead, at which all of them will do it.
        """
        shared = self.shared
        if self._leads:
            if shared.stop_signal and shared.drain_at < 0:
                self._ask(DRAIN, step)
                self._drains_until = time.monotonic() + self._grace
            elif shared.drain_at >= 0 and shared.quit_at < 0 and time.monotonic() > self._drains_until:
                self._ask(QUIT, step)
        if 0 <= shared.quit_at <= step:
            return "quit"
        return "drain" if 0 <= shared.drain_at <= step else "run"

    def _ask(self, what: int, step: int) -> None:
        shared = self.shared
        shared.asked_at, shared.asked = step + MARGIN, what
        while shared.asked:  # the monitor clears it; if it dies, this process dies with it
            time.sleep(0.001)


class Alone:
    """The same for a program of one process, without a monitor: stops at signals, beats for nobody."""

    def __init__(self, grace_s: float):
        self._grace, self._signal, self._until = grace_s, 0, 0.0
        for each in STOP_SIGNALS:
            signal.signal(each, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._signal:  # asked twice: at once
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self._signal, self._until = number, time.monotonic() + self._grace

    def beat(self, phase: str, step: int = 0, waits: bool = False) -> None:
        pass

    def describe(self, device: str) -> None:
        pass

    def stop_signal(self) -> int:
        return self._signal

    def poll(self, step: int) -> str:
        if not self._signal:
            return "run"
        return "quit" if time.monotonic() > self._until else "drain"
