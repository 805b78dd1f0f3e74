"""How fast a checkpoint loads, beside what this machine could do: GB/s by threads, files in the page cache or not.

    python -m benchmarks.load --model CKPT_DIR --threads 1,2,4,8,16

Columns, all GB/s of chunk files, best of --repeats:
  memcpy     copies between two warm buffers of 64 MiB per thread: the most that moving bytes once can reach
  check      xxh3_128 of blocks of 4 MiB that are in the processor's cache
  read       the same files by plain readinto, each thread into one block of 4 MiB: the floor of reading
  to device  64 MiB arrays from the host to the first device, each thread its own
  host       `fill`: read, checked and copied into place, nothing put on a device
  load       `load`: the same, onto the mesh; in brackets its share of `read`
The first load of a process is told apart: it also pays for memory that nobody touched before.

Cold means that the kernel was asked to drop the files' pages (posix_fadvise); a parallel file system's servers, or the
host of a virtual machine, may still have them. python -m benchmarks.random_model and python -m convert make one.
"""

import argparse
import os
import time
from collections import ChainMap
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from benchmarks.common import count, numbers
from jaxinfer.checkpoint.files import CheckpointError
from jaxinfer.checkpoint.reader import BLOCK, Reader
from jaxinfer.models.config import ModelConfig

SAMPLE = 64 << 20
TENSOR = (1, 2, 4, 8, 16)


def in_threads(threads: int, work: Callable[[Any], None], items: Sequence[Any]) -> float:
    """Seconds until every item is worked on."""
    with ThreadPoolExecutor(threads) as pool:
        began = time.perf_counter()
        list(pool.map(work, items))
        return time.perf_counter() - began


def memcpy(threads: int) -> float:
    pairs = [(np.ones(SAMPLE, np.uint8), np.ones(SAMPLE, np.uint8)) for _ in range(threads)]
    rounds = 8

    def copy(pair: tuple[np.ndarray, np.ndarray]) -> None:
        for _ in range(rounds):
            np.copyto(*pair)

    return threads * rounds * SAMPLE / in_threads(threads, copy, pairs)


def check(threads: int) -> float:
    blocks = [bytes(BLOCK) for _ in range(threads)]
    rounds = 256

    def digest(block: bytes) -> None:
        checksum = xxhash.xxh3_128()
        for _ in range(rounds):
            checksum.update(block)

    return threads * rounds * BLOCK / in_threads(threads, digest, blocks)


def to_device(threads: int, device: Any) -> float:
    import jax

    arrays = [np.ones(SAMPLE + 64, np.uint8)[1 : SAMPLE + 1] for _ in range(threads)]  # not aligned: the CPU copies too
    rounds = 8

    def put(array: np.ndarray) -> None:
        for _ in range(rounds):
            jax.device_put(array, device).block_until_ready()

    return threads * rounds * SAMPLE / in_threads(threads, put, arrays)


def read(threads: int, paths: Sequence[Path], size: int) -> float:
    def whole(mine: Sequence[Path]) -> None:
        block = memoryview(bytearray(BLOCK))
        for path in mine:
            with open(path, "rb", buffering=0) as file:
                while file.readinto(block):
                    pass

    return size / in_threads(threads, whole, [paths[start::threads] for start in range(threads)])


def drop_pages(paths: Sequence[Path]) -> None:
    os.sync()
    for path in paths:
        handle = os.open(path, os.O_RDONLY)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def bytes_table(reader: Reader, model: ModelConfig, parameters: Any) -> None:
    """Bytes of chunk files that processes read, over the bytes of weights that their devices need, for meshes that the
    model can have."""
    import jax

    from jaxinfer.checkpoint.load import local_piece
    from jaxinfer.parallel.axes import LayoutError
    from jaxinfer.parallel.placement import Parameter, Rules, check_model

    print("\n| tensor | one process for all devices | one process per device |\n|---|---|---|")
    for tensor in TENSOR:
        sizes = {"stage": 1, "data": 1, "tensor": tensor}
        try:
            check_model(model, sizes)
        except LayoutError:
            continue
        declared = jax.tree.leaves(parameters, is_leaf=lambda leaf: isinstance(leaf, Parameter))
        needed: list[dict[str, int]] = []  # per device, slice to bytes
        files: list[dict[str, int]] = []
        for rank in range(tensor):
            coords = {"stage": 0, "data": 0, "tensor": rank}
            needed.append({})
            files.append({})
            for parameter in declared:
                piece = local_piece(parameter, Rules(), sizes, coords, reader.manifest.dtype)
                for leaf, index, view in piece.views(np.broadcast_to(np.zeros((), np.uint8), piece.shape)):
                    needed[rank][f"{leaf}{index}"] = view.size * piece.dtype.itemsize
                    for cut in reader.cuts(leaf, index):
                        files[rank][cut.file] = reader.manifest.files[cut.file]["bytes"]
        own = sum(map(_total, files)) / sum(map(_total, needed))
        one = _total(ChainMap(*files)) / _total(ChainMap(*needed))
        print(f"| {tensor} | {one:.3f} | {own:.3f} |")


def _total(sizes: Mapping[str, int]) -> int:
    return sum(sizes.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, metavar="CKPT_DIR")
    parser.add_argument("--threads", type=numbers, default=[1, 2, 4, 8, 16], metavar="N,N,...")
    parser.add_argument("--mesh", default="", metavar="AXES", help="as for jaxinfer.generate (default: one device)")
    parser.add_argument("--cpu-devices", type=int, metavar="N", help="run on N virtual CPU devices")
    parser.add_argument("--repeats", type=count, default=3, metavar="N")
    parser.add_argument("--bytes", action="store_true", help="also bytes read over bytes needed, by mesh")
    args = parser.parse_args()
    if args.cpu_devices:
        from jaxinfer.cluster.cpu import use_virtual_devices

        use_virtual_devices(args.cpu_devices)
    try:
        measure(args)
    except CheckpointError as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")


def measure(args: argparse.Namespace) -> None:
    import jax

    from jaxinfer.checkpoint.fill import fill
    from jaxinfer.checkpoint.load import default_threads, load, local_pieces
    from jaxinfer.engine.forward import Decoder
    from jaxinfer.parallel.axes import parse_mesh
    from jaxinfer.parallel.mesh import make_mesh
    from jaxinfer.parallel.placement import Rules
    from jaxinfer.parallel.stages import balance

    reader = Reader(args.model)
    model = ModelConfig.from_json(reader.manifest.model)
    mesh, rules, dtype = make_mesh(parse_mesh(args.mesh)), Rules(), reader.manifest.dtype
    parameters = Decoder(model, balance(model.num_layers, mesh.shape["stage"])).parameters()
    pieces = local_pieces(parameters, mesh, rules, dtype)
    paths = [reader.folder / name for name in reader.manifest.chunks]
    size = sum(entry["bytes"] for entry in reader.manifest.chunks.values())
    device = jax.local_devices()[0]

    def timed(work: Callable[[], Any]) -> float:
        before, began = reader.bytes_read, time.perf_counter()
        work()
        return (reader.bytes_read - before) / (time.perf_counter() - began)

    def host(threads: int) -> float:
        return timed(lambda: fill(reader, pieces, lambda piece, array: None, threads))

    def whole(threads: int) -> float:
        return timed(lambda: load(reader, parameters, mesh, rules, dtype, threads))

    cores = len(os.sched_getaffinity(0))
    print(f"{size / 1e9:.2f} GB in {len(paths)} files; {device.device_kind}, {cores} cores, JAX {jax.__version__}")
    read(cores, paths, size)  # into the page cache
    threads = default_threads()
    rate = whole(threads)
    print(f"first load of the process, {threads} threads: {size / rate:.2f} s, {rate / 1e9:.1f} GB/s\n")
    print("| files | threads | memcpy | check | read | to device | host | load |\n|---|---|---|---|---|---|---|---|")
    for threads in args.threads:
        best = [
            max(measured() for _ in range(args.repeats)) / 1e9
            for measured in (
                lambda: memcpy(threads),
                lambda: check(threads),
                lambda: read(threads, paths, size),
                lambda: to_device(threads, device),
                lambda: host(threads),
                lambda: whole(threads),
            )
        ]
        row = " | ".join(f"{rate:.1f}" for rate in best)
        print(f"| cached | {threads} | {row} ({best[-1] / best[2]:.0%}) |", flush=True)
    for threads in args.threads:
        cold = []
        for measured in (lambda: read(threads, paths, size), lambda: host(threads), lambda: whole(threads)):
            drop_pages(paths)
            cold.append(measured() / 1e9)
        print(
            f"| cold | {threads} | | | {cold[0]:.1f} | | {cold[1]:.1f} | {cold[2]:.1f} ({cold[2] / cold[0]:.0%}) |",
            flush=True,
        )
    if args.bytes:
        bytes_table(reader, model, Decoder(model, balance(model.num_layers, 1)).parameters())


if __name__ == "__main__":
    main()
