"""What the watchdog costs a worker per step: its signs of life and its look at the stop order.

    python -m benchmarks.watchdog

A step of the engine is three beats and one poll; the monitor is another process and reads them from shared memory.
"""

import timeit

from rich.console import Console
from rich.table import Table

from jaxinfer.cluster.pulse import Pulse

ROUNDS = 200_000
BEATS_PER_STEP = 3


def main() -> None:
    pulse = Pulse(leads=True, grace_s=20)
    beat = min(timeit.repeat(lambda: pulse.beat("decode", 7, True), number=ROUNDS)) / ROUNDS
    poll = min(timeit.repeat(lambda: pulse.poll(7), number=ROUNDS)) / ROUNDS
    table = Table("", "microseconds")
    table.add_row("beat", f"{beat * 1e6:.2f}")
    table.add_row("poll", f"{poll * 1e6:.2f}")
    table.add_row("per step", f"{(BEATS_PER_STEP * beat + poll) * 1e6:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
