"""Weights onto the devices, in a thread, beside whatever else a start has to do."""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from jaxinfer.checkpoint.dummy import random_params
from jaxinfer.checkpoint.load import default_threads, load
from jaxinfer.checkpoint.manifest import Manifest
from jaxinfer.checkpoint.reader import Reader
from jaxinfer.engine.fit import Fitted
from jaxinfer.parallel.placement import Rules

Told = Callable[[int, int], None]  # bytes so far, bytes in all


class Loading:
    """Begins `load`, which is given whom to tell how far it is, in a thread; `told` hears the same."""

    def __init__(self, load: Callable[[Told], Any], told: Told):
        self._load, self._told = load, told
        self._thread = ThreadPoolExecutor(1, "load")
        self._begin()

    def _begin(self) -> None:
        self._unwanted = threading.Event()
        self._weights: Future = self._thread.submit(self._run, self._unwanted)

    def _run(self, unwanted: threading.Event) -> Any:
        def told(done: int, total: int) -> None:
            if unwanted.is_set():
                raise RuntimeError("nobody waits for the weights any more")
            self._told(done, total)

        return self._load(told)

    def wait(self) -> Any:
        """The weights; loads them again if `stops_at_error` ended it."""
        if self._unwanted.is_set():
            self._begin()
        with self.stops_at_error():
            return self._weights.result()

    @contextmanager
    def stops_at_error(self) -> Iterator[None]:
        """An error in here ends the loading too: Python does not end before its threads."""
        try:
            yield
        except BaseException:
            self._unwanted.set()
            raise


def load_weights(
    folder: Path | None, manifest: Manifest, fitted: Fitted, mesh: Mesh, dtype: Any, told: Told
) -> tuple[Any, int, float]:
    """This process's part of the weights on its devices, how many bytes of the checkpoint it read, and the seconds.

    Raises:
      CheckpointError: a checkpoint that is not whole.
    """
    began = time.perf_counter()
    parameters, rules, dtype, config = fitted.decoder.parameters(), Rules(), np.dtype(dtype), fitted.config
    if config.load_format == "dummy":
        params, read = random_params(parameters, mesh, rules, dtype, config.seed, told), 0
    else:
        threads, reader = config.load_threads or default_threads(), Reader(folder, manifest)
        params = load(reader, parameters, mesh, rules, dtype, threads, told)
        read = reader.bytes_read
    return params, read, time.perf_counter() - began
