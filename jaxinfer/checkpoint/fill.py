"""Chunk files into host arrays by several threads, with a bound on what the host holds."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import count
from math import inf, prod
from queue import SimpleQueue
from threading import Lock
from typing import Any

import numpy as np

from jaxinfer.checkpoint.reader import Reader, Slices

HELD = 512 << 20
TOLD = 16 << 20
ALIGNMENT = 64  # what XLA wants of memory that a CPU device takes over without a copy


@dataclass(frozen=True)
class Piece:
    """A host array to fill: leaves flattened to [out, in] (the last `in_dims` dimensions are in) and joined along out.

    What no leaf covers is zero. `owner` says whose it is, to the caller alone."""

    shape: tuple[int, ...]
    dtype: np.dtype
    in_dims: int
    leaves: tuple[tuple[str, Slices], ...]
    owner: Any = None

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    def allocate(self) -> np.ndarray:
        covered = sum(prod(_lengths(index)) for _, index in self.leaves) == prod(self.shape)
        memory = (np.empty if covered else np.zeros)(self.nbytes + ALIGNMENT, np.uint8)
        start = -memory.ctypes.data % ALIGNMENT
        return memory[start : start + self.nbytes].view(self.dtype).reshape(self.shape)

    def views(self, array: np.ndarray) -> Iterator[tuple[str, Slices, np.ndarray]]:
        """Each leaf, the slice of it that is wanted, and where in `array` it goes, in the slice's shape."""
        row = 0
        for leaf, index in self.leaves:
            shape = _lengths(index)
            rows = prod(shape[: len(shape) - self.in_dims])
            yield leaf, index, array[row : row + rows].reshape(shape, copy=False)
            row += rows


def fill(
    reader: Reader,
    pieces: Sequence[Piece],
    place: Callable[[Piece, np.ndarray], None],
    threads: int,
    loading: Callable[[int, int], None] = lambda done, total: None,
    held: int = HELD,
) -> None:
    """Fills every piece and gives it to `place`, which must be done with the array when it returns (or keep it).

    Each of the `threads` takes the next chunk file, whichever piece it is of, reads and checks it (`Reader.read_file`)
    and copies it to every piece that wants some of it; the one that completes a piece calls `place`. One thread works
    through the files in order. Pieces that share a chunk file are filled together, so that no file is read twice.

    The host holds at most `held` bytes of pieces (or the largest that are filled together, where that is more), and
    per thread one block of 4 MiB (or one row of a chunk, where that is more).

    `loading` is told (bytes read, bytes to read), by the caller's thread, at least every 16 MiB and at the end.

    Raises:
      CheckpointError: of the first file in order that is not as it was written. Files after it are not begun, and those
        begun are left at their next block. What `place` raises comes out in the same way.
    """
    run = _Run(reader, place, loading)
    groups = run.groups(pieces)
    waiting: deque[tuple[int, list[Future]]] = deque()
    used = 0
    with ThreadPoolExecutor(threads, thread_name_prefix="load") as pool:
        try:
            for group in groups:
                size = sum(piece.nbytes for piece in group)
                while waiting and used + size > held:
                    freed, futures = waiting.popleft()
                    run.wait(futures)
                    used -= freed
                waiting.append((size, [run.submit(pool, job) for job in run.jobs(group)]))
                used += size
            for _, futures in waiting:
                run.wait(futures)
        except BaseException:
            run.failed = -1
            pool.shutdown(wait=False, cancel_futures=True)
            raise


class _Stopped(Exception):
    """A file that comes before has failed."""


@dataclass
class _Group:
    """Pieces under way, and how many of their files are not over."""

    filled: list[tuple[Piece, np.ndarray]]
    left: int


class _Run:
    """What the threads share. `failed` is the number of the first job known to have failed."""

    def __init__(self, reader: Reader, place: Callable[[Piece, np.ndarray], None], loading: Callable[[int, int], None]):
        self.reader, self.place, self.loading = reader, place, loading
        self.failed: float = inf
        self._lock = Lock()
        self._numbers = count()
        self._events: SimpleQueue[int] = SimpleQueue()  # the size of each block read, and 0 when a job is over
        self._done = self._told = self._total = 0

    def groups(self, pieces: Sequence[Piece]) -> list[list[Piece]]:
        """The pieces in order, those together that share a chunk file. Tells how much there is to read."""
        groups: dict[int, list[Piece]] = {}
        group_of: dict[str, int] = {}
        for number, piece in enumerate(pieces):
            files = {cut.file for leaf, index in piece.leaves for cut in self.reader.cuts(leaf, index)}
            shared = {group_of[file] for file in files if file in group_of}
            if shared:
                files |= {file for file, other in group_of.items() if other in shared}
            groups[number] = [each for other in sorted(shared) for each in groups.pop(other)] + [piece]
            group_of |= dict.fromkeys(files, number)
        known = self.reader.manifest.files
        self._total = sum(known[file]["bytes"] for file in group_of if file in known)
        self.loading(0, self._total)
        return list(groups.values())

    def jobs(self, pieces: Sequence[Piece]) -> list[Callable[[], None]]:
        """One job per chunk file of a group, in order; one in all where there is nothing to read."""
        filled = [(piece, piece.allocate()) for piece in pieces]
        files: dict[str, tuple[str, list[tuple[Slices, np.ndarray]]]] = {}
        for piece, array in filled:
            for leaf, index, view in piece.views(array):
                for cut in self.reader.cuts(leaf, index):
                    files.setdefault(cut.file, (leaf, []))[1].append((cut.source, view[cut.target]))
        if not files:
            return [partial(self._job, next(self._numbers), _Group(filled, 1), lambda read: None)]
        group = _Group(filled, len(files))
        reads = [partial(self.reader.read_file, file, leaf, parts) for file, (leaf, parts) in files.items()]
        return [partial(self._job, next(self._numbers), group, read) for read in reads]

    def submit(self, pool: ThreadPoolExecutor, job: Callable[[], None]) -> Future:
        future = pool.submit(job)
        future.add_done_callback(lambda _: self._events.put(0))
        return future

    def wait(self, futures: Sequence[Future]) -> None:
        """Until these jobs are over. Tells what is read meanwhile; raises what the first of them in order raised."""
        while not (all(future.done() for future in futures) and self._events.empty()):
            size = self._events.get()
            self.reader.count(size)
            self._done += size
            if self._done - self._told >= TOLD or self._told < self._done == self._total:
                self._told = self._done
                self.loading(self._done, self._total)
        for future in futures:
            future.result()

    def _job(self, number: int, group: _Group, read_file: Callable[[Callable[[int], None]], None]) -> None:
        def read(size: int) -> None:
            self._events.put(size)
            self._stop_after_failure(number)

        try:
            self._stop_after_failure(number)
            read_file(read)
            with self._lock:
                group.left -= 1
                last = group.left == 0
            if last:
                for piece, array in group.filled:
                    self.place(piece, array)
        except BaseException:
            with self._lock:
                self.failed = min(self.failed, number)
            raise

    def _stop_after_failure(self, number: int) -> None:
        if number > self.failed:
            raise _Stopped


def _lengths(index: Slices) -> tuple[int, ...]:
    return tuple(each.stop - each.start for each in index)
