"""Where the monitors of all ranks meet: beside the monitor of process 0. Lets them start together, watches, judges.

Whoever else connects is told nothing and changes nothing.
"""

import asyncio
import contextlib
import signal
import socket
import time
from typing import Any

import attrs

from jaxinfer.cluster.launch import Launch
from jaxinfer.cluster.pulse import DRAIN, PAUSE_SECONDS, Limits, Pulse
from jaxinfer.cluster.secret import VARIABLE, Secret
from jaxinfer.cluster.verdict import Rank, Verdict, judge
from jaxinfer.cluster.wire import LONGEST, Peer, admit, pair

TICK_SECONDS = 0.1
PING_SECONDS = 1.0
HARD_SECONDS = 5.0  # beyond the grace, for a worker that does not come to its next step
HELLO_SECONDS = 10.0  # for a connection to show that it is of this run
STRANGERS = 64  # connections that have not, beside those of ranks that are yet to come; one more ends the oldest
STEPPING = ("prefill", "decode", "compile", "end")


@attrs.define
class Member:
    """A rank's connection and the clock times of what is known of it."""

    peer: Peer
    rank: Rank
    heard: float
    beat: float
    ended: float = 0.0
    acknowledged: tuple[int, int] = (0, 0)
    finished: bool = False


class Hub:
    """`run` serves until the run is over and returns the verdict: status 0 when all workers ended well, or were stopped
    by a signal."""

    def __init__(self, launch: Launch, limits: Limits, pulse: Pulse, facts: dict[str, str]):
        self._launch, self._limits, self._pulse, self._facts = launch, limits, pulse, facts
        self._members: dict[int, Member] = {}
        self._began = time.monotonic()
        self._stopped = 0.0  # when the signal came
        self._signal = 0
        self._started = False
        self._order: tuple[int, int] | None = None
        self._refused: Verdict | None = None
        self._refused_ranks: set[int] = set()
        self._pinged = 0.0
        self._wake = asyncio.Event()
        self._unknown: dict[asyncio.StreamWriter, None] = {}  # the oldest first
        self._turned_away, self._stranger = 0, ""  # how many, and the last one's address

    async def run(self, coordinator: str) -> Verdict:
        while True:
            before = time.monotonic()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), TICK_SECONDS)
            self._wake.clear()
            self._forgive(time.monotonic() - before)
            self._ping()
            verdict = self._refused or (self._watch() if self._started else self._gather(coordinator))
            if verdict:
                return verdict

    async def listen(self, listening: socket.socket, secret: Secret) -> None:
        """Takes the connections of other processes."""
        self._secret, self._port = secret, listening.getsockname()[1]
        # it closes with the process: to wait for that here would be to wait for everybody's connection (Python 3.12)
        self._server = await asyncio.start_server(self._serve, sock=listening, limit=LONGEST)

    async def own(self) -> Peer:
        """For the rank beside this hub: needs no port and no secret."""
        here, there = await pair()
        self._own = asyncio.create_task(self._attend(here))
        return there

    async def _attend(self, peer: Peer) -> None:
        hello = await peer.receive()
        if hello:
            await self.talk(peer, hello)

    async def end(self, verdict: Verdict, seconds: float) -> list[int]:
        """Tells everybody; returns the other ranks that have not gone after so long, or never came."""
        for member in self._members.values():
            blamed = member.rank.process_id in verdict.ranks
            member.peer.send("end", status=verdict.status, stacks=blamed and verdict.stuck)
        until = time.monotonic() + seconds
        others = [member for place, member in self._members.items() if place != 0]
        while time.monotonic() < until and not all(member.rank.lost for member in others):
            await asyncio.sleep(0.02)
        gone = self._refused_ranks | {0} | {member.rank.process_id for member in others if member.rank.lost}
        return [place for place in range(self._launch.num_processes) if place not in gone]

    def _ping(self) -> None:
        """Tells everybody that this process lives: from the first rank on, not only when all are there."""
        now = time.monotonic()
        if now - self._pinged > min(PING_SECONDS, self._limits.dead / 4):
            self._pinged = now
            for member in self._members.values():
                member.peer.send("ping")

    def _gather(self, coordinator: str) -> Verdict | None:
        count = self._launch.num_processes
        if len(self._members) == count:
            self._started = True
            now = time.monotonic()
            for member in self._members.values():
                member.heard = member.beat = now
                member.peer.send("welcome", coordinator=coordinator)
            return None
        lost = [member.rank for member in self._members.values() if member.rank.lost or member.rank.ended]
        if lost:
            return judge(lost, self._limits) or Verdict((lost[0].process_id,), f"{lost[0].name} died in start")
        if self._signal:
            return Verdict((), _stopped_text(self._signal), status=0)
        waited = time.monotonic() - self._began
        if waited <= self._limits.start:
            return None
        missing = [place for place in range(count) if place not in self._members]
        names = [f"rank {place} ({self._launch.hosts[place] or 'host not known'})" for place in missing]
        text = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
        return Verdict(
            tuple(missing),
            f"{len(self._members)} of {count} ranks are there after {waited:.0f} s; missing: {text} (bound "
            f"{self._limits.start:g} s, --start-s; did it start? does {self._launch.host} resolve there, and is port "
            f"{self._port} open?{self._unproven()})",
        )

    def _unproven(self) -> str:
        if not self._turned_away:
            return ""
        return (
            f"; {self._turned_away} connections, the last from {self._stranger}, did not prove that they are of this "
            f"run: have all ranks the same secret? see {VARIABLE} in slurm/FAILURES.md"
        )

    def _watch(self) -> Verdict | None:
        now = time.monotonic()
        ranks = [member.rank for member in self._members.values()]
        for member in self._members.values():
            rank = member.rank
            rank.silent, rank.age, rank.ended_for = now - member.heard, now - member.beat, now - member.ended
        if all(rank.ended == 0 for rank in ranks):
            return Verdict((), "", status=0)
        return self._stop(ranks, now) or judge(ranks, self._limits)

    def _stop(self, ranks: list[Rank], now: float) -> Verdict | None:
        """After a signal: brings everybody the step at which to stop, or ends what has nothing to finish."""
        shared = self._pulse.shared
        if not self._signal:
            return None
        if not all(rank.phase in STEPPING or rank.ended == 0 for rank in ranks):
            return Verdict((), _stopped_text(self._signal) + " before the first token", status=0)
        if now - self._stopped > self._limits.grace + HARD_SECONDS:
            late = f" and did not come to a step within {self._limits.grace + HARD_SECONDS:.0f} s"
            return Verdict((), _stopped_text(self._signal) + late, status=0)
        shared.stop_signal = self._signal
        if shared.asked and self._order is None:
            self._order = (shared.asked, shared.asked_at)
            for member in self._members.values():
                member.peer.send("order", what=self._order[0], step=self._order[1])
        if self._order and all(each.acknowledged == self._order or each.finished for each in self._members.values()):
            self._order = None
            shared.asked = 0  # process 0 goes on
        return None

    def _forgive(self, took: float) -> None:
        if took > PAUSE_SECONDS:
            for member in self._members.values():
                member.heard, member.beat = member.heard + took, member.beat + took
            self._began += took

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.CancelledError):  # at the end of this program; Python 3.11 would print it
            found = await self._prove(reader, writer)
            if found:
                await self.talk(*found)

    async def _prove(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> tuple[Peer, dict[str, Any]] | None:
        """The other end and its first message, if it is a process of this user."""
        coming = self._launch.num_processes - len(self._members)
        if len(self._unknown) >= STRANGERS + coming:
            next(iter(self._unknown)).transport.abort()
        self._unknown[writer] = None
        try:
            async with asyncio.timeout(HELLO_SECONDS):
                peer = await admit(reader, writer, self._secret)
                if hello := await peer.receive():
                    return peer, hello
        except (OSError, ValueError, EOFError):  # a TimeoutError is an OSError
            pass
        finally:
            del self._unknown[writer]
        self._turned_away += 1
        self._stranger = (writer.get_extra_info("peername") or ("",))[0].removeprefix("::ffff:")
        writer.transport.abort()
        return None

    async def talk(self, peer: Peer, hello: dict[str, Any]) -> None:
        """Serves one that is of this user, to its end."""
        if hello["kind"] != "hello" or hello.get("run") != self._launch.run:
            peer.send("refuse", text=f"this is run {self._launch.run}")
            return await peer.close()
        place, count = hello["process_id"], self._launch.num_processes
        rank = Rank(place, count, hello["host"])
        wrong = self._unlike(rank, hello)
        if wrong:
            peer.send("here")
            peer.send("end", status=2, stacks=False)
            self._refused = self._refused or Verdict((place,), wrong, status=2)
            self._refused_ranks.add(place)
            self._wake.set()
            return
        now = time.monotonic()
        member = self._members[place] = Member(peer, rank, now, now)
        peer.send("here")
        self._wake.set()
        while message := await peer.receive():
            member.heard = time.monotonic()
            self._take(member, message)
        rank.lost = True
        self._wake.set()

    def _unlike(self, rank: Rank, hello: dict[str, Any]) -> str | None:
        other = self._members.get(rank.process_id)
        if other:
            return f"two processes say that they are rank {rank.process_id}: on {other.rank.host} and on {rank.host}"
        if not (0 <= rank.process_id < rank.count and hello["count"] == rank.count):
            return f"rank {rank.process_id} on {rank.host} is one of {hello['count']} processes, rank 0 of {rank.count}"
        for name, mine in self._facts.items():
            theirs = hello["facts"].get(name)
            if theirs != mine:
                return (
                    f"error: {rank.name} has {name} {theirs}, rank 0 on {self._launch.host or 'this host'} has {mine}"
                )
        return None

    def _take(self, member: Member, message: dict[str, Any]) -> None:
        rank = member.rank
        match message["kind"]:
            case "state":
                rank.phase, rank.step, rank.waits = message["phase"], message["step"], message["waits"]
                rank.state, rank.device = message["state"], message["device"]
                member.beat = time.monotonic() - message["age"]
            case "ended":
                rank.ended, rank.failure, rank.follows = message["status"], message["failure"], message["follows"]
                rank.phase, rank.step, rank.memory = message["phase"], message["step"], message["memory"]
                rank.device = message["device"]
                member.ended, member.finished = time.monotonic(), True
                self._wake.set()
            case "done":
                member.acknowledged = (message["what"], message["step"])
                self._wake.set()
            case "signal":
                self.signalled(message["number"])

    def signalled(self, number: int) -> None:
        if not self._signal:
            self._signal, self._stopped = number, time.monotonic()
            self._wake.set()


def orders(pulse: Pulse, what: int, step: int) -> None:
    """Hands an order to this rank's worker."""
    if what == DRAIN:
        pulse.shared.drain_at = step
    else:
        pulse.shared.quit_at = step


def _stopped_text(number: int) -> str:
    return f"stopped by {signal.Signals(number).name}"
