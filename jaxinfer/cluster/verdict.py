"""Which rank is to blame, from what is known of all of them."""

import signal
from collections.abc import Sequence

import attrs

from jaxinfer.cluster.pulse import Limits

SETTLE_SECONDS = 2.0  # that an error which may only follow from another rank's end waits for that end


@attrs.define
class Rank:
    """What the hub knows of a rank. Ages and times are seconds of the hub's clock.

    Attributes:
      silent: since its monitor's last word; None before its first.
      lost: its monitor's connection broke.
      age: since its worker's last beat.
      waits: the worker is inside JAX and may wait for others.
      state: of the worker process, as in /proc (T: stopped, D: waits for a disk, Z: dead).
      ended: exit status of the worker, negative for a signal; None while it runs.
      failure: what the worker said before it ended.
      follows: the failure is one that the end of another rank brings.
      ended_for: since the worker ended.
      memory: what to know of its memory, for a worker that was killed.
    """

    process_id: int
    count: int
    host: str
    device: str = ""
    silent: float | None = None
    lost: bool = False
    phase: str = "start"
    step: int = 0
    waits: bool = False
    age: float = 0.0
    state: str = "R"
    ended: int | None = None
    failure: str = ""
    follows: bool = False
    ended_for: float = 0.0
    memory: str = ""

    @property
    def name(self) -> str:
        device = f" ({self.device})" if self.device else ""
        return f"rank {self.process_id}/{self.count} on {self.host or 'an unknown host'}{device}"

    @property
    def place(self) -> str:
        return self.phase if self.phase in ("start", "end") else f"{self.phase}, step {self.step}"


@attrs.frozen
class Verdict:
    """The ranks to blame, the text for the user with a table that belongs before it, and everybody's exit status."""

    ranks: tuple[int, ...]
    text: str
    status: int = 1
    stuck: bool = False
    table: str = ""


def judge(ranks: Sequence[Rank], limits: Limits) -> Verdict | None:
    """None while all is well, or may still turn out to be."""
    return _ended(ranks) or _silent(ranks, limits) or _stuck(ranks, limits)


def _ended(ranks: Sequence[Rank]) -> Verdict | None:
    lost = [rank for rank in ranks if rank.lost and rank.ended is None]
    if lost:
        rank = lost[0]
        return Verdict((rank.process_id,), f"{rank.name} died in {rank.place}: its process or its node is gone")
    failed = sorted((rank for rank in ranks if rank.ended), key=lambda rank: -rank.ended_for)
    first = [rank for rank in failed if not rank.follows]
    if not first and failed and failed[0].ended_for > SETTLE_SECONDS:
        first = failed
    if not first:
        return None
    rank = first[0]
    if rank.ended < 0:
        return Verdict((rank.process_id,), f"{rank.name} died in {rank.place}: {_signal(rank)}")
    text = rank.failure or f"exit status {rank.ended}"
    if rank.ended == 2:  # the user's to mend: what to mend comes first
        text, _, table = text.partition("\n")
        return Verdict((rank.process_id,), f"error: {text} ({rank.name}, in {rank.phase})", status=2, table=table)
    return Verdict((rank.process_id,), f"{rank.name} failed in {rank.place}: {text}")


def _signal(rank: Rank) -> str:
    number = -(rank.ended or 0)
    name = signal.Signals(number).name if number in iter(signal.Signals) else "a signal"
    memory = f"; {rank.memory}" if rank.memory else ""
    said = f"; it said: {rank.failure}" if rank.failure else ""
    return f"killed by signal {number} ({name}){memory}{said}"


def _silent(ranks: Sequence[Rank], limits: Limits) -> Verdict | None:
    for rank in ranks:
        if rank.silent is not None and rank.silent > limits.dead and rank.ended is None:
            text = f"{rank.name} is dead: no sign of life for {rank.silent:.0f} s, last in {rank.place}"
            hint = "its process is stopped, or its node or network is down"
            return Verdict((rank.process_id,), f"{text} (bound {limits.dead:g} s, --dead-s; {hint})", stuck=True)
    return None


def _stuck(ranks: Sequence[Rank], limits: Limits) -> Verdict | None:
    """A rank inside JAX may only wait for another: it is to blame when nobody else can be."""
    running = [rank for rank in ranks if rank.ended is None and rank.silent is not None]
    # as of its last word: of a silent rank nothing newer is known
    overdue = [rank for rank in running if rank.age - rank.silent > limits.of(rank.phase)]
    busy = [rank for rank in running if not rank.waits or rank.state == "T"]
    if busy:
        blamed = [rank for rank in overdue if rank in busy]
    elif len(overdue) == len(running):
        behind = min((rank.step for rank in overdue), default=0)
        blamed = [rank for rank in overdue if rank.step == behind]
    else:
        blamed = []
    if not blamed:
        return None
    # a process that somebody stopped is the plainest cause there is
    blamed = [rank for rank in blamed if rank.state == "T"] or blamed
    bound = limits.of(blamed[0].phase)
    option = {"load": "--load-stuck-s", "compile": "--compile-stuck-s"}.get(blamed[0].phase, "--stuck-s")
    texts = [f"{rank.name} is stuck in {rank.place}: {_doing(rank)} for {rank.age:.0f} s" for rank in blamed]
    text = "; ".join(texts[:4]) + (f"; and {len(texts) - 4} more" if len(texts) > 4 else "")
    return Verdict(tuple(rank.process_id for rank in blamed), f"{text} (bound {bound:g} s, {option})", stuck=True)


def _doing(rank: Rank) -> str:
    if rank.state == "T":
        return "its process is stopped (SIGSTOP or a debugger), no progress"
    if rank.state == "D":
        return "it waits for a disk or file system, no progress"
    return "waiting for the device" if rank.waits else "no progress"
