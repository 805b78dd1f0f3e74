"""``jaxinfer.generate`` with one fault: a rank that at some step of some phase does what the command line says.

    python faulty_generate.py RANK PHASE FAULT -- options of generate

The program is the real one; only its sign of life at that place also brings the fault.
"""

import os
import signal
import sys
import time

from jaxinfer import generate
from jaxinfer.cluster import monitor
from jaxinfer.cluster.pulse import Pulse
from jaxinfer.process import run


def exhaust_memory() -> None:
    hog = []
    while True:
        hog.append(b"x" * (16 << 20))


FAULTS = {
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "kill-monitor": lambda: os.kill(os.getppid(), signal.SIGKILL),
    "stop-monitor": lambda: (os.kill(os.getppid(), signal.SIGSTOP), time.sleep(600)),
    "hang": lambda: time.sleep(600),
    "memory": exhaust_memory,
    "version": lambda: None,
}


def main() -> None:
    rank, phase, fault = sys.argv[1:4]
    sys.argv[1:] = sys.argv[5:]
    supervise, beat = monitor.supervise, Pulse.beat

    def faulty_beat(self: Pulse, now: str, step: int = 0, waits: bool = False) -> None:
        nonlocal mine
        beat(self, now, step, waits)
        if mine and now == phase and (now not in ("decode", "load") or step > 0) and not (fault == "hang" and waits):
            mine = False
            print(f"fault at {time.time()}", file=sys.stderr, flush=True)
            if fault == "raise":
                raise RuntimeError("an error on purpose")
            if "monitor" in fault:
                time.sleep(1)  # for its last word of where this is
            FAULTS[fault]()

    def faulty_supervise(launch, limits, program, facts, work, take_back):
        nonlocal mine

        def faulty_work(pulse, where):
            nonlocal mine
            mine = launch.process_id == int(rank)
            return work(pulse, where)

        if fault == "version" and launch.process_id == int(rank):
            facts = facts | {"jaxinfer": "0.0.1"}
        supervise(launch, limits, program, facts, faulty_work, take_back)

    mine = False
    Pulse.beat = faulty_beat
    run.supervise = faulty_supervise
    generate.main()


main()
