"""The process that srun started: forks the worker, watches it, tells the hub, and ends it when the run is over.

A process of its own, because a thread would stop with its process, and would wait for Python's lock while JAX holds it.
"""

import asyncio
import contextlib
import importlib.metadata
import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable

from jaxinfer.cluster import hub as hubs
from jaxinfer.cluster.launch import Launch
from jaxinfer.cluster.ports import keep_coordinator, listen
from jaxinfer.cluster.pulse import PAUSE_SECONDS, STOP_SIGNALS, Limits, Pulse
from jaxinfer.cluster.secret import Secret, make_secret
from jaxinfer.cluster.slurm import ClusterError
from jaxinfer.cluster.verdict import Verdict
from jaxinfer.cluster.wire import Peer, reach
from jaxinfer.cluster.worker import (
    FOLLOWS,
    STACKS_SIGNAL,
    become_worker,
    end,
    memory_text,
    oom_kills,
    process_state,
    run_worker,
)

LOOK_SECONDS = 0.1  # at the worker's phase
STATE_SECONDS = 0.5
RETRY_SECONDS = 0.2
ANSWER_SECONDS = 5.0
QUIET_SECONDS = 5.0  # that a rank looks for process 0 before it says so
STACKS_SECONDS = 1.0  # for the worker to print its stacks
FAREWELL_SECONDS = 5.0  # for the other ranks to go
LAST_SECONDS = 60  # for everything after the verdict
PACKAGES = ("jax", "jaxlib")

Work = Callable[[Pulse, str], int]  # the pulse, and the address for jax.distributed


def supervise(
    launch: Launch,
    limits: Limits,
    program: str,
    facts: dict[str, str],
    work: Work,
    take_back: Callable[[], object] = lambda: None,
) -> None:
    """Runs `work` in a child of this process and exits with the status of the whole run. Does not return.

    All ranks start together or not at all, and end together: the first that dies, fails or is stuck ends them, and
    process 0 says which it was. `facts` must be the same on all ranks, as the versions of Python and JAX must. After an
    error of the user's (status 2) process 0 calls `take_back`, when its worker has ended. Call this before anything
    starts threads.
    """
    pulse = Pulse(launch.process_id == 0, limits.grace)
    door = None
    try:
        if launch.process_id == 0 and launch.num_processes > 1:
            secret = make_secret(os.environ, launch.step is not None)
            door = (listen(launch), secret)
    except ClusterError as error:
        print(f"{program}: error: {error}", file=sys.stderr, flush=True)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        cancel_step(launch, signal.SIGTERM)  # the others look for this process in vain
        end(2)
    sys.stdout.flush()
    sys.stderr.flush()
    start, begin = os.pipe()
    monitor = os.getpid()
    pid = os.fork()
    if pid == 0:
        become_worker(monitor)
        os.close(begin)
        if door:
            door[0].close()
        with os.fdopen(start) as pipe:
            coordinator = pipe.readline().strip()
        if not coordinator:
            os._exit(1)
        run_worker(lambda: work(pulse, coordinator), pulse.fail, f"rank {launch.process_id} {socket.gethostname()}")
    os.close(start)

    async def watch() -> None:
        # inside the loop: while that closes, a signal finds no handler, the one of the worker's end for instance
        status = await Monitor(launch, limits, program, facts, pulse, pid, begin).run(door)
        if status == 2 and launch.process_id == 0:
            take_back()
        end(status)

    asyncio.run(watch())


class Monitor:
    """One rank's: `run` returns the status to exit with."""

    def __init__(
        self,
        launch: Launch,
        limits: Limits,
        program: str,
        facts: dict[str, str],
        pulse: Pulse,
        pid: int,
        begin: int,
    ):
        self._facts = _versions() | facts
        self._launch, self._limits, self._program, self._pulse = launch, limits, program, pulse
        self._pid, self._begin = pid, begin
        self._ended: int | None = None
        self._signal = 0
        self._changed = asyncio.Event()
        self._oom_kills = oom_kills()
        self._memory = ""
        self._peer: Peer | None = None
        self._hub: hubs.Hub | None = None

    async def run(self, door: tuple[socket.socket, Secret] | None) -> int:
        """`door`: where process 0 of several awaits the others, and the secret that they have to know."""
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGCHLD, self._reap)
        for number in (*STOP_SIGNALS, signal.SIGINT):
            loop.add_signal_handler(number, self._signalled, number)
        self._reap()
        if self._launch.process_id:
            return await self._follow()
        hub = self._hub = hubs.Hub(self._launch, self._limits, self._pulse, self._facts)
        if door:
            await hub.listen(*door)
        following = asyncio.create_task(self._follow())
        coordinator, self._kept = keep_coordinator(self._launch)
        verdict = await hub.run(coordinator)
        await self._conclude(hub, verdict)
        following.cancel()
        return verdict.status

    async def _conclude(self, hub: hubs.Hub, verdict: Verdict) -> None:
        signal.alarm(LAST_SECONDS)  # its default is to end this process, should anything here hang
        if verdict.status or verdict.text:
            if 0 in verdict.ranks and verdict.stuck:
                await self._print_stacks()
            # no more of it after the last line; dead it would take JAX's coordinator along, and the others would abort
            self._signal_worker(signal.SIGSTOP)
            if verdict.table:
                print(verdict.table, file=sys.stderr, flush=True)
            self._say(verdict.text)
        left = await hub.end(verdict, FAREWELL_SECONDS)
        self._kill()
        if left:
            await asyncio.to_thread(cancel_step, self._launch)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._worker_ends(), FAREWELL_SECONDS)

    async def _follow(self) -> int:
        """Talks to the hub, from hello to the end."""
        peer = await self._connect()
        if peer is None:
            self._kill()
            return 0 if self._signal else 2
        self._peer = peer
        if self._signal:
            peer.send("signal", number=self._signal)
        reporting = asyncio.create_task(self._report(peer))
        try:
            while message := await self._next(peer):
                match message["kind"]:
                    case "welcome":
                        os.write(self._begin, f"{message['coordinator']}\n".encode())
                        os.close(self._begin)
                    case "order":
                        hubs.orders(self._pulse, message["what"], message["step"])
                        peer.send("done", what=message["what"], step=message["step"])
                    case "end":
                        if self._launch.process_id != 0:
                            if message["stacks"]:
                                await self._print_stacks()
                            self._kill()
                        await peer.close()
                        return message["status"]
        finally:
            reporting.cancel()
        self._kill()
        shared = self._pulse.shared
        gone = f"lost rank 0 on {self._launch.host} in {shared.phase.decode()}, step {shared.step}"
        self._say(f"{self._launch.name} {gone}: its process or its node is gone, or stopped")
        if self._launch.process_id == 1:
            await asyncio.to_thread(cancel_step, self._launch)
        return 1

    async def _next(self, peer: Peer) -> dict | None:
        """The next message; None when process 0 is gone or silent for too long."""
        silent = 0.0
        while silent <= self._limits.dead:
            began = time.monotonic()
            try:
                return await asyncio.wait_for(peer.receive(), 1)
            except TimeoutError:
                took = time.monotonic() - began
                silent = 0.0 if took > PAUSE_SECONDS else silent + took
        return None

    async def _connect(self) -> Peer | None:
        """Finds process 0 and says hello; None after the bound for the start."""
        launch, began, said = self._launch, time.monotonic(), False
        while self._ended is None and not self._signal:
            peer, error = await self._find()
            if peer:
                return peer
            waited = time.monotonic() - began
            if waited > self._limits.start:
                what = f"coordinator {launch.place} not reachable in {self._limits.start:g} s: {error}"
                hint = "does rank 0 run there? does the name resolve here? is the port open?"
                self._say(f"error: {launch.name}: {what} ({hint})")
                return None
            if waited > QUIET_SECONDS and not said:
                self._say(f"{launch.name}: waiting for coordinator {launch.place}: {error}")
                said = True
            await asyncio.sleep(RETRY_SECONDS)
        return None

    async def _find(self) -> tuple[Peer | None, str]:
        """Process 0, at one of its ports, else why not."""
        launch, errors = self._launch, []
        ports = (reach(launch.address, port, ANSWER_SECONDS) for port in launch.ports)
        for connecting in (self._hub.own(),) if self._hub else ports:
            try:
                peer = await connecting
                error = await self._introduce(peer)
                if not error:
                    return peer, ""
                errors.insert(0, error)
            except ConnectionRefusedError as found:  # tells least
                errors.append(str(found))
            except (OSError, ClusterError) as found:
                errors.insert(0, str(found) or type(found).__name__)
        return None, errors[0]

    async def _introduce(self, peer: Peer) -> str:
        """Says hello; why it is not heard, else nothing."""
        launch, facts = self._launch, self._facts
        me = {"process_id": launch.process_id, "count": launch.num_processes, "host": socket.gethostname()}
        peer.send("hello", run=launch.run, **me, facts=facts)
        answer = None
        with contextlib.suppress(TimeoutError):
            answer = await asyncio.wait_for(peer.receive(), ANSWER_SECONDS)
        if answer and answer["kind"] == "here":
            return ""
        await peer.close()
        return answer["text"] if answer and answer["kind"] == "refuse" else "no answer to hello"

    async def _report(self, peer: Peer) -> None:
        shared = self._pulse.shared
        told, phase, due = False, b"", 0.0
        while not told:
            place = {"phase": shared.phase.decode(), "step": shared.step, "device": shared.device.decode()}
            if self._ended is None:
                if shared.phase != phase or time.monotonic() > due:
                    phase, due = shared.phase, time.monotonic() + min(STATE_SECONDS, self._limits.dead / 4)
                    state = process_state(self._pid)
                    self._memory = memory_text(self._pid) or self._memory
                    peer.send("state", **place, waits=bool(shared.waits), state=state, age=time.monotonic() - shared.at)
            else:
                failure = shared.failure.decode(errors="replace")
                peer.send(
                    "ended",
                    **place,
                    status=self._ended,
                    failure=failure.removeprefix(FOLLOWS),
                    follows=failure.startswith(FOLLOWS) or self._ended == -signal.SIGABRT,
                    memory=self._memory_at_end(),
                )
                told = True
            began = time.monotonic()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), LOOK_SECONDS)
            self._changed.clear()
            if time.monotonic() - began > PAUSE_SECONDS:
                shared.at = time.monotonic()  # the worker was suspended too, and is not late for it
        while True:  # the worker is done; the rank is still there
            await asyncio.sleep(STATE_SECONDS)
            peer.send("alive")

    def _memory_at_end(self) -> str:
        if self._ended != -signal.SIGKILL:
            return ""
        before, now = self._oom_kills, oom_kills()
        killed = before is not None and now is not None and now > before
        cause = "out of memory: the kernel's OOM killer took it" if killed else "by hand, by Slurm or out of memory"
        return f"{cause} ({self._memory})" if self._memory else cause

    async def _print_stacks(self) -> None:
        if self._ended is None:
            self._say(f"{self._launch.name}: the stacks of its process:")
            self._signal_worker(STACKS_SIGNAL)
            self._signal_worker(signal.SIGCONT)  # one that is stopped prints them when it goes on
            await asyncio.sleep(STACKS_SECONDS)

    async def _worker_ends(self) -> None:
        while self._ended is None:
            await asyncio.sleep(0.01)

    def _kill(self) -> None:
        self._signal_worker(signal.SIGKILL)

    def _signal_worker(self, number: int) -> None:
        if self._ended is None:
            for send in (os.killpg, os.kill):  # before it has its own group, by its id
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    send(self._pid, number)
                    return

    def _reap(self) -> None:
        if self._ended is None:
            pid, status = os.waitpid(self._pid, os.WNOHANG)
            if pid:
                self._ended = os.waitstatus_to_exitcode(status)
                self._changed.set()

    def _signalled(self, number: int) -> None:
        number = signal.SIGTERM if number == signal.SIGINT else number
        if self._signal and number == signal.SIGTERM == self._signal:
            return  # Slurm repeats it
        self._signal = self._signal or number
        if self._hub:
            self._hub.signalled(number)
        elif self._peer:
            self._peer.send("signal", number=number)

    def _say(self, text: str) -> None:
        print(f"{self._program}: {text}", file=sys.stderr, flush=True)


def cancel_step(launch: Launch, number: signal.Signals = signal.SIGKILL) -> None:
    """Has Slurm signal every task of the step: nothing else reaches a monitor that is stopped or not connected."""
    if launch.step and shutil.which("scancel"):
        command = ["scancel", f"--signal={number.name.removeprefix('SIG')}", launch.step]
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            subprocess.run(command, timeout=20, capture_output=True, check=False)


def _versions() -> dict[str, str]:
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {"Python": platform.python_version().rpartition(".")[0], **versions}
