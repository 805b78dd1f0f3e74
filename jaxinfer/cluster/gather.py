"""The processes of a run meet at process 0 over plain TCP, without JAX: for programs that ask whether JAX can start.

Who does not know the run's secret is told nothing and changes nothing, and every wait has a bound.
"""

import contextlib
import os
import socket
import sys
import threading
import time
from typing import Any

from jaxinfer.cluster.frames import Link, admit, introduce
from jaxinfer.cluster.launch import Launch
from jaxinfer.cluster.ports import listen
from jaxinfer.cluster.secret import Secret, SecretError, make_secret
from jaxinfer.cluster.slurm import ClusterError

HELLO_SECONDS = 5.0  # for a stranger that says nothing
RETRY_SECONDS = 0.2
QUIET_SECONDS = 5.0  # that process 0 waits before it says for whom
POLL_SECONDS = 0.1
PINGS = 8
LONGEST_HELLO, LONGEST = 1 << 12, 1 << 26
STRANGERS = 64  # connections that have not shown who they are, beside those of processes; one more ends the oldest
REFUSED = 20  # that are told of


class Meeting:
    """The connections of one process: those of process 0 lead to all others, any other's to process 0.

    Attributes:
      missing: on process 0, each process that is not (or no longer) here, and why.
      refused: on process 0, who was turned away, and why.
      clock_s: this process's clock less that of process 0, exact to half of `round_trip_s`.
    """

    def __init__(self, launch: Launch) -> None:
        self.launch = launch
        self.missing: dict[int, str] = {}
        self.refused: list[str] = []
        self.clock_s = self.round_trip_s = 0.0
        self._peers: dict[int, Link] = {}

    def gather(self, value: Any, timeout_s: float) -> list[Any] | None:
        """On process 0 the value of each process, None for one that did not send it in time; on the others None.

        Raises:
          ClusterError: process 0 is gone.
        """
        if self.launch.process_id:
            self._to_host(value, timeout_s)
            return None
        deadline = time.monotonic() + timeout_s
        values = [value] + [None] * (self.launch.num_processes - 1)
        for process in sorted(self._peers):
            try:
                values[process] = self._peers[process].receive(deadline, LONGEST)
            except TimeoutError:
                self._drop(process, f"sent nothing in {timeout_s:.0f} s: stuck")
            except (OSError, ValueError) as error:
                self._drop(process, f"ended before it had sent its part ({error})")
        return values

    def share(self, value: Any, timeout_s: float) -> Any:
        """What process 0 has in `value`; the others' own are ignored.

        Raises:
          ClusterError: process 0 is gone, or sent nothing in time.
        """
        deadline = time.monotonic() + timeout_s
        if self.launch.process_id:
            try:
                return self._peers[0].receive(deadline, LONGEST)
            except (OSError, ValueError) as error:
                raise ClusterError(self._host_gone(error, timeout_s)) from None
        for process in sorted(self._peers):
            try:
                self._peers[process].send(value, deadline)
            except OSError as error:
                self._drop(process, f"ended too early ({error})")
        return value

    def refuse(self, who: str) -> None:
        if who not in self.refused and len(self.refused) < REFUSED:
            self.refused.append(who)

    def close(self) -> None:
        for peer in self._peers.values():
            peer.close()
        self._peers.clear()

    def _to_host(self, value: Any, timeout_s: float) -> None:
        try:
            self._peers[0].send(value, time.monotonic() + timeout_s)
        except OSError as error:
            raise ClusterError(self._host_gone(error, timeout_s)) from None

    def _host_gone(self, error: Exception, timeout_s: float) -> str:
        what = f"silent for {timeout_s:.0f} s" if isinstance(error, TimeoutError) else f"gone ({error})"
        return f"{self.launch.name}: rank 0 on {self.launch.host} is {what}"

    def _drop(self, process: int, why: str) -> None:
        self._peers.pop(process).close()
        self.missing[process] = why


def meet(launch: Launch, timeout_s: float) -> Meeting:
    """Comes back when all processes of `launch` are connected, on process 0 also when `timeout_s` is over.

    Raises:
      ClusterError: the port is taken (process 0), or process 0 was not reached or refused this process (the others).
      SecretError: there is no secret (process 0).
    """
    meeting = Meeting(launch)
    if launch.num_processes == 1:
        return meeting
    if launch.process_id == 0:
        _receive_peers(meeting, timeout_s)
    else:
        _reach_host(meeting, timeout_s)
    return meeting


def _receive_peers(meeting: Meeting, timeout_s: float) -> None:
    launch = meeting.launch
    door = Door(meeting, make_secret(os.environ, launch.step is not None))
    server = listen(launch)
    deadline = time.monotonic() + timeout_s
    said = False
    server.settimeout(POLL_SECONDS)
    with server:
        while len(meeting._peers) < launch.num_processes - 1 and time.monotonic() < deadline:
            if not said and time.monotonic() > deadline - timeout_s + QUIET_SECONDS:
                absent = [str(each) for each in range(1, launch.num_processes) if each not in meeting._peers]
                print(f"{launch.name}: waiting for rank {', '.join(absent)}", file=sys.stderr, flush=True)
                said = True
            try:
                connection, address = server.accept()
            except TimeoutError:
                continue
            door.let_in(connection, address[0].removeprefix("::ffff:"))
    with door.lock:
        for process in range(1, launch.num_processes):
            if process not in meeting._peers:
                meeting.missing[process] = f"did not come in {timeout_s:.0f} s"


class Door:
    """Of process 0: lets those in who belong to the run, each connection in a thread of its own."""

    def __init__(self, meeting: Meeting, secret: Secret) -> None:
        self.lock = threading.Lock()
        self._meeting, self._secret = meeting, secret
        self._unknown: list[socket.socket] = []  # the oldest first

    def let_in(self, peer: socket.socket, address: str) -> None:
        with self.lock:
            if len(self._unknown) >= STRANGERS + self._meeting.launch.num_processes:
                with contextlib.suppress(OSError):  # it may have gone
                    self._unknown.pop(0).shutdown(socket.SHUT_RDWR)
            self._unknown.append(peer)
        threading.Thread(target=self._admit, args=(peer, address), daemon=True).start()

    def _admit(self, peer: socket.socket, address: str) -> None:
        launch, meeting, name = self._meeting.launch, self._meeting, address
        link, process = None, 0
        try:
            deadline = time.monotonic() + HELLO_SECONDS
            link = admit(peer, self._secret, deadline)
            hello = link.receive(deadline, LONGEST_HELLO)
            name, process = f"rank {hello['process']} on {hello['host']} ({address})", hello["process"]
            reason = _objection(launch, hello)
            link.send({"run": launch.run, "refused": reason}, deadline)
            if not reason:
                for _ in range(PINGS):
                    link.receive(deadline, LONGEST_HELLO)
                    link.send(time.time(), deadline)
                link.receive(deadline, LONGEST_HELLO)
        except (OSError, ValueError, KeyError, TypeError):
            reason = "no process of this run: it does not know its secret"
        with self.lock:
            if peer in self._unknown:
                self._unknown.remove(peer)
            if not reason and (process in meeting._peers or process in meeting.missing):
                reason = "its place is taken, or it came too late"
            if link is None or reason:
                meeting.refuse(f"{name}: {reason}")
                peer.close()
            else:
                meeting._peers[process] = link


def _objection(launch: Launch, hello: dict[str, Any]) -> str:
    if hello["run"] != launch.run:
        return f"it belongs to run {hello['run']}, this is {launch.run}"
    if hello["of"] != launch.num_processes:
        return f"it counts {hello['of']} processes, rank 0 counts {launch.num_processes}"
    if not (isinstance(hello["process"], int) and 0 < hello["process"] < launch.num_processes):
        return f"no such rank: legal is 1 to {launch.num_processes - 1}"
    return ""


def _reach_host(meeting: Meeting, timeout_s: float) -> None:
    launch, began = meeting.launch, time.monotonic()
    while True:
        errors = []
        for port in launch.ports:
            try:
                meeting.clock_s, meeting.round_trip_s, meeting._peers[0] = _say_hello(launch, port)
                return
            except ConnectionRefusedError as error:  # tells least
                errors.append(str(error))
            except (OSError, SecretError) as error:
                errors.insert(0, str(error))
        if time.monotonic() - began > timeout_s:
            found = ", ".join(addresses(launch.host)) or "no known name"
            raise ClusterError(
                f"{launch.name}: rank 0 at {launch.place} not reached in {timeout_s:.0f} s: {errors[0]} ({launch.host} "
                f"is {found} here; does rank 0 run there? do the nodes reach each other's ports?)"
            )
        time.sleep(RETRY_SECONDS)


def _say_hello(launch: Launch, port: int) -> tuple[float, float, Link]:
    """How far this clock is ahead and how exactly that is known, in seconds, and process 0.

    Raises:
      OSError: nothing answers there, or something else, another run's process 0 say.
      ClusterError: process 0 refuses this process, SecretError: it has no secret.
    """
    me = {"process": launch.process_id, "of": launch.num_processes, "host": socket.gethostname()}
    deadline = time.monotonic() + HELLO_SECONDS
    peer = socket.create_connection((launch.address, port), HELLO_SECONDS)
    try:
        host = introduce(peer, deadline)
        host.send({"run": launch.run, **me}, deadline)
        answer = host.receive(deadline, LONGEST_HELLO)
        if answer["refused"]:
            text = f"refused by rank 0 at {launch.host}:{port}: {answer['refused']}"
            if answer["run"] != launch.run and len(launch.ports) > 1:  # ours may have another
                raise ConnectionError(text)
            raise ClusterError(f"{launch.name}: {text}")
        clock = _compare_clocks(host, deadline)
        host.send("ready", deadline)
        return *clock, host
    except (ValueError, KeyError, TypeError) as error:
        peer.close()
        raise ConnectionError(f"another program answers at {launch.host}:{port}: {error}") from None
    except BaseException:
        peer.close()
        raise


def _compare_clocks(host: Link, deadline: float) -> tuple[float, float]:
    best = (0.0, float("inf"))
    for _ in range(PINGS):
        sent, began = time.time(), time.perf_counter()
        host.send("time", deadline)
        theirs = host.receive(deadline, LONGEST_HELLO)
        trip = time.perf_counter() - began
        # the shortest trip is the one that was held up least
        if trip < best[1]:
            best = (sent + trip / 2 - theirs, trip)
    return best


def addresses(host: str) -> list[str]:
    """What a host name resolves to here; nothing where it is not known."""
    try:
        return sorted({str(each[4][0]) for each in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)})
    except OSError:
        return []
