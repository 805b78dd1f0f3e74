"""All-reduce by message size: microseconds each, in a chain inside one program, as decode steps have them.

    python -m benchmarks.collectives --json build/bench/collectives.json              # over all devices
    python -m benchmarks.collectives --devices 4 --sizes 8K,64K,1M
    python -m benchmarks.collectives --cpu-devices 4 --sizes 8K,1M --chain 4

Each link of the chain is a psum and a multiplication that undoes it, so that none can be merged with another. The floor
is 2 (n - 1) / n times the bytes at the rate of one device's link, measured by shifting a large block around the ring.
GB/s are bytes of the message per second. `peer` is the kernel that writes into the other GPUs' memory, where it can.
"""

import argparse
import os
import sys
import time
from functools import partial
from typing import Any

from benchmarks import report
from benchmarks.common import count, start, user_errors
from benchmarks.report import Row
from jaxinfer import __version__
from jaxinfer.cluster.distributed import everyone
from jaxinfer.options import Parser, add_process_options, file_to_write
from jaxinfer.parallel.all_reduce import peer_sum, shots
from jaxinfer.parallel.axes import AXES
from jaxinfer.parallel.peer import connect
from jaxinfer.screen import escape_unencodable
from jaxinfer.telemetry.manifest import describe_run

UNITS = {"K": 2**10, "M": 2**20}
SIZES = "8K,16K,32K,128K,512K,1M,4M,16M,32M,64M"
LINK_BYTES, LINK_BYTES_CPU = 2**28, 2**22
ROUNDS = 5


def sizes(text: str) -> list[int]:
    try:
        found = [int(part[:-1]) * UNITS[part[-1]] for part in text.split(",")]
    except (ValueError, KeyError, IndexError):
        found = []
    if min(found, default=0) < 1:
        raise argparse.ArgumentTypeError(f"found {text!r}, legal is sizes like 8K,1M,64M")
    return found


def main() -> None:
    escape_unencodable()
    made = Parser(
        prog="python -m benchmarks.collectives",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    made.add_argument("--devices", type=count, metavar="N", help="the first N (default: all)")
    made.add_argument("--sizes", type=sizes, default=sizes(SIZES), metavar="SIZE,...", help=f"(default: {SIZES})")
    made.add_argument("--chain", type=count, default=32, metavar="N", help="collectives in a program (default: 32)")
    made.add_argument("--cpu-devices", type=int, metavar="N", help="run on N virtual CPU devices")
    made.add_argument("--json", type=file_to_write, metavar="FILE", help="write the figures there")
    add_process_options(made)
    args = made.parse_args()
    with user_errors("collectives"):
        start(args)
        import jax

        devices = jax.devices()
        number = args.devices or len(devices)
        if number > len(devices):
            raise ValueError(f"devices: {number}, found {len(devices)}")
        if number == 1:
            print("collectives: one device, so there is nothing to measure; --cpu-devices N makes virtual ones")
            return
        measure(args, devices[:number])


def measure(args: argparse.Namespace, devices: list[Any]) -> None:
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import Mesh

    n, mesh = len(devices), Mesh(np.array(devices).reshape(1, 1, -1), AXES)
    link = link_rate(mesh)
    peers, reason = connect(mesh, everyone)
    rows = []
    for size in args.sizes:
        kinds = {"psum": None}
        if peers is not None and shots(size, np.dtype(jnp.bfloat16), n) is not None:
            kinds["peer"] = peers
        for kind, table in kinds.items():
            seconds = sum_seconds(mesh, size, args.chain, table)
            least = 2 * (n - 1) / n * size / link
            name = f"{kind} {_text(size)}"
            rows += [
                Row(name, "us", seconds * 1e6, least * 1e6),
                Row(name, "GB/s", size / seconds / 1e9, n / (n - 1) / 2e9 * link),
            ]
    run = describe_run(
        __version__, {"sizes": args.sizes, "chain": args.chain, "devices": n}, {"d": n}, [os.uname().nodename]
    )
    if jax.process_index() == 0:
        where = f"{n} of {devices[0].device_kind}, {jax.process_count()} process(es)"
        facts = {"link, measured": f"{link / 1e9:,.1f} GB/s each way"} | ({"no peer sum": reason} if reason else {})
        report.show(f"collectives: {where}", rows, facts)
        if args.json is not None:
            data = {"benchmark": "collectives", "model": "", "mesh_text": f"{n} devices", **run}
            data |= {"limits": {"link_bytes_per_s": link}, "details": {}, "notes": {}}
            report.write(args.json, data, rows)
    sys.stdout.flush()


def sum_seconds(mesh: Any, size: int, chain: int, peers: Any) -> float:
    """Seconds of one sum of `size` bytes of bfloat16 on each device: a psum, or with `peers` the peer kernel."""
    import jax
    from jax import lax

    scale = 1 / mesh.size

    def links(x: jax.Array, table: Any) -> jax.Array:
        for _ in range(chain):
            x = (lax.psum(x, "tensor") if table is None else peer_sum(x, table)) * scale
        return x

    return _seconds(mesh, links, size, peers) / chain


def link_rate(mesh: Any) -> float:
    """Bytes per second from one device to the next while all send, one way."""
    from jax import lax

    n = mesh.size
    size = LINK_BYTES_CPU if mesh.devices.flat[0].platform == "cpu" else LINK_BYTES
    ring = [(place, (place + 1) % n) for place in range(n)]
    chain = 4

    def shift(x: Any, _: None) -> Any:
        for _ in range(chain):
            x = lax.ppermute(x, "tensor", ring)
        return x

    return size * chain / _seconds(mesh, shift, size)


def _seconds(mesh: Any, body: Any, size: int, table: Any = None) -> float:
    """Seconds of `body` on a block of `size` bytes per device and the peers' table; the best of a few rounds."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    spec = P("tensor")
    mapped = partial(jax.shard_map, mesh=mesh, in_specs=(spec, P(*AXES)), out_specs=spec, check_vma=False)
    function = jax.jit(mapped(body))
    make = jax.jit(partial(jnp.ones, (mesh.size, size // 2), jnp.bfloat16), out_shardings=NamedSharding(mesh, spec))
    block = make()
    jax.block_until_ready(function(block, table))
    best = float("inf")
    for _ in range(ROUNDS):
        began = time.perf_counter()
        jax.block_until_ready(function(block, table))
        best = min(best, time.perf_counter() - began)
    return best


def _text(size: int) -> str:
    return f"{size >> 20} MiB" if size >= 2**20 else f"{size >> 10} KiB"


if __name__ == "__main__":
    main()
