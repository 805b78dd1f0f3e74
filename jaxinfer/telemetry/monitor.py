"""Looks at this process's GPUs ten times a second while it works: samples to a file, a summary at the end."""

import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxinfer.telemetry.energy import difference
from jaxinfer.telemetry.gpu_summary import summaries
from jaxinfer.telemetry.nvml import Gpu
from jaxinfer.telemetry.rapl import Rapl
from jaxinfer.telemetry.samples import Part, Sample, read_samples

PERIOD_S = 0.1
RAPL_S = 1.0
STOP_S = 5.0  # for a question to the driver to be answered


class Monitor:
    """A thread that samples `gpus`, from now to `stop`. Nearly all the time it sleeps or waits in NVML, without
    Python's lock. Whatever goes wrong ends the samples, never the run, and `failed` says what it was.

    Args:
      part: the file that it writes.
      rank, host: of this process.
      zero: where `Sample.time_s` begins, as ``time.perf_counter`` of this process.
      rapl: of this host, where this process is the one that reads it.
    """

    def __init__(self, gpus: Sequence[Gpu], part: Path, rank: int, host: str, zero: float, rapl: Rapl | None = None):
        self.gpus, self.part = list(gpus), part
        self.failed: str | None = None
        self._place = rank, host
        self._zero, self._rapl = zero, rapl
        self._peaks: dict[int, int] = {}
        self._looked: list[tuple[float, float]] = []  # at RAPL: when, and joules so far
        self._window: tuple[float, float] | None = None
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._work, name="monitor", daemon=True)
        self._thread.start()

    def window(self, began: float, ended: float) -> None:
        """What the summary is of; both as ``time.perf_counter``. The samples go on to `stop`."""
        self._window = began - self._zero, ended - self._zero

    def peaks(self) -> dict[int, int]:
        """Most memory that was in use on each device, in bytes, by whomever; by the number that CUDA gives it."""
        return dict(self._peaks)

    def stop(self) -> None:
        """Takes a last sample and closes the file."""
        self._ends.set()
        self._thread.join(STOP_S)
        if self._thread.is_alive():
            self.failed = f"NVML did not answer for {STOP_S:g} s"

    def result(self) -> dict[str, Any]:
        """After `stop`, as JSON: ``gpus`` (see `summaries`) and ``rapl_j`` of the window, ``failed``."""
        assert self._window is not None
        names, found = {gpu.uuid: gpu.name for gpu in self.gpus}, []
        try:
            found = summaries(read_samples(self.part), names, *self._window)
        except OSError as error:
            self.failed = self.failed or f"{self.part}: {error.strerror}"
        rapl = difference(*zip(*self._looked), *self._window) if self._looked else None
        return {"gpus": found, "rapl_j": rapl, "failed": self.failed}

    def _work(self) -> None:
        try:
            part = Part(self.part)
            try:
                self._sample(part)
            finally:
                part.close()
        except Exception as error:  # an uncaught one in a thread would end the process
            self.failed = f"{type(error).__name__}: {error}"

    def _sample(self, part: Part) -> None:
        due = time.perf_counter()
        last = False
        while not last:
            last = self._ends.wait(max(0.0, due - time.perf_counter()))
            part.add([self._look(gpu) for gpu in self.gpus])
            now = time.perf_counter()
            if self._rapl is not None and (last or not self._looked or now - self._zero - self._looked[-1][0] > RAPL_S):
                self._look_at_rapl(now)
            due = max(due + PERIOD_S, now)  # what was missed, in a process that was stopped, is not made up for

    def _look(self, gpu: Gpu) -> Sample:
        now = time.perf_counter()
        found = gpu.look(now)
        used = found.get("memory_used_bytes")
        if used is not None:
            self._peaks[gpu.device] = max(used, self._peaks.get(gpu.device, 0))
        return Sample(now - self._zero, *self._place, gpu.index, gpu.uuid, **found)

    def _look_at_rapl(self, now: float) -> None:
        joules = self._rapl.joules() if self._rapl is not None else None
        if joules is None:
            self._rapl = None  # as a whole or not at all
            self._looked.clear()
        else:
            self._looked.append((now - self._zero, joules))
