"""Named ranges for whoever watches a run: steps in a trace of ours (--profile), NVTX ranges under nsys."""

import ctypes
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

# who has NVTX's functions: CUDA 12's library, or what CUDA 13 has in its place
NVTX_LIBRARIES = ("libnvToolsExt.so.1", "libnvtx3interop.so")


@contextmanager
def step(name: str, number: int, steps: int) -> Iterator[None]:
    """The host enqueues dispatch `number`, of so many ``decode`` steps or ``prefill`` ticks; costs next to nothing when
    nobody watches."""
    import jax

    push, pop = _nvtx()
    push(f"{name} {number}")
    try:
        with jax.profiler.StepTraceAnnotation(name, step_num=number, steps=steps):
            yield
    finally:
        pop()


@cache
def _nvtx() -> tuple[Callable[[str], object], Callable[[], object]]:
    """How to open and to close a range; nothing happens outside nsys, or without a library that tells it."""
    if "NSYS_PROFILING_SESSION_ID" in os.environ:
        try:
            import nvtx

            return nvtx.push_range, nvtx.pop_range
        except ImportError:
            pass
        for name in NVTX_LIBRARIES:
            try:
                library = ctypes.CDLL(name)
                return lambda text: library.nvtxRangePushA(text.encode()), library.nvtxRangePop
            except (OSError, AttributeError):
                pass
    return lambda text: None, lambda: None
